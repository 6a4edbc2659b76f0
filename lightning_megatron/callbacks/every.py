"""Callbacks that look every few optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl


class EveryNSteps(ABC):
    """Mixin: calls :meth:`look` after every n-th optimizer step, on all ranks.

    Args:
        every_n_steps: ``None`` looks as often as the Trainer logs.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}, but must be at least 1, or None.")
        self._every_n_steps = every_n_steps
        self._seen = 0

    @abstractmethod
    def look(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look, and log; collectives are allowed."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from where the fit begins."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if this batch ended a step whose turn it is."""
        if trainer.global_step == self._seen:
            return  # gradients accumulate
        self._seen = trainer.global_step
        interval: int = self._every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval > 0 and self._seen % interval == 0:
            self.look(trainer, pl_module)
