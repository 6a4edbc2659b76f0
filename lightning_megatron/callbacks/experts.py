"""How evenly a mixture of experts is used."""

from __future__ import annotations

import math
from typing import Any, override

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_megatron.backends.core import Router
from lightning_megatron.callbacks.every import EveryNSteps


class ExpertBalance(EveryNSteps, Callback):
    """Logs how tokens spread over the experts of each layer since the last look; nothing for a dense model.

    ==================  ==================================================================================
    ``experts/max``     load of the fullest expert over the mean, averaged over layers; 1 is perfect balance
    ``experts/min``     load of the emptiest over the mean
    ``experts/entropy`` of the shares, over that of equal shares; 1 is perfect balance
    ``experts/idle``    experts, of all layers, that no token went to
    ==================  ==================================================================================

    Args:
        every_n_steps: optimizer steps between two looks; ``None`` looks as often as the Trainer logs.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)
        self._counts: Tensor | None = None
        self._handles: list[Any] = []
        self.shares: Tensor | None = None
        """``[layers, experts]`` at the last look: what part of a layer's tokens went to each expert."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        config = getattr(pl_module, "config", None)
        experts = getattr(config, "num_moe_experts", None)
        if not experts:
            return
        self._counts = torch.zeros(config.num_layers, experts, device=trainer.strategy.root_device)  # type: ignore[union-attr]
        routers = [module for chunk in pl_module.chunks for module in chunk.modules() if isinstance(module, Router)]
        self._handles = [router.register_forward_hook(self._count) for router in routers]

    def _count(self, router: Any, inputs: Any, output: Any) -> None:
        if router.training and self._counts is not None:
            _, chosen = output  # [tokens, experts]
            self._counts[router.layer_number - 1] += chosen.detach().sum(dim=0)

    @override
    def look(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._counts is None:
            return
        # Each rank has counted its layers and its tokens. Ranks that hold the same tokens count them all alike.
        dist.all_reduce(self._counts)
        self.shares = self._counts / self._counts.sum(dim=1, keepdim=True).clamp(min=1)
        self._counts.zero_()
        experts = self.shares.size(1)
        load = self.shares * experts
        entropy = -(self.shares * self.shares.clamp(min=1e-12).log()).sum(dim=1)
        found = {
            "experts/max": load.amax(dim=1).mean(),
            "experts/min": load.amin(dim=1).mean(),
            "experts/entropy": entropy.mean() / math.log(experts) if experts > 1 else torch.ones(()),
            "experts/idle": (self.shares == 0).sum().float(),
        }
        pl_module.log_dict(found, batch_size=1)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._counts = [], None
