"""Vocabularies with rows for added tokens, as ``resize_token_embeddings`` of transformers makes them.

A new row is the mean of the old ones: transformers draws from a normal distribution around it whose deviation is
3e-5 of the rows' own. The mean alone needs no random numbers, so that it is the same at any layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop.mapping import Lazy

_GAPS = 2**16
"""Ids without a token that a small tokenizer may have."""
_BLOCK = 2**22
"""Elements that are read at a time."""


def mean_row(rows: Lazy, count: int) -> Tensor:
    """The mean of the first ``count`` rows in fp64, reading a block of them at a time."""
    rest = tuple(slice(0, size) for size in rows.shape[1:])
    step = max(1, _BLOCK // max(1, math.prod(rows.shape[1:])))
    total = torch.zeros(tuple(rows.shape[1:]), dtype=torch.float64)
    for start in range(0, count, step):
        total += rows[(slice(start, min(start + step, count)), *rest)].sum(0, dtype=torch.float64)
    return total / count


@dataclass(frozen=True)
class ResizedTensor:
    """A stored vocabulary with further rows, of which parts can be read."""

    stored: Any
    """Has ``shape``, ``dtype``, and gives parts."""
    rows: int
    """With those that are added."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.rows, *self.stored.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored rows."""
        found: torch.dtype = self.stored.dtype
        return found

    @cached_property
    def _mean(self) -> Tensor:
        return mean_row(self.stored, self.stored.shape[0]).to(self.dtype)

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        """A part, of which the first slice is rows."""
        known, (rows, *rest) = self.stored.shape[0], place
        parts = []
        if rows.start < known:
            parts.append(self.stored[(slice(rows.start, min(rows.stop, known)), *rest)])
        if rows.stop > known:
            added = self._mean[tuple(rest)] if rest else self._mean
            parts.append(added.expand(rows.stop - max(rows.start, known), *added.shape))
        return torch.cat(parts)


def resized_to(vocab_size: Any, known: int, where: Any) -> int:
    """``vocab_size``, if a vocabulary of ``known`` tokens can be given as many.

    Raises:
        CheckpointError: it is smaller, or no whole number.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise CheckpointError(f"vocab_size={vocab_size!r:.60} is no whole number of tokens.")
    if vocab_size < known:
        raise CheckpointError(
            f"vocab_size={vocab_size}, but {where} has {known} tokens. Tokens can be added, not removed: leave "
            f"vocab_size out, or give more than {known}."
        )
    return vocab_size


def tokens_of(tokenizer: Any) -> int:
    """Rows that a vocabulary needs for a tokenizer: one above its largest id.

    Raises:
        CheckpointError: its ids have gaps that no vocabulary has.
        DataError: it cannot be loaded.
    """
    from lightning_megatron.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    vocabulary = loaded.get_vocab()
    largest = max(vocabulary.values(), default=0)
    if largest >= 2 * len(vocabulary) + _GAPS:
        raise CheckpointError(
            f"The tokenizer has {len(vocabulary):,} tokens, but ids up to {largest:,}, which its vocabulary would need "
            "rows for. Give a tokenizer whose ids have no such gaps."
        )
    return max(len(loaded), largest + 1)
