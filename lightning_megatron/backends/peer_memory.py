"""Memory of the GPUs of one host that the others write to directly, through torch's symmetric memory.

A copy between two GPUs by a copy engine takes no multiprocessor from the matrix products that run beside it, which a
collective of NCCL does. torch has an interface for it since 2.5 that is not public yet (``_symmetric_memory``);
multicast is not used.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

SWITCH = "LIGHTNING_MEGATRON_PEER_MEMORY"
"""Environment variable; 0 leaves all communication to NCCL."""
SLOTS = 2
_ALIGNMENT = 2**20
_TIMEOUT = timedelta(minutes=10)


def reason_without_peer_memory(group: dist.ProcessGroup) -> str | None:
    """Why the ranks of ``group`` cannot read each other's memory, in words. Every rank of it asks at the same time."""
    if dist.get_backend(group) != "nccl":
        return f"their backend is {dist.get_backend(group)}, not nccl"
    answers: list[Any] = [None] * group.size()
    dist.all_gather_object(answers, (socket.gethostname(), _here(group)), group=group)
    for rank, (host, reason) in enumerate(answers):
        if reason is not None:
            return f"rank {rank} of the tensor-parallel group: {reason}"
        if host != answers[0][0]:
            return f"tensor-parallel ranks are on the hosts {answers[0][0]} and {host}"
    return None


def _here(group: dist.ProcessGroup) -> str | None:
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0"
    try:
        import torch.distributed._symmetric_memory
    except ImportError as error:
        return f"this torch has no symmetric memory: {error}"
    device, count = torch.cuda.current_device(), torch.cuda.device_count()
    if count < group.size():
        return f"it sees {count} GPUs of the {group.size()} of the group"
    far = [other for other in range(count) if other != device and not torch.cuda.can_device_access_peer(device, other)]
    return f"GPU {device} cannot read the memory of {far}" if far else None


class PeerMemory:
    """A few slots of memory on each rank of a group, which the others write to.

    A slot has parts, one for each rank that sends. The caller sees to it that no part is written again before its
    owner has read it, and that all ranks make the same calls in the same order. What is called runs on the current
    stream, and can be captured in a CUDA graph once a size has been used before.

    Args:
        group: ranks on GPUs of one host, for which :func:`reason_without_peer_memory` has no objection.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank = group, group.rank()
        self._blocks: dict[int, Any] = {}
        self._views: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}

    def _block(self, size: int) -> Any:
        """The memory with room for ``size`` bytes in each slot; all ranks ask for a new size at the same time."""
        if size not in self._blocks:
            from torch._C._distributed_c10d import _SymmetricMemory
            from torch.distributed._symmetric_memory import rendezvous

            # Outside of torch's pool for such memory, where two tensors could share their signals.
            device = torch.device("cuda", torch.cuda.current_device())
            memory = _SymmetricMemory.empty_strided_p2p((SLOTS * size,), [1], torch.uint8, device)
            self._blocks[size] = rendezvous(memory, self._group)
        return self._blocks[size]

    def _slot(self, rank: int, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, Tensor]:
        key = (rank, slot, shape, dtype)
        if key not in self._views:
            size = -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            block = self._block(size)
            self._views[key] = block, block.get_buffer(rank, shape, dtype, slot * size // dtype.itemsize)
        return self._views[key]

    def push(self, slot: int, parts: int, part: int, source: Tensor, peer: int) -> None:
        """Copy ``source`` to a part of the peer's slot, which has so many parts, and tell the peer."""
        block, there = self._slot(peer, slot, (parts, *source.shape), source.dtype)
        there[part].copy_(source)
        block.put_signal(peer, slot, _milliseconds())

    def receive(self, slot: int, parts: int, part: int, like: Tensor, peer: int) -> Tensor:
        """Wait until ``peer`` has written its part of this rank's slot; that part, shaped as ``like``."""
        block, here = self._slot(self._rank, slot, (parts, *like.shape), like.dtype)
        block.wait_signal(peer, slot, _milliseconds())
        return here[part]


def _milliseconds() -> int:
    return int(_TIMEOUT.total_seconds() * 1000)
