"""Tables between Hugging Face's tensors and this package's, over whole tensors.

A table is a tuple of :class:`Rule`; each says which tensors of theirs make one of ours, and how, both ways. Whole
tensors have the names and shapes of ``chunk.state_dict()`` without any parallelism;
:mod:`lightning_megatron.interop.sharding` puts them into a model of any layout.

Every change of form is one of rows: our tensor is made of runs of rows of theirs. So whole tensors go both ways, and a
rank that holds a part of ours reads just the rows and columns of theirs that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from lightning_megatron.errors import CheckpointError


class Run(NamedTuple):
    """Consecutive rows ``start`` to ``stop`` of the ``part``-th of their tensors."""

    part: int
    start: int
    stop: int


class Lazy(Protocol):
    """A tensor of which parts can be read."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole."""
        ...

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        """A part."""
        ...


class Transform:
    """A change of form that loses nothing: an order of rows, perhaps of transposed matrices."""

    transposed: ClassVar[bool] = False
    """Whether matrices of theirs are ``[inputs, outputs]``."""

    def rows(self, core: int) -> tuple[int, ...]:
        """Rows of each of theirs (transposed, if they are) that make a tensor of ours with ``core`` rows."""
        return (core,)

    def runs(self, core: int) -> Iterator[Run]:
        """Where the ``core`` rows of ours come from, in order; rows of padding, which come last, from nowhere."""
        yield Run(0, 0, core)

    def core_rows(self, theirs: Sequence[int]) -> int:
        """Rows of ours that ``theirs`` rows make."""
        return sum(theirs)

    def core_shape(self, theirs: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The shape of ours from the shapes of theirs."""
        shapes = [tuple(reversed(shape)) if self.transposed else tuple(shape) for shape in theirs]
        return (self.core_rows([shape[0] for shape in shapes]), *shapes[0][1:])

    def shapes(self, core: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes of theirs from the shape of ours."""
        shapes = [(rows, *core[1:]) for rows in self.rows(core[0])]
        return [tuple(reversed(shape)) if self.transposed else shape for shape in shapes]

    def read(self, theirs: Sequence[Lazy], place: tuple[slice, ...], into: Tensor) -> None:
        """Fill a part of ours, reading of theirs only what it is made of.

        Args:
            place: the part, in each dimension of ours.
            into: memory for it; rows that nothing of theirs makes become zero.
        """
        core = self.core_shape([part.shape for part in theirs])
        first, last = place[0].start, place[0].stop
        rest, at, filled = place[1:], 0, 0
        for run in self.runs(core[0]):
            start, stop = max(at, first), min(at + run.stop - run.start, last)
            if start < stop:
                rows = slice(run.start + start - at, run.start + stop - at)
                part = (
                    theirs[run.part][(*rest, rows)].t() if self.transposed and rest else theirs[run.part][rows, *rest]
                )
                into[start - first : stop - first].copy_(part)
                filled += stop - start
            at += run.stop - run.start
        if filled < into.size(0):
            into[filled:].zero_()

    def to_core(self, theirs: Sequence[Tensor]) -> Tensor:
        """Our tensor from theirs."""
        shape = self.core_shape([part.shape for part in theirs])
        core = theirs[0].new_empty(shape)
        self.read(theirs, tuple(slice(0, size) for size in shape), core)
        return core

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        """Their tensors from ours; views of it where rows keep their order."""
        runs, sizes = list(self.runs(core.size(0))), self.rows(core.size(0))
        if runs == [Run(0, 0, sizes[0])]:
            made = [core[: sizes[0]]]
        else:
            made = [core.new_empty((rows, *core.shape[1:])) for rows in sizes]
            at = 0
            for run in runs:
                length = run.stop - run.start
                made[run.part][run.start : run.stop].copy_(core[at : at + length])
                at += length
        return [part.t() if self.transposed and part.dim() == 2 else part for part in made]


@dataclass(frozen=True, slots=True)
class Same(Transform):
    """The same tensor."""


@dataclass(frozen=True, slots=True)
class Transposed(Transform):
    """GPT-2's ``Conv1D`` keeps ``[inputs, outputs]``, a linear layer ``[outputs, inputs]``."""

    transposed: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class QKV(Transform):
    """Separate projections to one that is ordered by query group: its queries, its key, its value.

    So any number of tensor-parallel ranks up to the groups cuts it into whole groups.
    """

    heads: int
    groups: int

    def rows(self, core: int) -> tuple[int, ...]:
        width = core // (self.heads + 2 * self.groups)
        return self.heads * width, self.groups * width, self.groups * width

    def runs(self, core: int) -> Iterator[Run]:
        for group in range(self.groups):
            for part, rows in enumerate(self.rows(core)):
                yield Run(part, group * rows // self.groups, (group + 1) * rows // self.groups)


@dataclass(frozen=True, slots=True)
class FusedQKV(Transform):
    """GPT-2's one projection ``[inputs, 3 * outputs]``, or its bias, to ours."""

    heads: int
    transposed: ClassVar[bool] = True

    def runs(self, core: int) -> Iterator[Run]:
        third = core // 3
        for part, start, stop in QKV(self.heads, self.heads).runs(core):
            yield Run(0, part * third + start, part * third + stop)


@dataclass(frozen=True, slots=True)
class KV(Transform):
    """Keys and values of cross attention, ordered by head: its key, its value."""

    heads: int

    def rows(self, core: int) -> tuple[int, ...]:
        return core // 2, core // 2

    def runs(self, core: int) -> Iterator[Run]:
        width = core // (2 * self.heads)
        for head in range(self.heads):
            for part in (0, 1):
                yield Run(part, head * width, (head + 1) * width)


@dataclass(frozen=True, slots=True)
class Stacked(Transform):
    """The gate and the values of a gated MLP, one above the other."""

    def rows(self, core: int) -> tuple[int, ...]:
        return core // 2, core // 2

    def runs(self, core: int) -> Iterator[Run]:
        yield Run(0, 0, core // 2)
        yield Run(1, 0, core // 2)


@dataclass(frozen=True, slots=True)
class PaddedVocabulary(Transform):
    """Rows of the real vocabulary, with zeros after them."""

    vocab_size: int
    padded_size: int

    def rows(self, core: int) -> tuple[int, ...]:
        return (self.vocab_size,)

    def runs(self, core: int) -> Iterator[Run]:
        yield Run(0, 0, self.vocab_size)

    def core_rows(self, theirs: Sequence[int]) -> int:
        if theirs[0] != self.vocab_size:
            raise CheckpointError(
                f"The vocabulary has {theirs[0]} rows, but vocab_size={self.vocab_size} in the configuration. Correct "
                "vocab_size in config.json."
            )
        return self.padded_size


@dataclass(frozen=True, slots=True)
class CopiedVocabulary(PaddedVocabulary):
    """Rows of the real vocabulary that two equal tensors of theirs hold; the first is read, both are written."""

    def rows(self, core: int) -> tuple[int, ...]:
        return self.vocab_size, self.vocab_size

    def to_theirs(self, core: Tensor) -> list[Tensor]:
        return [core[: self.vocab_size]] * 2


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of ours and those of theirs that make it. ``{}`` in the names stands for a layer's number."""

    core: str
    theirs: tuple[str, ...]
    transform: Transform = Same()
    layers: int | None = None
    """How many layers have it; ``None`` if the names have no number."""
    optional: bool = False
    """Whether a model of theirs may lack it, as a head that fine-tuning adds. It then keeps its initial weights."""

    def expand(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Our name and theirs, for each layer."""
        for layer in range(1 if self.layers is None else self.layers):
            yield self.core.format(layer), tuple(name.format(layer) for name in self.theirs)


def rule(
    core: str,
    *theirs: str,
    transform: Transform | None = None,
    layers: int | None = None,
    optional: bool = False,
) -> Rule:
    """A :class:`Rule`, in the fewest words."""
    return Rule(core, theirs, transform or Same(), layers, optional)


Table = tuple[Rule, ...]


class Entry(NamedTuple):
    """One tensor of a table, of one layer."""

    core: str
    theirs: tuple[str, ...]
    transform: Transform


def entries(table: Table, names: Iterable[str] | None = None) -> Iterator[Entry]:
    """All tensors of a table, layer by layer where layers come.

    Args:
        names: of theirs, if known: optional tensors that are not among them are left out.
    """
    known = None if names is None else set(names)
    numbered = [rule for rule in table if rule.layers is not None]
    first = table.index(numbered[0]) if numbered else len(table)
    expanded = {id(rule): list(rule.expand()) for rule in table}

    def of(rule: Rule, index: int) -> Iterator[Entry]:
        core, theirs = expanded[id(rule)][index]
        if not (rule.optional and known is not None and not known.issuperset(theirs)):
            yield Entry(core, theirs, rule.transform)

    for rule in table[:first]:
        yield from of(rule, 0)
    stacks = dict.fromkeys(rule.core.partition(".layers.")[0] for rule in numbered)
    for stack in stacks:
        rules = [rule for rule in numbered if rule.core.partition(".layers.")[0] == stack]
        for layer in range(max(rule.layers or 0 for rule in rules)):
            for rule in rules:
                if layer < (rule.layers or 0):
                    yield from of(rule, layer)
    for rule in table[first:]:
        if rule.layers is None:
            yield from of(rule, 0)


def check_names(table: Table, names: Iterable[str], ignore: Iterable[str] = (), *, where: Any = None) -> None:
    """Check that a table takes exactly the tensors of theirs that there are.

    Args:
        ignore: names that hold nothing of their own, such as a tied output layer.
        where: what to call the place in the message.

    Raises:
        CheckpointError: tensors that the table needs are missing, or tensors are left that it does not know.
    """
    there = set(names)
    needed = [name for entry in entries(table, there) for name in entry.theirs]
    missing = [name for name in needed if name not in there]
    left = there - set(needed) - set(ignore)
    if missing or left:
        raise CheckpointError(
            f"{where or 'The state dict'} does not fit the table of this architecture. "
            f"Missing: {_some(missing)}. Unknown: {_some(sorted(left))}. "
            "Take the files of one model of this architecture."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "none") + more


def to_core(table: Table, theirs: Mapping[str, Tensor], ignore: Sequence[str] = ()) -> dict[str, Tensor]:
    """Whole tensors of ours from a state dict of theirs.

    Args:
        ignore: names of theirs that hold nothing of their own, such as a tied output layer.

    Raises:
        CheckpointError: tensors that the table needs are missing, or tensors are left that it does not know.
    """
    check_names(table, theirs, ignore)
    return {
        entry.core: entry.transform.to_core([theirs[name] for name in entry.theirs]).contiguous()
        for entry in entries(table, theirs)
    }


def to_theirs(table: Table, core: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of theirs from whole tensors of ours.

    Raises:
        CheckpointError: tensors that the table needs are missing.
    """
    made: dict[str, Tensor] = {}
    for entry in entries(table):
        if entry.core not in core:
            raise CheckpointError(f"The table of this architecture needs {entry.core}, which the model does not have.")
        parts = entry.transform.to_theirs(core[entry.core])
        made.update({their: part.contiguous() for their, part in zip(entry.theirs, parts, strict=True)})
    return made
