"""What custom losses and metrics need from other ranks. Inside fit, validate, test or predict, on every rank alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends.core import parallel_state


def average_losses_across_data_parallel_group(losses: Sequence[Tensor]) -> Tensor:
    """The mean of each loss over data-parallel replicas, ``[len(losses)]``, without gradient.

    Ranks of one pipeline stage call it together; a loss exists on the last stage alone.
    """
    averaged = torch.stack([loss.detach().clone().reshape(()) for loss in losses])
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(averaged, group=group)
    return averaged / group.size()


def gather_across_data_parallel_groups(nested: Any) -> Any:
    """Tensors of all data-parallel replicas, joined along dimension 0 in the order of replicas.

    Args:
        nested: a tensor, or lists, tuples and dicts of tensors. A tensor without dimensions counts as ``[1]``.

    Raises:
        ValueError: replicas that hold different shapes.
    """
    if isinstance(nested, Mapping):
        return {key: gather_across_data_parallel_groups(value) for key, value in nested.items()}
    if isinstance(nested, (list, tuple)):
        return type(nested)(gather_across_data_parallel_groups(value) for value in nested)
    if not torch.is_tensor(nested):
        return nested
    local = nested.detach().reshape(1) if nested.dim() == 0 else nested.detach().contiguous()
    group = parallel_state.get_data_parallel_group()
    shapes: list[Any] = [None] * group.size()
    dist.all_gather_object(shapes, tuple(local.shape), group=group)
    if len(set(shapes)) > 1:
        raise ValueError(f"Replicas hold tensors of different shapes, {shapes}. Pad them to one shape before.")
    parts = [torch.empty_like(local) for _ in shapes]
    dist.all_gather(parts, local, group=group)
    return torch.cat(parts)
