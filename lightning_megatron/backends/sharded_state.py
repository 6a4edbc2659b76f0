"""megatron-core's description of a model's shards, as boxes of global tensors.

Modules of megatron-core say through ``sharded_state_dict`` where each of their weights lies in the global model. That
public description is all that checkpoints here take from it. Its own writing and loading of optimizers is not used: the
plain and the distributed optimizer write different names, the latter asserts before the first step, saves parameters
shifted after a padded bucket, and gives all parameters one step count (with torch's AdamW); and what it reads it
unpickles without an allow-list.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.core import ShardedObject, ShardedTensor, ShardedTensorFactory
from lightning_megatron.backends.shards import Box, Shard, Sizes, boxes_of_range


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of consecutive elements of a local weight, and the box of a global tensor that it is."""

    key: str
    global_shape: Sizes
    offsets: Sizes
    shape: Sizes
    """Without the ``prepended`` dimensions."""
    start: int
    """Index of its first element in the flattened weight."""
    prepended: int
    """Leading dimensions that only the global tensor has, such as the layer in a stack of equal layers."""
    replica: bool
    resizable: bool
    pipeline_copy: bool = False
    """Whether it is the last pipeline stage's copy of a tied embedding."""

    @property
    def name(self) -> str:
        """The key, with the layer if several share it; the same in every layout."""
        index = list(self.offsets[: self.prepended])
        return f"{self.key}{index}" if index else self.key

    def shards(self, prefix: str, flat: Tensor, start: int = 0) -> Iterator[Shard]:
        """What ``flat`` has of this piece, if it holds the elements of the flattened weight from ``start`` on."""
        length = torch.Size(self.shape).numel()
        first = max(self.start, start)
        last = min(self.start + length, start + flat.numel())
        ones, zeros = (1,) * self.prepended, (0,) * self.prepended
        for box, index in boxes_of_range(self.shape, first - self.start, last - self.start):
            at = index + self.start - start
            local = (*zeros, *box.offsets)
            sizes = (*ones, *box.sizes)
            yield Shard(
                prefix + self.key,
                self.global_shape,
                Box(tuple(a + b for a, b in zip(self.offsets, local, strict=True)), sizes),
                flat[at : at + box.numel].view(sizes),
                self.replica,
                self.resizable,
            )


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter or persistent buffer of this rank, and where it lies in the global model."""

    tensor: Tensor
    pieces: tuple[Piece, ...]

    def shards(self, prefix: str = "") -> Iterator[Shard]:
        """All of it."""
        flat = self.tensor.detach().view(-1)
        for piece in self.pieces:
            yield from piece.shards(prefix, flat)


@dataclass(frozen=True, slots=True)
class ModelState:
    """This rank's part of the model."""

    weights: tuple[Weight, ...]
    objects: dict[str, Any]
    """What is not a tensor, by its unique name; TransformerEngine's scaling factors for instance."""


def model_state(chunks: Sequence[Any], metadata: dict[str, Any]) -> ModelState:
    """The weights of all chunks (not wrapped in DDP, which would prefix every name)."""
    weights, objects = [], {}
    for chunk in chunks:
        for entry in _entries(chunk.sharded_state_dict(metadata=metadata)):
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                weights.append(Weight(entry.data, tuple(_pieces(entry))))
            elif isinstance(entry, ShardedObject) and not _is_empty(entry.data):
                objects[entry.unique_key] = entry.data
    return ModelState(tuple(weights), objects)


def _entries(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, list):
        yield state
        return
    for value in state:
        yield from _entries(value)


def _pieces(entry: Any) -> Iterator[Piece]:
    if isinstance(entry, ShardedTensorFactory):
        # Built on a tensor without memory, whose views tell which elements each part is.
        outline = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
        for part in _entries(replace(entry, data=outline).build()):
            yield _piece(part)
    else:
        yield _piece(replace(entry, data=None), start=0)


def _piece(tensor: Any, start: int | None = None) -> Piece:
    if start is None:
        if not tensor.data.is_contiguous():
            raise NotImplementedError(
                f"{tensor.key} is split along an inner dimension, which checkpoints do not cover. Let "
                "sharded_state_dict split it along its first one."
            )
        start = int(tensor.data.storage_offset())
    replica_id = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)
    return Piece(
        key=tensor.key,
        global_shape=tuple(tensor.global_shape),
        offsets=tuple(tensor.global_offset),
        shape=tuple(tensor.local_shape),
        start=start,
        prepended=tensor.prepend_axis_num,
        # (pipeline, tensor, data); see Shard.replica.
        replica=any(replica_id[:-1]),
        pipeline_copy=any(replica_id[:-2]),
        resizable=tensor.allow_shape_mismatch,
    )


def _is_empty(data: Any) -> bool:
    if data is None:
        return True
    if isinstance(data, io.BytesIO):
        return not data.getbuffer().nbytes
    return torch.is_tensor(data) and not data.numel()
