"""Means over an evaluation: sums that each replica keeps to itself until the epoch ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, override

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_megatron.backends import core
from lightning_megatron.totals import METRIC, Totals, gather_totals

LOSS = "loss"


class EpochMean(Metric):
    """What Lightning reads as the result of a data loader: the mean of this replica, as a tensor of its own.

    :class:`ReduceAtEpochEnd` replaces the number in that tensor by the mean of all replicas. Lightning's results refer
    to it, so they need no collective before all data loaders are done.
    """

    full_state_update = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(sync_on_compute=False)
        self.mean = torch.full((), math.nan, device=device)
        self.to(device)

    @override
    def update(self, mean: Tensor) -> None:
        self.mean = mean

    @override
    def compute(self) -> Tensor:
        return self.mean


class EvaluationMeans:
    """Losses and metrics of one evaluation, by data loader."""

    def __init__(self) -> None:
        self._totals: list[Totals] = []
        self._means: list[dict[str, EpochMean]] = []

    def start(self) -> None:
        """Forget an evaluation that ended or broke off."""
        self._totals, self._means = [], []

    def add(self, dataloader_idx: int, totals: Totals) -> dict[str, EpochMean]:
        """Add the totals of one batch of this replica.

        Returns:
            The means to log, by name: ``loss``, and each metric that this data loader has had so far.
        """
        while len(self._totals) <= dataloader_idx:
            self._totals.append(Totals())
            self._means.append({})
        self._totals[dataloader_idx] = self._totals[dataloader_idx] + totals
        logged = self._means[dataloader_idx]
        for name, mean in _means(self._totals[dataloader_idx]).items():
            if name not in logged:
                logged[name] = EpochMean(mean.device)
            logged[name].update(mean)
        return logged

    def reduced(self, replicas: dist.ProcessGroup) -> Iterator[tuple[int, str, Tensor, bool]]:
        """Data loader, name and mean over all replicas, whose batches and names may differ, and whether this replica
        has logged it. Every rank calls this."""
        for index, totals in enumerate(gather_totals(self._totals, replicas)):
            logged = self._means[index] if index < len(self._means) else {}
            for name, mean in _means(totals).items():
                yield index, name, mean, name in logged


def _means(totals: Totals) -> dict[str, Tensor]:
    """The loss, NaN without loss tokens, and each metric."""
    metrics = {name.removeprefix(METRIC) for name in totals.pairs if name.startswith(METRIC)}
    means = totals.metrics()
    return {LOSS: totals.loss(empty=math.nan), **{name: means[name] for name in sorted(metrics)}}


class ReduceAtEpochEnd(pl.Callback):
    """Reduces the means of an evaluation before any other hook of the epoch's end reads them.

    Metrics of torchmetrics that the module has made since its set-up are reduced over replicas, too.
    """

    def _start(self, module: Any) -> None:
        module.evaluation_means.start()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sync_over_replicas(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        sync_over_replicas(pl_module)
        for name, mean in pl_module.strategy.late_metrics().items():
            pl_module.log(f"train_{name}", mean, batch_size=1)

    @override
    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        sync_over_replicas(pl_module)
        pl_module.strategy.finish_evaluation()

    def _finish(self, stage: str, trainer: pl.Trainer, module: Any) -> None:
        sync_over_replicas(module)
        module.strategy.finish_evaluation()
        several = num_loaders(trainer) > 1
        replicas = module.strategy.build_context.groups.dp
        results = trainer.callback_metrics
        for index, name, mean, logged in module.evaluation_means.reduced(replicas):
            key = f"{stage}_{name}" + (f"/dataloader_idx_{index}" if several else "")
            if not logged:  # no batch of this replica had it
                module.log(key, mean.to(module.device), add_dataloader_idx=False, batch_size=1)
            elif key in results:  # not in a sanity check, whose results Lightning drops
                results[key].copy_(mean)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish("val", trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish("test", trainer, pl_module)


def sync_over_replicas(module: torch.nn.Module) -> None:
    """Let the metrics of torchmetrics in a module gather their states from the replicas of the model.

    By default they gather from all ranks, of which those of one replica hold the same states. A metric that names its
    own ``process_group`` or ``dist_sync_fn`` keeps it.
    """
    for metric in module.modules():
        if isinstance(metric, Metric) and metric.process_group is None and metric.dist_sync_fn is None:
            metric.dist_sync_fn = gather_from_replicas


def gather_from_replicas(state: Tensor, group: Any = None) -> list[Tensor]:
    """``dist_sync_fn`` of a torchmetrics ``Metric``: ``state`` of each replica of the model, whatever their shapes.

    A function without a process group in it, so that metrics can still be copied and saved.
    """
    if group is None and core.parallel_state.model_parallel_is_initialized():
        group = core.parallel_state.get_data_parallel_group()
    return gather_all_tensors(state, group)


def warn_of_repeated_samples(loader: Any) -> None:
    """Warn if the sampler of an evaluation gives some samples to two replicas, so that means count them twice."""
    sampler = getattr(loader, "sampler", None)
    if type(sampler) is not DistributedSampler:
        return
    repeated = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
    if repeated > 0:
        rank_zero_warn(
            f"torch's DistributedSampler repeats {repeated} of {len(sampler.dataset)} samples, so that all "  # type: ignore[arg-type]
            f"{sampler.num_replicas} replicas evaluate the same number, and means count them twice. Replicas may have "
            "different numbers of batches here: set Trainer(use_distributed_sampler=False), and give the DataLoader a "
            "sampler without repeats, such as lightning.pytorch.overrides.distributed.UnrepeatedDistributedSampler."
        )


def num_loaders(trainer: pl.Trainer) -> int:
    """Data loaders of the evaluation under way."""
    batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    return len(batches)
