"""Norms of the weights, at any layout those of the whole model."""

from __future__ import annotations

from typing import Any, override

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_megatron.backends.core import is_counted_here
from lightning_megatron.callbacks.every import EveryNSteps
from lightning_megatron.strategy import MegatronStrategy

PARTS = ("embedding", "attention", "mlp", "norm", "output", "other")


class Norms(EveryNSteps, Callback):
    """Logs ``param_norm``, the L2 norm of all weights, and ``param_norms/PART`` of embeddings, attention, MLPs, norms.

    Each weight counts once, whatever is split or held twice. The gradient's norm is ``grad_norm``, which every module
    logs in each step.

    Args:
        every_n_steps: optimizer steps between two looks; ``None`` looks as often as the Trainer logs.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)

    @override
    def look(self, trainer: pl.Trainer, pl_module: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        with strategy.gathered_weights():
            squares = sums_of_squares(strategy, pl_module.chunks)
        # Not param_norm/PART: MLflow's file store keeps a metric as a file, which cannot be a directory of others too.
        norms = {f"param_norms/{part}": value.sqrt() for part, value in zip(PARTS, squares, strict=True) if value > 0}
        pl_module.log_dict({"param_norm": squares.sum().sqrt(), **norms}, batch_size=1)


@torch.no_grad()
def sums_of_squares(strategy: MegatronStrategy, chunks: Any) -> Tensor:
    """Of the whole model's weights by part, ``[len(PARTS)]`` in fp64, the same on every rank."""
    groups = strategy.build_context.groups
    dense = torch.zeros(len(PARTS), dtype=torch.float64, device=strategy.root_device)
    experts = torch.zeros_like(dense)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if is_counted_here(parameter, groups):
                # Experts that are spread over ranks are reduced over other groups, as megatron-core's optimizer does.
                spread = not getattr(parameter, "allreduce", True)
                (experts if spread else dense)[part_of(name)] += parameter.detach().double().square().sum()
    dist.all_reduce(dense, group=groups.mp)
    dist.all_reduce(experts, group=groups.tp_ep_pp)
    return dense + experts


def part_of(name: str) -> int:
    """Index into :data:`PARTS` of a weight in megatron-core's names."""
    marks = (
        ("norm", "norm"),
        ("embedding", "embedding"),
        ("attention", "attention"),
        ("attn", "attention"),
        ("mlp", "mlp"),
        ("output_layer", "output"),
    )
    return PARTS.index(next((part for mark, part in marks if mark in name), "other"))
