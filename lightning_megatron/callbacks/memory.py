"""Memory of each rank."""

from __future__ import annotations

from typing import Any, override

import lightning.pytorch as pl
import psutil
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_megatron.callbacks.every import EveryNSteps

_GIB = 2**30
_RANKS_SHOWN = 64


class MemoryByRank(EveryNSteps, Callback):
    """Logs ``memory/rank_0`` and so on in GiB, with ``memory/max`` and ``memory/min`` over ranks.

    On a GPU it is the most that tensors took since the fit began (``torch.cuda.max_memory_allocated``), on a CPU what
    the process has now. Of more than 64 ranks only the extremes are logged.

    Args:
        every_n_steps: optimizer steps between two looks; ``None`` looks as often as the Trainer logs.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)
        self.by_rank: list[float] = []
        """GiB of each rank, at the last look."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    @override
    def look(self, trainer: pl.Trainer, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        mine = torch.tensor([_used(device) / _GIB], device=device)
        everyone = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        dist.all_gather(everyone, mine)
        self.by_rank = torch.cat(everyone).tolist()
        found = {"memory/max": max(self.by_rank), "memory/min": min(self.by_rank)}
        if len(self.by_rank) <= _RANKS_SHOWN:
            found |= {f"memory/rank_{rank}": gib for rank, gib in enumerate(self.by_rank)}
        pl_module.log_dict(found, batch_size=1)


def _used(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(psutil.Process().memory_info().rss)
