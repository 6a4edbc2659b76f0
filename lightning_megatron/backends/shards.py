"""Boxes: the rectangular parts of global tensors that ranks hold and files store.

A global tensor is what one process without parallelism would have. Every layout and every kind of optimizer holds boxes
of the same global tensors, which is why any of them loads any other's checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """``sizes`` elements from ``offsets`` on, in each dimension of a global tensor."""

    offsets: Sizes
    sizes: Sizes

    @property
    def numel(self) -> int:
        """Elements inside."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The common part, or ``None``."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(
            min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def view(self, tensor: Tensor, part: Box) -> Tensor:
        """The elements of ``part`` in a ``tensor`` that holds this box."""
        for dimension, (start, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
            tensor = tensor.narrow(dimension, start - self.offsets[dimension], size)
        return tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of the global tensor ``key`` and this rank's memory for it."""

    key: str
    global_shape: Sizes
    box: Box
    tensor: Tensor
    """Shape ``box.sizes``; a view of a parameter, of an optimizer's state, or of a copy of these."""
    replica: bool = False
    """Whether another model-parallel rank holds the same numbers and is the one to save them. Data-parallel replicas
    are not marked: they share the work of saving."""
    resizable: bool = False
    """Whether dimension 0 is padded to a size that depends on the layout, as vocabularies are."""


def boxes_of_range(shape: Sizes, start: int, end: int) -> Iterator[tuple[Box, int]]:
    """Cut the elements ``start`` to ``end`` of a flattened tensor into boxes; each with its first element's index.

    The distributed optimizer gives every rank such a range. It is a partial row, whole rows and a partial row, and so
    on in each dimension: at most ``2 * len(shape) - 1`` boxes.
    """
    if start >= end:
        return
    if not shape:
        yield Box((), ()), start
        return
    if len(shape) == 1:
        yield Box((start,), (end - start,)), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # inside one row
        yield from _in_row(shape, last, start, end)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield Box((first, *zeros), (last - first, *shape[1:])), first * row
    yield from _in_row(shape, last, last * row, end)


def _in_row(shape: Sizes, row: int, start: int, end: int) -> Iterator[tuple[Box, int]]:
    base = row * math.prod(shape[1:])
    for box, first in boxes_of_range(shape[1:], start - base, end - base):
        yield Box((row, *box.offsets), (1, *box.sizes)), base + first
