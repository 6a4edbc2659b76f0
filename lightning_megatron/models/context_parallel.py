"""How a sequence is cut over context-parallel ranks: megatron-core's zigzag order.

A sequence is cut into ``2 * ranks`` chunks, of which rank ``r`` holds the ``r``-th and the ``r``-th from the end. Under
a causal mask early chunks see little and late ones much, so every rank does the same work.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def positions(length: int, device: torch.device) -> Tensor:
    """``0, 1, ...``, ``[length]``. One tensor for all layers, by whose address masks made from it are found again."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve training later
        return torch.arange(length, device=device)


@functools.cache
def zigzag_positions(length: int, ranks: int, rank: int, device: torch.device) -> Tensor:
    """Positions in the whole sequence of the tokens of one rank, ``[length / ranks]``."""
    chunk, last = length // (2 * ranks), 2 * ranks - 1 - rank
    everything = positions(length, device)
    with torch.inference_mode(False):
        return torch.cat([everything[i * chunk : (i + 1) * chunk] for i in (rank, last)])


@functools.cache
def zigzag_order(length: int, ranks: int, device: torch.device) -> Tensor:
    """Positions of all tokens in the order of their ranks, ``[length]``."""
    with torch.inference_mode(False):
        return torch.cat([zigzag_positions(length, ranks, rank, device) for rank in range(ranks)])


def cut_sequence(tensor: Tensor, ranks: int, rank: int) -> Tensor:
    """One rank's tokens of ``[batch, sequence, ...]``."""
    return tensor.index_select(1, zigzag_positions(tensor.size(1), ranks, rank, tensor.device))


def restore_sequence(gathered: Tensor, ranks: int) -> Tensor:
    """The inverse of :func:`cut_sequence` for the parts of all ranks, joined along dimension 1."""
    order = zigzag_order(gathered.size(1), ranks, gathered.device)
    return gathered.index_select(1, torch.argsort(order))
