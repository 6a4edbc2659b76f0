"""Which samples a resumed run trains on: exactly those that the uninterrupted run had left."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, override

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, Sampler

import lightning_megatron as lm
from lightning_megatron.data.datamodule import GlobalBatchDataModule
from tests.helpers import Tokens, quiet_trainer, tiny_config
from tests.models.runs import strategy
from tests.ranks import RankPool

ROWS = 32


class Stream(IterableDataset):
    """Samples of this replica in order; ``shuffles`` draws from Python's generator."""

    def __init__(self, rows: int = ROWS, shuffles: bool = False, sized: bool = False) -> None:
        self.rows, self.shuffles = rows, shuffles
        self.replica, self.replicas = 0, 1

    @override
    def __iter__(self) -> Iterator[Any]:
        samples, order = Tokens(self.rows), list(range(self.rows))
        if self.shuffles:
            random.shuffle(order)
        info = torch.utils.data.get_worker_info()
        part, parts = (0, 1) if info is None else (info.id, info.num_workers)
        for index in order[self.replica :: self.replicas][part::parts]:
            yield samples[index]


class OwnSampler(Sampler):
    """Keeps the generator of its order to itself, from epoch to epoch."""

    def __init__(self) -> None:
        self.random = random.Random(7)

    def __len__(self) -> int:
        return ROWS

    @override
    def __iter__(self) -> Iterator[int]:
        order = list(range(ROWS))
        self.random.shuffle(order)
        return iter(order)


class GlobalSampler(OwnSampler):
    """Draws from Python's and numpy's global generators."""

    @override
    def __iter__(self) -> Iterator[int]:
        order = list(range(ROWS))
        random.shuffle(order)
        yield from np.random.permutation(order).tolist()


class Rows(GlobalBatchDataModule):
    """A data module of the package's kind."""

    @override
    def setup(self, stage: str) -> None:
        self.datasets = {"train": Tokens(ROWS), "valid": Tokens(8)}


def _stream(**options: Any) -> DataLoader:
    workers = FORK if options.pop("workers", False) else {}
    return DataLoader(Stream(**options), batch_size=4, **workers)


def _loader(**options: Any) -> DataLoader:
    return DataLoader(Tokens(ROWS), batch_size=4, **options)


FORK = {"num_workers": 2, "multiprocessing_context": "fork"}  # the pool's own method takes seconds for each worker
WORKERS = {**FORK, "persistent_workers": True}
LOADERS: dict[str, Callable[[], Any]] = {
    "in order": _loader,
    "shuffled": lambda: _loader(shuffle=True),
    "workers": lambda: _loader(shuffle=True, **FORK),
    "persistent workers": lambda: _loader(shuffle=True, **WORKERS),
    "generator": lambda: _loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "persistent generator": lambda: _loader(shuffle=True, generator=torch.Generator().manual_seed(3), **WORKERS),
    "own sampler": lambda: _loader(sampler=OwnSampler()),
    "own sampler, workers": lambda: _loader(sampler=OwnSampler(), **FORK),
    "own sampler, persistent": lambda: _loader(sampler=OwnSampler(), **WORKERS),
    "global sampler": lambda: _loader(sampler=GlobalSampler()),
    "global sampler, persistent": lambda: _loader(sampler=GlobalSampler(), **WORKERS),
    "stream": _stream,
    "shuffled stream": lambda: _stream(shuffles=True),
    "stream, workers": lambda: _stream(workers=True),
    "module": lambda: Rows(global_batch_size=8, num_workers=0),
    "module, workers": lambda: Rows(global_batch_size=8, num_workers=2),
    "two": lambda: CombinedLoader(
        {"a": _loader(shuffle=True), "b": DataLoader(Tokens(12), 4, shuffle=True)}, "max_size_cycle"
    ),
    "shorter": lambda: CombinedLoader(
        {"a": _loader(shuffle=True), "b": DataLoader(Tokens(12), 4, shuffle=True)}, "min_size"
    ),
}


@dataclass(frozen=True)
class Case:
    """A run of a few epochs that saves once."""

    loader: str = "shuffled"
    layout: dict[str, Any] = field(default_factory=dict)
    hook: str = "on_train_batch_end"
    after: int = 11
    """Batches that were trained on when it saves."""
    trainer: dict[str, Any] = field(default_factory=lambda: {"max_epochs": 4})
    skip: int | None = None
    """Batch of an epoch before which the user ends it."""
    validate: bool = False
    sharded: bool = True
    """Whether Lightning's distributed sampler shares the samples among replicas."""


class Trained(lm.GPTModule):
    """Numbers of the samples of each step; of a dict of loaders it trains on the first."""

    def __init__(self, case: Case) -> None:
        super().__init__(
            tiny_config(num_layers=2, hidden_size=16, num_attention_heads=2), lm.OptimizerConfig(lr_decay_steps=99)
        )
        self.case = case
        self.seen: list[Any] = []

    @override
    def configure_optimizers(self) -> Any:
        _ = self.trainer.estimated_stepping_batches  # makes the loaders before the checkpoint is read
        return super().configure_optimizers()

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.case.skip else None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batches = batch if "tokens" not in batch else {"": batch}
        self.seen.append([part["index"].tolist() for part in batches.values()])
        return super().training_step(next(iter(batches.values())), batch_idx)


class Save(pl.Callback):
    """Saves once, when as many batches were trained on."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case, self.path, self.saved = case, path, -1

    def at(self, hook: str, trainer: pl.Trainer, module: Any) -> None:
        if (
            hook == self.case.hook
            and self.saved < 0
            and len(module.seen) >= self.case.after
            and not trainer.sanity_checking
        ):
            self.saved = len(module.seen)
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.at("on_train_batch_start", trainer, pl_module)

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.at("inside", trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.at("on_train_batch_end", trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.at("on_validation_end", trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.at("on_train_epoch_end", trainer, pl_module)


def _fit(case: Case, callbacks: list[pl.Callback], path: Path | None) -> list[Any]:
    world = int(os.environ["WORLD_SIZE"])
    module, data = Trained(case), LOADERS[case.loader]()
    trainer = quiet_trainer(
        strategy(**case.layout),
        world,
        callbacks=callbacks,
        **({"use_distributed_sampler": case.sharded} | case.trainer),
    )
    if isinstance(data, DataLoader) and isinstance(data.dataset, Stream):
        place = trainer.strategy.layout.coordinates(trainer.global_rank, world)
        data.dataset.replica, data.dataset.replicas = place.data, trainer.strategy.data_parallel_size
    validation = DataLoader(Tokens(8), 4, shuffle=True) if case.validate and case.loader[:6] != "module" else None
    trainer.fit(module, data, validation, ckpt_path=path)
    return module.seen


def resumed(cases: list[Case], directory: Path) -> list[tuple[int, list[Any], list[Any]]]:
    """For each case: batches before the save, those of the whole run, and those of the run that resumed."""
    multiprocessing.current_process()._config["daemon"] = False  # the pool's processes may have no workers otherwise
    results = []
    for number, case in enumerate(cases):
        save = Save(case, directory / str(number))
        whole = _fit(case, [save], None)
        assert save.saved >= 0, case
        results.append((save.saved, whole, _fit(case, [], save.path)))
    return results


def check(cases: list[Case], results: list[Any]) -> list[str]:
    """What a rank read otherwise than the uninterrupted run."""
    problems = []
    for rank, result in enumerate(results):
        for case, (saved, whole, rest) in zip(cases, result, strict=True):
            again = saved - 1 if case.hook == "inside" else saved
            if rest != whole[again:]:
                problems.append(f"rank {rank}, {case}, saved after {saved}:\n  {whole[again:]}\n  {rest}")
    return problems


BATCH_END, EPOCH_END = "on_train_batch_end", "on_train_epoch_end"
LIMIT = {"max_epochs": 4, "limit_train_batches": 3}
RELOAD = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
RELOAD_2 = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 2}
VALIDATE = {"max_epochs": 3, "val_check_interval": 4, "num_sanity_val_steps": 1}
OVERFIT = {"max_epochs": 4, "overfit_batches": 2}
MAIN = ("shuffled", "stream", "module")


def _sweep() -> list[Case]:
    cases = [Case(loader) for loader in LOADERS]
    for loader in (*MAIN, "two"):
        cases += [Case(loader, trainer=LIMIT, after=n, hook=h) for n in (4, 6) for h in (BATCH_END, EPOCH_END)]
        cases += [Case(loader, after=n, hook=h) for n in (8, 16) for h in (BATCH_END, EPOCH_END)]
    for loader in MAIN:
        cases += [Case(loader, skip=3, after=n, hook=h) for n in (4, 6) for h in (BATCH_END, EPOCH_END)]
        cases += [Case(loader, after=12, hook=hook) for hook in ("inside", "on_train_batch_start")]
        cases += [Case(loader, after=12, hook="on_validation_end", validate=True, trainer=VALIDATE)]
    for loader in ("in order", "shuffled", "stream"):
        cases += [Case(loader, trainer=OVERFIT, after=4, hook=hook) for hook in (BATCH_END, EPOCH_END)]
    for loader in (*MAIN, "persistent workers", "generator"):
        cases += [Case(loader, after=12, trainer=RELOAD), Case(loader, after=16, hook=EPOCH_END, trainer=RELOAD)]
    for loader in (*MAIN, "persistent workers", "generator"):
        epoch = 4 if loader == "module" else 8
        ends = ((2 * epoch, EPOCH_END), (2 * epoch + 3, BATCH_END), (3 * epoch, EPOCH_END))
        cases += [Case(loader, after=n, hook=h, trainer=RELOAD_2) for n, h in ends]
    for loader in (*MAIN, "persistent workers", "own sampler"):
        cases += [Case(loader, after=12, trainer={"max_steps": 20})]
    return cases


def _of_two(layout: dict[str, Any]) -> list[Case]:
    epoch = 8 if layout else 4
    cases = [Case(loader, layout, after=epoch + 3) for loader in LOADERS]
    for loader in MAIN:
        cases += [Case(loader, layout, trainer=LIMIT, after=n, hook=h) for n in (4, 6) for h in (BATCH_END, EPOCH_END)]
        cases += [Case(loader, layout, after=2 * epoch, hook=hook) for hook in (BATCH_END, EPOCH_END)]
    cases += [Case(loader, layout, after=10, sharded=False) for loader in ("generator", "own sampler")]
    return cases


QUICK = [
    Case("shuffled", trainer=LIMIT, after=4),
    Case("shuffled", trainer=LIMIT, after=6, hook=EPOCH_END),
    Case("stream", after=6, trainer={"max_epochs": 2}),
    Case("stream", trainer=LIMIT, after=4),
    Case("module", skip=3, after=5),
    Case("module", after=8, hook=EPOCH_END, trainer={"max_epochs": 3}),
    Case("generator", trainer={"max_epochs": 2}),
    Case("own sampler", trainer={"max_epochs": 2}),
    Case("global sampler", trainer={"max_epochs": 2}),
    Case("two", trainer={"max_epochs": 2}),
    Case("shuffled", after=6, hook="inside", trainer={"max_steps": 9}),
    Case("generator", after=24, hook=EPOCH_END, trainer=RELOAD_2),
]


def test_a_resumed_run_trains_on_the_samples_that_are_left(ranks: RankPool, tmp_path: Path) -> None:
    assert not check(QUICK, ranks.run(resumed, 1, QUICK, tmp_path))


def test_replicas_and_tensor_parallel_ranks_resume_alike(ranks: RankPool, tmp_path: Path) -> None:
    cases = [
        Case("shuffled", trainer=LIMIT, after=4),
        Case("stream", after=6, trainer={"max_epochs": 2}),
        Case("shuffled", {"tp": 2}, trainer=LIMIT, after=4),
        Case("generator", {"tp": 2}, trainer={"max_epochs": 2}, sharded=False),
    ]
    assert not check(cases, ranks.run(resumed, 2, cases, tmp_path))


@pytest.mark.skipif(os.environ.get("LONG_TESTS") != "1", reason="half an hour of fits; LONG_TESTS=1 runs it")
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("world", "layout"), [(1, None), (2, {}), (2, {"tp": 2})])
def test_every_kind_of_loader_and_cut(
    ranks: RankPool, tmp_path: Path, world: int, layout: dict[str, Any] | None
) -> None:
    cases = _sweep() if layout is None else _of_two(layout)
    for start in range(0, len(cases), 10):
        part = cases[start : start + 10]
        results = ranks.run(resumed, world, part, tmp_path / str(start), timeout=600)
        assert not check(part, results)


def test_each_sample_once_an_epoch(ranks: RankPool, tmp_path: Path) -> None:
    cases = [Case("shuffled", after=5, trainer={"max_epochs": 2})]
    ((_, whole, _),), ((_, other, _),) = ranks.run(resumed, 2, cases, tmp_path)
    for epoch in range(2):
        steps = whole[epoch * 4 : epoch * 4 + 4] + other[epoch * 4 : epoch * 4 + 4]
        assert sorted(index for step in steps for part in step for index in part) == list(range(ROWS))
