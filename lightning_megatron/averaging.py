"""Lightning's callbacks that average weights see float32 main weights where the model computes in 16 bits.

Averages of rounded weights miss small changes, and an average that is put into 16-bit parameters for a validation
would come back rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

AVERAGING = (StochasticWeightAveraging, WeightAveraging)


class _Around(pl.Callback):
    """Stands beside a callback that averages, and is called in the hooks where that one reads or replaces weights."""

    def __init__(self, averaging: pl.Callback, act: Callable[[], None]) -> None:
        self._averaging, self._act = averaging, act
        self._step = 0

    def _call(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._act()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step, self._step = self._step, trainer.global_step
        if step != trainer.global_step and _may_update(self._averaging, trainer):
            self._call(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._call(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._call(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._call(trainer)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._call(trainer)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._call(trainer)


class ShowMainWeights(_Around):
    """Called before the other."""


class HideMainWeights(_Around):
    """Called after it."""

    @override
    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        self._act()


def _may_update(averaging: pl.Callback, trainer: pl.Trainer) -> bool:
    """Whether it may read weights after this batch."""
    if not isinstance(averaging, WeightAveraging):
        return False
    asks_alone = type(averaging).should_update is EMAWeightAveraging.should_update  # which has no effects of its own
    return not asks_alone or averaging.should_update(step_idx=trainer.global_step - 1)


def show_main_weights(trainer: pl.Trainer, show: Callable[[], None], hide: Callable[[], None]) -> None:
    """Call ``show`` before and ``hide`` after the hooks of each of the trainer's callbacks that average weights.

    Args:
        show: makes parameters of the module float32 main weights; a collective of all ranks.
        hide: undoes it, if it was done.
    """
    callbacks: list[pl.Callback] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AVERAGING):
            callbacks += [ShowMainWeights(callback, show), callback, HideMainWeights(callback, hide)]
        elif not isinstance(callback, _Around):
            callbacks.append(callback)
    trainer.callbacks[:] = callbacks  # type: ignore[attr-defined]
