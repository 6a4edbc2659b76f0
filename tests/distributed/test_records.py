"""What every rank logs: means over an evaluation, records by name, reductions of Lightning and torchmetrics."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics import CatMetric, MetricCollection, SumMetric

import lightning_megatron as lm
from lightning_megatron.data.loader import GlobalBatchLoader
from lightning_megatron.data.sampler import GlobalBatchSampler
from lightning_megatron.evaluation import warn_of_repeated_samples
from lightning_megatron.totals import Totals, TotalsReducer
from tests.helpers import SEQUENCE, plain_loader, quiet_trainer, tiny_config
from tests.models import test_bert
from tests.models.gradient_runs import Parts
from tests.models.runs import strategy
from tests.models.test_gpt import tokens
from tests.ranks import RankPool


class Rows(IterableDataset):
    """Samples of a batch, as a stream."""

    def __init__(self, batch: dict[str, torch.Tensor], rows: range) -> None:
        self.batch, self.rows = batch, rows

    def __iter__(self) -> Any:
        return iter({key: value[row] for key, value in self.batch.items()} for row in self.rows)


def data() -> dict[str, torch.Tensor]:
    """Five samples with 16, 0, 3, 16 and 9 tokens that count."""
    lengths = torch.tensor([16, 0, 3, 16, 9])
    return tokens(5, loss_mask=(torch.arange(SEQUENCE) < lengths[:, None]).float())


class Pairs(lm.GPTModule):
    """The loss as a metric with a weight, and the mean over samples of the tokens that count."""

    def loss(self, output: torch.Tensor, microbatch: dict[str, Any]) -> lm.Loss:
        loss = super().loss(output, microbatch)
        count = loss.num_tokens
        samples = torch.tensor(float(output.size(0)))
        return lm.Loss(loss.sum, count, {"again": (loss.sum.detach(), count), "length": (count, samples)})


def evaluate(batch_size: int, shares: list[list[range]]) -> Any:
    """``validate`` of streams, one for each data loader, of which this replica has its share of rows."""
    module = Pairs(tiny_config(init_method_std=0.2, num_layers=2))
    stop = EarlyStopping("val_loss" if len(shares) == 1 else "val_loss/dataloader_idx_1")
    trainer = quiet_trainer(strategy(mbs=1), int(os.environ["WORLD_SIZE"]), callbacks=[stop])
    loaders = [DataLoader(Rows(data(), rows[trainer.global_rank]), batch_size=batch_size) for rows in shares]
    results = trainer.validate(module, loaders, verbose=False)
    return results, {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_means_over_unequal_batches(ranks: RankPool) -> None:
    ((whole,), _) = ranks.run(evaluate, 1, 5, [[range(5)]])[0]
    assert whole["val_again"] == pytest.approx(whole["val_loss"], rel=1e-6)
    assert whole["val_length"] == pytest.approx(44 / 5)
    ((single,), _) = ranks.run(evaluate, 1, 1, [[range(5)]])[0]
    assert single == pytest.approx(whole, rel=1e-6)
    shares = [range(4), range(4, 5)]
    for (found,), seen in ranks.run(evaluate, 2, 2, [shares]):
        assert found == pytest.approx(whole, rel=1e-6)
        assert seen == pytest.approx(whole, rel=1e-6)
    for results, seen in ranks.run(evaluate, 2, 1, [[range(2), range(2, 3)], shares]):
        assert results[1] == pytest.approx({f"{k}/dataloader_idx_1": v for k, v in whole.items()}, rel=1e-6)
        assert results[0]["val_length/dataloader_idx_0"] == pytest.approx(19 / 3)
        assert seen == pytest.approx(results[0] | results[1], rel=1e-6)
    for _, seen in ranks.run(evaluate, 2, 2, [[range(5), range(0)]]):  # one replica has nothing
        assert seen == pytest.approx(whole, rel=1e-6)


def evaluate_bert(batch_size: int) -> float:
    module = test_bert.make(num_layers=2)
    trainer = quiet_trainer(strategy(), int(os.environ["WORLD_SIZE"]))
    batch = test_bert.batch(8) | {"next_sentence_label": torch.tensor([0, 1, -100, 1, 0, -100, -100, -100])}
    return trainer.validate(module, Parts(module, batch, 8 // batch_size), verbose=False)[0]["val_loss"]


def test_each_term_has_its_own_mean(ranks: RankPool) -> None:
    (whole,) = ranks.run(evaluate_bert, 1, 8)
    assert ranks.run(evaluate_bert, 1, 2)[0] == pytest.approx(whole, rel=1e-6)


class Named(lm.GPTModule):
    """Metrics whose order and names differ between replicas, micro-batches and steps."""

    def __init__(self) -> None:
        super().__init__(tiny_config(num_layers=2), lm.OptimizerConfig(lr=0.0))
        self.number = 0

    def loss(self, output: torch.Tensor, microbatch: dict[str, Any]) -> lm.Loss:
        loss = super().loss(output, microbatch)
        replica, number = self.strategy.data_parallel_rank, self.number
        self.number += 1
        one, two, three = (torch.tensor(value) for value in (1.0, 2.0, 3.0))
        metrics: dict[str, Any] = {"a": one, "b": two} if replica == 0 else {"b": two, "a": one}
        metrics["first" if replica == 0 else "second"] = three
        metrics["odd"] = torch.tensor(float(replica)) if number % 2 else None
        if number >= 2 and replica == self.strategy.data_parallel_size - 1:
            metrics["late"] = (two, three)
        metrics["loss"] = three  # the name of the loss itself
        return lm.Loss(loss.sum, loss.num_tokens, metrics)


def record(layout: dict[str, Any]) -> list[dict[str, float]]:
    module, seen = Named(), []

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            names = ("a", "b", "first", "second", "odd", "late", "loss")
            metrics = trainer.callback_metrics
            found = {name: float(metrics[f"train_{name}"]) for name in names if f"train_{name}" in metrics}
            seen.append(found | {"output": float(outputs["loss"])})

    trainer = quiet_trainer(strategy(mbs=2, **layout), int(os.environ["WORLD_SIZE"]), max_steps=2, callbacks=[Seen()])
    trainer.fit(module, Parts(module, tokens(8), 1, steps=2))
    return seen


@pytest.mark.parametrize("layout", [{}, {"pp": 2}])
def test_records_by_name(ranks: RankPool, layout: dict[str, Any]) -> None:
    world = 4 if layout else 2
    expected = {"a": 1.0, "b": 2.0, "first": 3.0, "second": 3.0, "odd": 0.5, "loss": 3.0}
    for first, second in ranks.run(record, world, layout):
        assert first.pop("output") > 4.0
        second.pop("output")
        assert first == pytest.approx(expected)
        assert second == pytest.approx(expected | {"late": 2 / 3})


class Event:
    """Of a device that is done."""

    def synchronize(self) -> None: ...


class WithoutWaiting(TotalsReducer):
    """As on a GPU without a pipeline."""

    def __init__(self) -> None:
        alone = dist.new_subgroups_by_enumeration([[rank] for rank in range(dist.get_world_size())])[0]
        super().__init__(dist.group.WORLD, alone, torch.device("cpu"))
        self._waits = False

    def _tell(self, changed: torch.Tensor) -> Any:
        return changed.clone(), Event()


def late() -> list[dict[str, float]]:
    """What two replicas report of two steps and after them, whose last step has a new name on one of them."""
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    reducer, rank = WithoutWaiting(), dist.get_rank()
    device, found = torch.device("cpu"), []
    for step in range(2):
        records: dict[str, Any] = {"metric/a": torch.tensor(rank + 1.0)}
        if step == 1 and rank == 1:
            records["metric/new"] = (torch.tensor(4.0), torch.tensor(2.0))
        found.append(reducer(Totals.of([records], device)).metrics())
    found += [reducer.late().metrics(), reducer.late().metrics()]
    return [{name: float(value) for name, value in metrics.items()} for metrics in found]


def test_a_name_of_the_last_step_is_not_lost(ranks: RankPool) -> None:
    for found in ranks.run(late, 2):
        assert found == [{"a": 1.5}, {"a": 1.5}, {"new": 2.0}, {}]


class Reductions(lm.GPTModule):
    """Logs what Lightning and torchmetrics reduce."""

    def __init__(self) -> None:
        super().__init__(tiny_config(num_layers=2))
        self.total, self.all = SumMetric(), CatMetric()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not hasattr(self, "lazy"):
            self.lazy = SumMetric()
        super().validation_step(batch, batch_idx, dataloader_idx)
        count, replica = batch["tokens"].size(0), float(self.strategy.data_parallel_rank)
        self.total.update(count)
        self.all.update(batch["index"].float())
        for name in ("sum", "mean", "max", "min"):
            self.log(name, replica + 1, reduce_fx=name, sync_dist=True, batch_size=1)
        self.log("samples", float(count), reduce_fx="sum", sync_dist=True)
        self.log("weighted", replica, sync_dist=True, batch_size=3 if replica else 1)
        self.log("total", self.total)
        self.lazy.update(count)
        self.later.update(count)
        self.log("later", self.later)
        self.log("lazy", self.lazy)
        self.manual["count"].update(count)

    def on_validation_start(self) -> None:
        self.later = SumMetric()
        self.manual = MetricCollection({"count": SumMetric()})

    def on_fit_start(self) -> None:
        self.seen = SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", self.seen(batch["tokens"].size(0)), on_step=True, on_epoch=False)
        self.log("seen_epoch", self.seen, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.indices = sorted(self.all.compute().int().tolist())
        self.gathered = self.all_gather(torch.tensor(self.strategy.data_parallel_rank)).tolist()
        assert "val_loss" in self.trainer.callback_metrics
        assert self.manual.compute()["count"] == 16


def reduce(layout: dict[str, Any]) -> Any:
    module = Reductions()
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]), use_distributed_sampler=True)
    results = trainer.validate(module, plain_loader(4, 16), verbose=False)[0]
    decisions = [
        trainer.strategy.reduce_boolean_decision(trainer.global_rank > 0, all=every) for every in (True, False)
    ]
    fitted = quiet_trainer(strategy(**layout), trainer.world_size, use_distributed_sampler=True, max_epochs=1)
    fitted.fit(module, plain_loader(4, 16))
    metrics = {name: float(fitted.callback_metrics[name]) for name in ("seen", "seen_epoch")}
    return results, module.indices, module.gathered, decisions, metrics


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"cp": 2}])
def test_reductions_are_over_replicas(ranks: RankPool, layout: dict[str, Any]) -> None:
    for results, indices, gathered, decisions, fitted in ranks.run(reduce, 4, layout):
        assert results["samples"] == results["total"] == 16
        assert results["later"] == results["lazy"] == 16  # metrics that are made after the set-up
        assert fitted == {"seen": 4, "seen_epoch": 16}
        assert results["sum"] == 2 * (1 + 2)  # two batches of each of two replicas
        assert (results["mean"], results["max"], results["min"]) == (1.5, 2, 1)
        assert results["weighted"] == pytest.approx(0.75)
        assert indices == list(range(16))
        assert gathered == [0, 1]
        assert decisions == [False, True]


def padded(batch_size: int) -> tuple[float, float]:
    """``val_loss`` of pre-training and of a regression, whose last batch holds padding samples."""
    losses = []
    for labels in (None, 1):
        module = test_bert.make(num_layers=2, num_labels=labels)
        batch = test_bert.batch(5)
        if labels:
            batch = {"input_ids": batch["input_ids"], "labels": torch.arange(5.0)}
        samples = [{key: value[row] for key, value in batch.items()} for row in range(5)]
        sampler = GlobalBatchSampler(5, batch_size, first_shuffled_epoch=None)
        loader = GlobalBatchLoader(samples, sampler)  # type: ignore[arg-type]
        trainer = quiet_trainer(strategy(), 1)
        losses.append(trainer.validate(module, loader, verbose=False)[0]["val_loss"])
    return losses[0], losses[1]


def test_padding_samples_do_not_count(ranks: RankPool) -> None:
    (whole,) = ranks.run(padded, 1, 5)
    assert ranks.run(padded, 1, 4)[0] == pytest.approx(whole, rel=1e-6)


def test_repeated_samples_are_named() -> None:
    sampler: Any = DistributedSampler(range(27), num_replicas=2, rank=0)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="repeats 1 of 27 samples"):
        warn_of_repeated_samples(DataLoader(range(27), sampler=sampler))  # type: ignore[arg-type]
