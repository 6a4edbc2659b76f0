"""Whole tensors into the chunks of any layout, and back. What a chunk holds, its ``sharded_state_dict`` says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.core import ShardedTensor, ShardedTensorFactory
from lightning_megatron.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a whole tensor that one rank holds."""

    name: str
    """Of the whole tensor, as in ``state_dict()`` without parallelism."""
    place: tuple[slice, ...]
    """Where in the whole tensor."""
    tensor: Tensor
    """The part itself, in the memory of the chunk's parameter or buffer."""
    shape: tuple[int, ...] | None = None
    """Of the whole tensor."""


def pieces(chunk: Any) -> Iterator[Piece]:
    """Every part of a whole tensor that an unwrapped chunk holds; a copy of a tied weight comes by the first's name."""
    for local, entry in chunk.sharded_state_dict().items():
        for shard in _shards(entry):
            prepended = shard.prepend_axis_num
            offsets, shape = shard.global_offset, shard.local_shape
            name = _global_name(shard.key if shard.key.startswith("embedding.") else local, offsets[:prepended])
            place = tuple(
                slice(start, start + size)
                for start, size in zip(offsets[prepended:], shape[-shard.data.dim() :], strict=True)
            )
            yield Piece(name, place, shard.data, tuple(shard.global_shape[prepended:]))


def _shards(entry: Any) -> Iterator[ShardedTensor]:
    if isinstance(entry, ShardedTensorFactory):
        entry = entry.build()
    if isinstance(entry, ShardedTensor):
        if entry.data is not None:
            yield entry
    elif isinstance(entry, Mapping):
        for value in entry.values():
            yield from _shards(value)
    elif isinstance(entry, (list, tuple)):
        for value in entry:
            yield from _shards(value)


def _global_name(name: str, numbers: tuple[int, ...]) -> str:
    """``layers.0`` of a later stage becomes the layer's number in the model, and so an expert's."""
    for pattern, number in zip((r"(\.layers\.)\d+\.", r"(\.local_experts\.)\d+\."), numbers, strict=False):
        name = re.sub(pattern, rf"\g<1>{number}.", name, count=1)
    return name


@torch.no_grad()
def fill(chunk: Any, whole: Mapping[str, Tensor]) -> None:
    """Copy this chunk's parts out of whole tensors. Padding of the vocabulary beyond a whole tensor becomes zero.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    for piece in pieces(chunk):
        if piece.name not in whole:
            raise CheckpointError(f"There is no whole tensor {piece.name!r} for this model.")
        source = whole[piece.name]
        vocabulary = piece.name.startswith(("embedding.word_embeddings.", "output_layer."))
        fits = source.dim() == len(piece.place) and all(
            place.stop <= size or (vocabulary and dim == 0)
            for dim, (place, size) in enumerate(zip(piece.place, source.shape, strict=False))
        )
        if not fits:
            wanted = tuple(place.stop for place in piece.place)
            raise CheckpointError(
                f"The tensor {piece.name!r} has the shape {tuple(source.shape)}, but the model needs at least {wanted}."
            )
        part = source[piece.place]
        if part.shape == piece.tensor.shape:
            piece.tensor.copy_(part)
        else:
            piece.tensor.zero_()
            piece.tensor[: part.size(0)].copy_(part)


def join(parts: Iterator[Piece] | list[Piece]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all ranks."""
    parts = list(parts)
    sizes: dict[str, list[int]] = {}
    for piece in parts:
        size = sizes.setdefault(piece.name, [0] * len(piece.place))
        sizes[piece.name] = [max(a, place.stop) for a, place in zip(size, piece.place, strict=True)]
    whole: dict[str, Tensor] = {}
    for piece in parts:
        if piece.name not in whole:
            whole[piece.name] = torch.zeros(sizes[piece.name], dtype=piece.tensor.dtype)
        whole[piece.name][piece.place] = piece.tensor
    return whole
