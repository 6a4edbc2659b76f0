"""Hyperparameters of modules and data modules as plain values, which loggers and checkpoints can keep."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from types import FrameType
from typing import Any, override

from lightning.pytorch.core.mixins import HyperparametersMixin


class PlainHyperparameters(HyperparametersMixin):
    """``save_hyperparameters`` that keeps configurations as dicts.

    The configurations of this package are frozen dataclasses. Loggers of Lightning cannot write those, and a checkpoint
    with objects of a class is not loaded unless its file is trusted.
    """

    @override
    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Save the arguments of ``__init__`` to ``hparams``, configurations as dicts of their fields."""
        if frame is None:  # whose arguments they are
            current = inspect.currentframe()
            frame = None if current is None else current.f_back
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
        for name, value in self.hparams.items():
            self.hparams[name] = _plain(value)

    @property
    @override
    def hparams_initial(self) -> Any:
        """What ``save_hyperparameters`` saved, for loggers."""
        initial = super().hparams_initial
        for name, value in initial.items():
            initial[name] = _plain(value)
        return initial


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
