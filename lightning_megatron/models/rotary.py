"""Rotary embeddings of positions that a batch gives, instead of each token's place in the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.core import RotaryEmbedding


class RotaryAtPositions(RotaryEmbedding):
    """megatron-core's rotary embedding (arXiv:2104.09864), which may be told the position of each token."""

    _positions: Tensor | None = None

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """Embed ``[batch, sequence]`` positions until the end of the block."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Angles ``[sequence, 1, 1, rotated width]``, or ``[sequence, batch, 1, rotated width]`` of given positions."""
        if self._positions is None:
            angles: Tensor = super().forward(*args, **kwargs)
            return angles
        positions = self._positions.t().to(self.inv_freq.dtype)
        if self.seq_len_interpolation_factor is not None:
            positions = positions / self.seq_len_interpolation_factor
        half = positions[..., None] * self.inv_freq.to(positions.device)
        return torch.cat([half, half], dim=-1)[:, :, None]


def in_order(positions: Tensor, documents: Tensor | None) -> bool:
    """Whether tokens that see each other stand as far apart as their positions are, so that attention by distance needs
    no positions.

    Args:
        positions: ``[batch, sequence]``
        documents: of each token, ``[batch, sequence]``; ``None`` is one document a sample.
    """
    offsets = positions - torch.arange(positions.size(1))
    if documents is None:
        return bool((offsets == offsets[:, :1]).all())
    order = documents.argsort(dim=1, stable=True)
    numbers, offsets = documents.gather(1, order), offsets.gather(1, order)
    same = numbers[:, 1:] == numbers[:, :-1]
    return not bool(((offsets[:, 1:] != offsets[:, :-1]) & same).any())
