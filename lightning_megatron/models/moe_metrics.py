"""The auxiliary losses of a mixture of experts, which routers record layer by layer, as metrics of every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_megatron.backends.core import get_moe_metrics_tracker
from lightning_megatron.models.config import GPTConfig


class ExpertMetrics:
    """Means over layers, micro-batches and ranks of what routers record in one step, before its weight."""

    def __init__(self, config: GPTConfig) -> None:
        self._num_layers = config.num_layers
        self._names = ["load_balancing_loss"] if config.moe_aux_loss_coeff else []
        self._names += ["z_loss"] if config.moe_z_loss_coeff else []
        self._forwards = 0

    def count_forward(self) -> None:
        """Called for every forward of a chunk; routers record in training alone."""
        if torch.is_grad_enabled():
            self._forwards += 1

    def collect(self, num_chunks: int) -> dict[str, Tensor]:
        """Reduce what was recorded since the last call; every rank calls this and gets the same."""
        microbatches, self._forwards = self._forwards // num_chunks, 0
        totals: dict[str, Tensor] = {}
        get_moe_metrics_tracker().report(
            loss_scale=1 / max(microbatches, 1),
            iteration=0,
            force_initialize=True,
            track_names=self._names,
            num_layers=self._num_layers,
            total_loss_dict=totals,
        )
        return totals
