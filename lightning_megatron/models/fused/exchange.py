"""Matrix products whose operands or results travel between tensor-parallel ranks while the product goes on.

Under sequence parallelism a layer gathers the tokens of all ranks before a product, and adds up the ranks' parts of the
result after another. In the first kind a rank begins with its own tokens, while those of others arrive; in the second
with the tokens of others, whose results leave while it computes its own. Nothing waits as long as a rank's share of a
product takes longer than its copy.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends.peer_memory import PeerMemory, reason_without_peer_memory

GATHER, SCATTER = 0, 1
"""Slots of the memory, which a layer uses in turn. A rank writes to a slot of its peers again only after it has heard
from them through the other slot, in which they write after they have read the first."""
LEAST_ROWS = 64
"""Rows of a rank below which a collective of NCCL takes less time than two signals."""


class Memory(Protocol):
    """See :class:`~lightning_megatron.backends.peer_memory.PeerMemory`."""

    def push(self, slot: int, parts: int, part: int, source: Tensor, peer: int) -> None: ...

    def receive(self, slot: int, parts: int, part: int, like: Tensor, peer: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum over ranks whose parts of other ranks are on their way."""

    own: Tensor
    others: list[Tensor]
    """In memory that others write to: to be read before the next product is begun."""
    leaving: list[Tensor]
    """What is being sent, whose memory must not be used for anything else until then."""
    arrived: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The sum, ``[tokens / ranks, width]``."""
        one, other = self.addends()
        return one if other is None else one.add_(other)

    def addends(self) -> tuple[Tensor, Tensor | None]:
        """Two tensors whose sum it is, for a kernel that adds them up as it reads them."""
        _wait(self.arrived)
        for other in self.others[1:]:
            self.own.add_(other)
        return self.own, self.others[0]


class Exchange:
    """Products of one tensor-parallel group under sequence parallelism. Every rank calls the same in the same order.

    Args:
        group: the ranks.
        memory: through which they read each other's rows.
        stream: for signals and copies; ``None`` on a CPU.
    """

    _known: ClassVar[dict[str, tuple[weakref.ref[Any], weakref.ref[Exchange] | str]]] = {}
    """By name of the group; layers keep the exchange itself."""

    def __init__(self, group: dist.ProcessGroup, memory: Memory, stream: torch.cuda.Stream | None) -> None:
        self._memory, self._stream = memory, stream
        self._size, self._rank = group.size(), group.rank()
        self._last = SCATTER

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> tuple[Exchange | None, str | None]:
        """The one exchange of a group, or ``None`` and why; all ranks of it ask first at the same time."""
        known, found = cls._known.get(group.group_name, (None, None))
        if known is not None and known() is group:
            exchange = None if found is None or isinstance(found, str) else found()
            if exchange is not None or isinstance(found, str):
                return exchange, found if isinstance(found, str) else None
        reason = reason_without_peer_memory(group)
        if reason is not None:
            cls._known[group.group_name] = (weakref.ref(group), reason)
            return None, reason
        # Signals are short and others wait for them, so they go before blocks of a product.
        exchange = cls(group, PeerMemory(group), torch.cuda.Stream(priority=-2))
        cls._known[group.group_name] = (weakref.ref(group), weakref.ref(exchange))
        return exchange, None

    def _beside(self) -> AbstractContextManager[object]:
        """What runs on the stream of copies, after all that has been launched so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        return self._still_beside()

    def _still_beside(self) -> AbstractContextManager[object]:
        """What goes on there, without waiting for what has been launched since."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _event(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()

    def _turn(self, slot: int) -> None:
        assert slot != self._last, "two exchanges of one kind in a row: the first may not have been read yet"
        self._last = slot

    def room(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the tokens of all ranks, and this rank's rows of it, shaped as ``like``."""
        gathered = like.new_empty(self._size * len(like), like.size(1))
        return gathered, gathered[self._rows(self._rank, len(like))]

    def gather_product(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None = None, gathered: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tokens of all ranks, and their product ``gathered @ matrix + bias``.

        Args:
            x: this rank's ``[tokens / ranks, in]``
            matrix: ``[in, out]``
            gathered: of :meth:`room`, if ``x`` is there already.

        Returns:
            ``[tokens, in]`` and ``[tokens, out]``
        """
        self._turn(GATHER)
        rows, count = len(x), self._size - 1
        copied = gathered is None
        if gathered is None:
            gathered, _ = self.room(x)
        out = x.new_empty(self._size * rows, matrix.size(1))
        received = []
        with self._beside():
            for step in range(1, self._size):
                self._memory.push(GATHER, count, step - 1, x, (self._rank + step) % self._size)
            for step in range(1, self._size):
                peer = (self._rank - step) % self._size
                part = self._memory.receive(GATHER, count, step - 1, x, peer)
                received.append((part, self._rows(peer, rows), self._event()))
        _product(x, matrix, bias, out[self._rows(self._rank, rows)])
        # The slot is written again soon, but what was gathered is read until the weight gradient.
        with self._still_beside():
            for part, where, _ in received:
                gathered[where].copy_(part)
            if copied:
                gathered[self._rows(self._rank, rows)].copy_(x)
            complete = self._event()
        for part, where, arrived in received:
            _wait(arrived)
            _product(part, matrix, bias, out[where])
        _wait(complete)
        return gathered, out

    def start_product_scatter(self, x: Tensor, matrix: Tensor) -> Sum:
        """The sum over ranks of ``x @ matrix``, this rank's tokens of it; wait for it before it is read.

        Args:
            x: ``[tokens, in]``
            matrix: ``[in, out]``
        """
        self._turn(SCATTER)
        rows, count = len(x) // self._size, self._size - 1
        own = x.new_empty(rows, matrix.size(1))
        leaving = [torch.empty_like(own) for _ in range(count)]
        for step in range(1, self._size):
            peer = (self._rank + step) % self._size
            _product(x[self._rows(peer, rows)], matrix, None, leaving[step - 1])
            with self._beside():
                self._memory.push(SCATTER, count, step - 1, leaving[step - 1], peer)
        with self._still_beside():
            others = [
                self._memory.receive(SCATTER, count, step - 1, own, (self._rank - step) % self._size)
                for step in range(1, self._size)
            ]
            arrived = self._event()
        _product(x[self._rows(self._rank, rows)], matrix, None, own)
        return Sum(own, others, leaving, arrived)

    @staticmethod
    def _rows(rank: int, rows: int) -> slice:
        return slice(rank * rows, (rank + 1) * rows)


def _wait(event: torch.cuda.Event | None) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)
