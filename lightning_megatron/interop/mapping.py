"""Tables between Hugging Face's tensors and this package's, over whole tensors.

A table is a tuple of :class:`Rule`; each says which tensors of theirs make one of ours, and how, both ways. Whole
tensors have the names and shapes of ``chunk.state_dict()`` without any parallelism;
:mod:`lightning_megatron.interop.sharding` puts them into a model of any layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_megatron.errors import CheckpointError


class Transform(Protocol):
    """A change of form that loses nothing."""

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        """Our tensor from theirs."""
        ...

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        """Their tensors from ours."""
        ...


@dataclass(frozen=True, slots=True)
class Same:
    """The same tensor."""

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0]

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        return [core]


@dataclass(frozen=True, slots=True)
class Transposed:
    """GPT-2's ``Conv1D`` keeps ``[inputs, outputs]``, a linear layer ``[outputs, inputs]``."""

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        return theirs[0].t()

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        return [core.t()]


@dataclass(frozen=True, slots=True)
class QKV:
    """Separate projections to one that is ordered by query group: its queries, its key, its value.

    So any number of tensor-parallel ranks up to the groups cuts it into whole groups.
    """

    heads: int
    groups: int

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        by_group = [part.view(self.groups, -1, *part.shape[1:]) for part in theirs]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        per_group = self.heads // self.groups
        width = core.size(0) // (self.heads + 2 * self.groups)
        by_group = core.view(self.groups, -1, *core.shape[1:])
        return [part.flatten(0, 1) for part in by_group.split([per_group * width, width, width], dim=1)]


@dataclass(frozen=True, slots=True)
class FusedQKV:
    """GPT-2's one projection ``[inputs, 3 * outputs]``, or its bias, to ours."""

    heads: int

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        fused = theirs[0].t() if theirs[0].dim() == 2 else theirs[0]
        return QKV(self.heads, self.heads).to_core(fused.chunk(3))

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        fused = torch.cat(QKV(self.heads, self.heads).to_theirs(core))
        return [fused.t() if fused.dim() == 2 else fused]


@dataclass(frozen=True, slots=True)
class KV:
    """Keys and values of cross attention, ordered by head: its key, its value."""

    heads: int

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        by_head = [part.view(self.heads, -1, *part.shape[1:]) for part in theirs]
        return torch.cat(by_head, dim=1).flatten(0, 1)

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        by_head = core.view(self.heads, -1, *core.shape[1:])
        return [part.flatten(0, 1) for part in by_head.chunk(2, dim=1)]


@dataclass(frozen=True, slots=True)
class Stacked:
    """The gate and the values of a gated MLP, one above the other."""

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(theirs))

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        return list(core.chunk(2))


@dataclass(frozen=True, slots=True)
class PaddedVocabulary:
    """Rows of the real vocabulary, with zeros after them."""

    vocab_size: int
    padded_size: int

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        padding = theirs[0].new_zeros(self.padded_size - self.vocab_size, *theirs[0].shape[1:])
        return torch.cat([theirs[0], padding])

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        return [core[: self.vocab_size]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of ours and those of theirs that make it. ``{}`` in the names stands for a layer's number."""

    core: str
    theirs: tuple[str, ...]
    transform: Transform = Same()
    layers: int | None = None
    """How many layers have it; ``None`` if the names have no number."""

    def expand(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Our name and theirs, for each layer."""
        for layer in range(1 if self.layers is None else self.layers):
            yield self.core.format(layer), tuple(name.format(layer) for name in self.theirs)


def rule(core: str, *theirs: str, transform: Transform | None = None, layers: int | None = None) -> Rule:
    """A :class:`Rule`, in the fewest words."""
    return Rule(core, theirs, transform or Same(), layers)


Table = tuple[Rule, ...]


def to_core(table: Table, theirs: Mapping[str, Tensor], ignore: Sequence[str] = ()) -> dict[str, Tensor]:
    """Whole tensors of ours from a state dict of theirs.

    Args:
        ignore: names of theirs that hold nothing of their own, such as a tied output layer.

    Raises:
        CheckpointError: tensors that the table needs are missing, or tensors are left that it does not know.
    """
    left = set(theirs) - set(ignore)
    made: dict[str, Tensor] = {}
    missing: list[str] = []
    for entry in table:
        for core, names in entry.expand():
            missing += [name for name in names if name not in theirs]
            if not missing:
                made[core] = entry.transform.to_core([theirs[name] for name in names]).contiguous()
            left -= set(names)
    if missing or left:
        raise CheckpointError(
            "The state dict does not fit the table of this architecture. "
            f"Missing: {', '.join(missing[:10]) or 'none'}. Unknown: {', '.join(sorted(left)[:10]) or 'none'}."
        )
    return made


def to_theirs(table: Table, core: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of theirs from whole tensors of ours.

    Raises:
        CheckpointError: tensors that the table needs are missing.
    """
    made: dict[str, Tensor] = {}
    for entry in table:
        for name, names in entry.expand():
            if name not in core:
                raise CheckpointError(f"The table of this architecture needs {name}, which the model does not have.")
            parts = entry.transform.to_theirs(core[name])
            made.update({their: part.contiguous() for their, part in zip(names, parts, strict=True)})
    return made
