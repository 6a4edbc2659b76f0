"""Weights that anyone may read, where megatron-core gathers them no sooner than a forward needs them.

With ``overlap_param_gather`` an optimizer step updates this rank's shards alone; the next forward gathers the others'.
Until then, and after the last step for good, the weights of a rank are in part those of the step before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LambdaCallback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from lightning_megatron.backends.groups import all_arrive

logger = logging.getLogger(__name__)

_BETWEEN_STEPS = ("on_train_batch_start", "on_train_batch_end")
_OF_MODULES = (*_BETWEEN_STEPS, "optimizer_step", "lr_scheduler_step", "training_step")
"""Hooks that can read weights after the optimizer's step and before the next forward."""
_WAIT_AFTER_AN_EXCEPTION = timedelta(seconds=5)


class CurrentWeights(pl.Callback):
    """Gathers weights before anyone else's hook can read them: at the end of epochs and of the fit, even one that an
    exception ends, and before validation. The strategy does so after each step, if :func:`read_between_steps`.

    Args:
        gather: gathers the weights; a collective of all ranks.
    """

    def __init__(self, gather: Callable[[], None]) -> None:
        self._gather = gather
        self._exceptions = 0

    @classmethod
    def join(cls, trainer: pl.Trainer, gather: Callable[[], None]) -> None:
        """Make it the first of the trainer's callbacks, whose hooks are called before those of the others."""
        others = [callback for callback in trainer.callbacks if not isinstance(callback, cls)]  # type: ignore[attr-defined]
        trainer.callbacks[:] = [cls(gather), *others]  # type: ignore[attr-defined]

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._gather()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._gather()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._gather()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gather if all ranks were stopped alike; one that fails alone must not wait for the others."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._exceptions += 1
        try:
            alike = all_arrive(f"exception/{type(exception).__name__}/{self._exceptions}", _WAIT_AFTER_AN_EXCEPTION)
            if alike:
                self._gather()
        except Exception as error:  # whatever it is, the exception that ended the fit is the one to show
            logger.warning("Weights could not be gathered after an exception: %s", error)
            return
        if not alike:
            logger.warning("The fit failed on this rank alone, so its weights are in part those before the last step.")


def read_between_steps(module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> bool:
    """Whether a callback or the module has a hook that may read weights between an optimizer step and a forward.

    One whose hooks read none says so by ``reads_weights = False``.
    """
    return _may_read(module, _OF_MODULES) or any(_may_read(callback, _BETWEEN_STEPS) for callback in callbacks)


def _may_read(reader: Any, names: Sequence[str]) -> bool:
    if not getattr(reader, "reads_weights", True):
        return False
    if isinstance(reader, (WeightAveraging, LambdaCallback)):
        return True
    hooks = (getattr(type(reader), name) for name in names)
    return any(hook.__module__.partition(".")[0] not in ("lightning", "lightning_megatron") for hook in hooks)
