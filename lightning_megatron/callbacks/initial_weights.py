"""Starts a new run from another run's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_megatron.strategy import MegatronStrategy


class InitialWeights(pl.Callback):
    """Fills weights from a checkpoint before the first step; optimizer, schedule and data begin anew.

    A run that resumes with ``ckpt_path`` takes everything from there instead.

    Args:
        checkpoint: a checkpoint directory of any layout, with or without an optimizer.
        include: patterns of names (``"decoder.*"``), of which a weight must match one to be filled.
        exclude: patterns of which it must match none.
    """

    def __init__(self, checkpoint: str | Path, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> None:
        self.checkpoint = Path(checkpoint)
        self._include, self._exclude = tuple(include), tuple(exclude)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Fill the weights.

        Raises:
            CheckpointError: a weight that was asked for is missing there or has another shape, or none was asked for.
        """
        if trainer.ckpt_path is not None:
            return
        assert isinstance(trainer.strategy, MegatronStrategy)
        names = trainer.strategy.load_weights(self.checkpoint, include=self._include, exclude=self._exclude)
        rank_zero_info(f"{len(names)} weights are from {self.checkpoint}.")
