"""Sums of small tensors over the GPUs of one host, in one kernel that reads all of them: for decoding.

A token's hidden states are a few kilobytes, for which NCCL takes longer than the product before it.
"""

from __future__ import annotations

import weakref

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
        buffer = self._room().view(x.dtype)[: x.numel()].view(x.shape)
        buffer.copy_(x)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", self._group_name)
        return total

    def _room(self) -> Tensor:
        """Of the largest size, made when it is first used, which all ranks do at the same time."""
        if self._buffer is None:
            from torch._C._distributed_c10d import _SymmetricMemory
            from torch.distributed._symmetric_memory import rendezvous

            device = torch.device("cuda", torch.cuda.current_device())
            with torch.inference_mode(False):
                self._buffer = _SymmetricMemory.empty_strided_p2p((_LARGEST,), [1], torch.uint8, device)
            rendezvous(self._buffer, self._group_name)
        return self._buffer


_known: weakref.WeakKeyDictionary[dist.ProcessGroup, _SmallSum | None] = weakref.WeakKeyDictionary()


def connect(group: dist.ProcessGroup) -> None:
    """Let :func:`all_reduce` sum small tensors of this group in one kernel, if it can. All ranks call at the same time.

    Without it, and where GPUs cannot read each other's memory, sums go through NCCL or gloo.
    """
    if group.size() > 1 and group not in _known:
        usable = reason_without_peer_memory(group) is None
        _known[group] = _SmallSum(group.group_name) if usable else None


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of a group; ``x`` is overwritten by it, or left as it is."""
    small = _known.get(group) if x.is_cuda else None
    size = x.numel() * x.element_size()
    if small is None or size > _LARGEST or size % _ALIGNMENT or not x.is_contiguous():
        dist.all_reduce(x, group=group)
        return x
    return small(x)
