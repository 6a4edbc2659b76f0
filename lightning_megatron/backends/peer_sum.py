"""Sums of small tensors over the GPUs of one host, in one kernel that reads all of them: for decoding.

A token's hidden states are a few kilobytes, for which NCCL takes longer than the product before it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends.peer_memory import reason_without_peer_memory

_LARGEST = 2**18
"""Bytes above which NCCL takes less time: each rank reads the whole tensor of every other."""
_ALIGNMENT = 16


class _SmallSum:
    def __init__(self, group_name: str) -> None:
        self._group_name = group_name
        self._buffer: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self._total(self._place(x.shape, x.dtype).copy_(x))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum of ``x @ weight.T``, which is written where the others read it."""
        place = self._place((*x.shape[:-1], weight.size(0)), x.dtype)
        torch.mm(x.flatten(0, -2), weight.t(), out=place.flatten(0, -2))
        return self._total(place)

    def _total(self, place: Tensor) -> Tensor:
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(place, "sum", self._group_name)
        return total

    def _place(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._room().view(dtype)[: math.prod(shape)].view(shape)

    def _room(self) -> Tensor:
        """Of the largest size, made when it is first used, which all ranks do at the same time."""
        if self._buffer is None:
            from torch._C._distributed_c10d import _SymmetricMemory
            from torch.distributed._symmetric_memory import rendezvous
            from torch.distributed.distributed_c10d import GroupName

            device = torch.device("cuda", torch.cuda.current_device())
            with torch.inference_mode(False):
                self._buffer = _SymmetricMemory.empty_strided_p2p((_LARGEST,), [1], torch.uint8, device)
            rendezvous(self._buffer, GroupName(self._group_name))
        return self._buffer


_known: weakref.WeakKeyDictionary[dist.ProcessGroup, _SmallSum | None] = weakref.WeakKeyDictionary()


def connect(group: dist.ProcessGroup) -> None:
    """Let :func:`all_reduce` sum small tensors of this group in one kernel, if it can. All ranks call at the same time.

    Without it, and where GPUs cannot read each other's memory, sums go through NCCL or gloo.
    """
    if group.size() > 1 and group not in _known:
        usable = reason_without_peer_memory(group) is None
        _known[group] = _SmallSum(group.group_name) if usable else None


def product(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor | None:
    """The sum over the ranks of a group of ``x @ weight.T``; ``None`` where :func:`all_reduce` has to sum it."""
    small = _known.get(group) if x.is_cuda else None
    size = x.numel() // x.size(-1) * weight.size(0) * x.element_size()
    if small is None or size > _LARGEST or size % _ALIGNMENT or not x.is_contiguous():
        return None
    return small.product(x, weight)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of a group; ``x`` is overwritten by it, or left as it is."""
    small = _known.get(group) if x.is_cuda else None
    size = x.numel() * x.element_size()
    if small is None or size > _LARGEST or size % _ALIGNMENT or not x.is_contiguous():
        dist.all_reduce(x, group=group)
        return x
    return small(x)
