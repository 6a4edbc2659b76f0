"""Saves that must not be lost, while another is being written or after one has failed, with ``when_busy="skip"``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

import lightning_megatron as lm
from lightning_megatron.callbacks import Preemption
from lightning_megatron.checkpoint import CheckpointOptions, verify
from lightning_megatron.checkpoint import saver as saver_module
from lightning_megatron.errors import CheckpointError
from tests.checkpoint.runs import make_module
from tests.helpers import SharedLoader, quiet_trainer
from tests.ranks import RankPool

LAST = 4


class _Ends(pl.Callback):
    """Begins a save that takes a while, or fails, at the step before the last, and ends the run at the last."""

    def __init__(self, directory: Path, how: str, fails: bool) -> None:
        self.directory, self.how, self.fails = directory, how, fails

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == LAST - 1:
            write = saver_module.Snapshot.write

            def slowly(snapshot: Any, team: Any) -> None:
                time.sleep(0.2)
                if self.fails:
                    raise CheckpointError("the disk is full")
                write(snapshot, team)

            saver_module.Snapshot.write = slowly
            try:
                trainer.save_checkpoint(self.directory / "before.ckpt")
            finally:
                saver_module.Snapshot.write = write
        elif trainer.global_step == LAST:
            if self.how == "exception":
                raise ArithmeticError("no more")
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            elif self.how == "stop":
                trainer.should_stop = True
                trainer.save_checkpoint(self.directory / "last.ckpt")

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.how == "train end":
            trainer.save_checkpoint(self.directory / "last.ckpt")


def _fit(directory: Path, how: str, fails: bool, world: int) -> None:
    strategy = lm.MegatronStrategy(
        tensor_model_parallel_size=world, seed=7, checkpoint=CheckpointOptions(background=True, when_busy="skip")
    )
    module = make_module()
    callbacks = [_Ends(directory, how.partition(":")[0], fails), *_HOW[how](directory)]
    steps = LAST if how == "train end" else 9
    trainer = quiet_trainer(strategy, world, max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
    with suppress(ArithmeticError, SystemExit, CheckpointError):
        trainer.fit(module, SharedLoader(module, length=160))


def _cases(directory: Path) -> None:
    for fails in (False, True):
        for how in _HOW:
            _fit(directory / f"{how}, {fails}", how, fails, 1)


def _nothing(at: Path) -> ModelCheckpoint:
    return ModelCheckpoint(at, save_top_k=0)


_HOW: dict[str, Callable[[Path], list[pl.Callback]]] = {
    "signal": lambda at: [Preemption(directory=at), _nothing(at)],
    "exception: ModelCheckpoint": lambda at: [ModelCheckpoint(at, "last", save_on_exception=True)],
    "exception: OnExceptionCheckpoint": lambda at: [OnExceptionCheckpoint(at, "last"), _nothing(at)],
    "stop": lambda at: [_nothing(at)],
    "train end": lambda at: [_nothing(at)],
}


def _step(path: Path) -> int:
    assert verify(path) == []
    return torch.load(path / "lightning.pt", weights_only=True)["global_step"]


def test_saves_at_the_end_are_made(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_cases, 1, tmp_path)
    found = {path.name: _step(path / "last.ckpt") for path in tmp_path.iterdir()}
    assert found == {f"{how}, {fails}": LAST for how in _HOW for fails in (False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "exception: ModelCheckpoint", "exception: OnExceptionCheckpoint"])
def test_saves_at_the_end_are_made_by_all_ranks(ranks: RankPool, tmp_path: Path, how: str) -> None:
    ranks.attempt(_fit, 2, tmp_path, how, False, 2)
    assert _step(tmp_path / "last.ckpt") == LAST
