"""Throughput of training: tokens and optimizer steps per second, over the last steps."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Logs ``tokens_per_s`` (of the whole world) and ``step_time`` (seconds), averaged over ``window`` steps.

    Time spent in validation and in writing checkpoints does not count. On a GPU the host runs ahead of the device by a
    few steps at most, so the average over a window is the device's.
    """

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._started = 0.0

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sizes = [value.numel() for value in batch.values() if torch.is_tensor(value) and value.dim() > 1]
        tokens = max(sizes, default=0)
        replicas: int = getattr(trainer.strategy, "data_parallel_size", trainer.world_size)
        self._steps.append((time.perf_counter() - self._started, tokens * replicas))
        seconds = sum(step[0] for step in self._steps)
        pl_module.log("tokens_per_s", sum(step[1] for step in self._steps) / seconds, prog_bar=True, batch_size=1)
        pl_module.log("step_time", seconds / len(self._steps), batch_size=1)
