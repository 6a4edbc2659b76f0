"""Weights that are read outside of a forward, where ``overlap_param_gather`` defers gathering them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_megatron as lm
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config
from tests.models import test_t5
from tests.models.runs import Shared

SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}


def make() -> lm.GPTModule:
    return lm.GPTModule(tiny_config(num_layers=2), lm.OptimizerConfig(lr=1e-2, lr_decay_style="constant"))


def total(module: pl.LightningModule) -> float:
    """A number that any stale shard changes."""
    return sum(float((p.detach().double() * torch.arange(p.numel()).view_as(p)).sum()) for p in module.parameters())


class Reader(pl.Callback):
    """Reads in every hook where a rank's weights could be old."""

    def __init__(self, between_steps: bool) -> None:
        self.between_steps, self.seen = between_steps, []  # type: ignore[var-annotated]

    @property
    def reads_weights(self) -> bool:
        return self.between_steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.between_steps:
            self.seen.append(("batch", total(pl_module)))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(("validation", total(pl_module)))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(("epoch", total(pl_module)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(("end", total(pl_module)))


class ReadsItself(lm.GPTModule):
    """Reads its weights in each hook of its own around an optimizer step."""

    def read(self, hook: str) -> None:
        if not hasattr(self, "seen"):
            self.seen: list[tuple[str, float]] = []
        self.seen.append((hook, total(self)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.read("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.read("on_before_zero_grad")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.read("on_before_optimizer_step")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.read("optimizer_step")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.read("lr_scheduler_step")
        super().lr_scheduler_step(scheduler, metric)


class T5Reads(lm.T5Module):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.seen = [*getattr(self, "seen", []), total(self)]


class Fails(pl.Callback):
    """Raises after the third step, on all ranks or one."""

    reads_weights = False

    def __init__(self, alone: bool) -> None:
        self.alone = alone

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3 and (not self.alone or trainer.global_rank == 1):
            raise KeyError("stop")


def fit(module: Any, overlap: bool, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    strategy = lm.MegatronStrategy(**SHARDED, overlap_param_gather=overlap)
    settings: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1}
    settings |= {"num_sanity_val_steps": 1, "callbacks": list(callbacks), **options}
    trainer = quiet_trainer(strategy, 2, **settings)
    trainer.fit(module, SharedLoader(module), SharedLoader(module))
    return trainer


def reads(overlap: bool) -> dict[str, Any]:
    """Everything that reads the weights of a fit."""
    found: dict[str, Any] = {}
    for between_steps in (False, True):
        module, reader = make(), Reader(between_steps)
        fit(module, overlap, reader)
        found[f"hooks {between_steps}"] = reader.seen
    itself = ReadsItself(make().config, make().optimizer_config)
    fit(itself, overlap)
    found["hooks of the module"] = itself.seen
    found["state_dict"] = {
        name: value.double().sum().item() for name, value in module.state_dict().items() if value is not None
    }
    other = quiet_trainer(lm.MegatronStrategy(), 2)
    found["validated"] = other.validate(module, SharedLoader(module), verbose=False)
    record = Record()
    again = fit(module, False, record)
    found["second fit"] = record.losses, total(module)
    found["validated again"] = again.validate(module, SharedLoader(module), verbose=False)
    module = make()
    fit(module, overlap, precision="bf16-mixed", num_sanity_val_steps=0)
    found["bf16"] = total(module)
    module = make()
    try:  # last, since a fit that fails aborts the process's groups
        fit(module, overlap, Fails(alone=False))
    except KeyError:
        found["after an exception"] = total(module)
    return found


def alone() -> str:
    try:
        fit(make(), True, Fails(alone=True))
    except KeyError:
        return "ended"
    return "went on"


def test_weights_are_the_last_ones_wherever_they_are_read(ranks: Any) -> None:
    wanted = ranks.run(reads, 2, False)[0]
    for found in ranks.run(reads, 2, True):
        for name, value in wanted.items():
            assert found[name] == value, name


def reads_t5(overlap: bool) -> Any:
    module, record = make_t5(), Record()
    strategy = lm.MegatronStrategy(
        **SHARDED, overlap_param_gather=overlap, pipeline_model_parallel_size=2, micro_batch_size=1
    )
    trainer = quiet_trainer(strategy, 4, max_steps=4, max_epochs=1, callbacks=[record])
    trainer.fit(module, Shared(module, test_t5.batch(8), 4))
    return record.losses, module.seen, total(module)


def make_t5() -> T5Reads:
    plain = test_t5.make()
    return T5Reads(plain.config, plain.optimizer_config)


@pytest.mark.slow
def test_weights_of_a_split_t5_are_the_last_ones(ranks: Any) -> None:
    assert ranks.run(reads_t5, 4, True) == ranks.run(reads_t5, 4, False)


@pytest.mark.slow
def test_a_rank_that_fails_alone_does_not_wait(ranks: Any) -> None:
    results, errors = ranks.attempt(alone, 2, timeout=25.0)
    assert results.get(1) == "ended", errors
