"""Sums and weights of one step by name, reduced over the ranks that contribute to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TERM, METRIC = "term/", "metric/"
"""Prefixes of the names, so that a metric may be called as a term of the loss is."""

MAIN_TERM = "num_tokens"
"""Name of the term that ``Loss.sum`` and ``Loss.num_tokens`` are."""

ROUTER_TERM = "router_tokens"
"""Name under which ``loss_counts`` tells the tokens that pass the routers of experts, masked ones included."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Pairs ``(sum, weight)`` by name, ``[2]`` in fp64."""

    pairs: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Totals) -> Totals:
        """The sums of both, for each name that either has."""
        pairs = dict(self.pairs)
        for name, pair in other.pairs.items():
            pairs[name] = pairs[name] + pair if name in pairs else pair
        return Totals(pairs)

    @staticmethod
    def of(records: Iterable[Mapping[str, Any]], device: torch.device) -> Totals:
        """Sum what micro-batches recorded. A number without a weight weighs 1; a missing name counts nothing."""
        columns: dict[str, list[tuple[Any, Any]]] = {}
        for record in records:
            for name, value in record.items():
                columns.setdefault(name, []).append(value if isinstance(value, tuple) else (value, 1.0))
        pairs = {}
        for name, column in columns.items():
            numbers = [on_device(n, device).detach().double().reshape(()) for pair in column for n in pair]
            pairs[name] = torch.stack(numbers).view(-1, 2).sum(dim=0)
        return Totals(pairs)

    def loss(self, *, empty: float = 0.0) -> Tensor:
        """The sum over terms of sum / weight, in fp32; a term without weight adds nothing.

        Args:
            empty: the loss if no term has weight.
        """
        terms = torch.stack([pair for name, pair in self.pairs.items() if name.startswith(TERM)])
        sums, weights = terms.unbind(dim=1)
        loss = torch.where(weights != 0, sums / torch.where(weights != 0, weights, 1.0), 0.0).sum()
        return torch.where((weights != 0).any(), loss, empty).float()

    def metrics(self) -> dict[str, Tensor]:
        """sum / weight of each metric, in fp32; 0 where the weight is 0."""
        pairs = {name.removeprefix(METRIC): pair for name, pair in self.pairs.items() if name.startswith(METRIC)}
        if not pairs:
            return {}
        sums, weights = torch.stack(list(pairs.values())).unbind(dim=1)
        means = torch.where(weights != 0, sums / torch.where(weights != 0, weights, 1.0), 0.0).float()
        return dict(zip(pairs, means.unbind(), strict=True))

    def weight(self, name: str) -> Tensor:
        """The weight of a term, shape ``[]``."""
        return self.pairs[TERM + name][1]


def on_device(number: Tensor | float, device: torch.device) -> Tensor:
    """A number as a tensor. A fill, since a copy from the host would wait for all that the device has still to do."""
    return number.to(device) if torch.is_tensor(number) else torch.full((), number, device=device)


class TotalsReducer:
    """Adds up the totals of ranks that may have different names, and tells every pipeline stage.

    All ranks lay their pairs out by a list of names on which they agreed, and tell in the same message whether they
    have others. Only then do they agree on a new list, so the steady state is one reduction.

    Without a pipeline, a GPU does not wait for that message: new names, which one rank alone may have, are reported
    with the next step then, together with what that step adds to them, or by :meth:`late`. The names of the first step
    are exact.

    Args:
        group: ranks that add up; every one of them holds records of its own.
        stages: ranks of the pipeline, of which only the last holds records.
    """

    def __init__(self, group: dist.ProcessGroup, stages: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._stages, self._device = group, stages, device
        self._alone = group.size() == 1 and stages.size() == 1
        self._waits = device.type != "cuda" or stages.size() > 1
        self._names: list[str] | None = None
        self._late = Totals()
        self._told: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, totals: Totals | None) -> Totals:
        """The sums over ``group``, without names that no rank has this time.

        Args:
            totals: this rank's; ``None`` on all stages but the last.
        """
        if self._alone:
            assert totals is not None
            return totals
        if totals is not None:
            totals, self._late = totals + self._late, Totals()
        if self._names is None or self._others_had_new_names():
            self._agree(totals)
        reduced, changed = self._reduce(totals)
        if self._waits and bool(changed):
            self._agree(totals)
            reduced, _ = self._reduce(totals)
        elif not self._waits:
            assert totals is not None
            self._late = Totals({name: pair for name, pair in totals.pairs.items() if name not in reduced.pairs})
            self._told = self._tell(changed)
        return self._without_missing(reduced, totals)

    def late(self) -> Totals:
        """The sums of names that were new in the last step, of which no step has told yet. Every rank calls this."""
        late, self._late = self._late, Totals()
        if not self._others_had_new_names():
            return Totals()
        self._agree(late)
        reduced, _ = self._reduce(late)
        return self._without_missing(reduced, late)

    def _tell(self, changed: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A number of the device for the host, which has it after the event."""
        host = torch.empty((), dtype=changed.dtype, pin_memory=True)
        host.copy_(changed, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _others_had_new_names(self) -> bool:
        """Whether any rank had new names in the step before, which the device has finished or is about to."""
        if self._told is None:
            return False
        host, event = self._told
        event.synchronize()
        self._told = None
        return bool(host)

    def _agree(self, totals: Totals | None) -> None:
        """Gather the names of all ranks; each rank comes to the same list."""
        known = set(self._names or ())
        if totals is not None:
            gathered: list[Any] = [None] * self._group.size()
            dist.all_gather_object(gathered, list(totals.pairs), group=self._group)
            known |= {name for names in gathered for name in names}
        told = [sorted(known)]
        if self._stages.size() > 1:
            dist.broadcast_object_list(told, group_src=self._stages.size() - 1, group=self._stages, device=self._device)
        self._names = told[0]

    def _reduce(self, totals: Totals | None) -> tuple[Totals, Tensor]:
        names = self._names or []
        if totals is None:
            message = torch.empty(len(names) + 1, 2, dtype=torch.float64, device=self._device)
        else:
            nothing = torch.zeros(2, dtype=torch.float64, device=self._device)
            is_new = any(name not in names for name in totals.pairs)
            rows = [totals.pairs.get(name, nothing) for name in names]
            message = torch.stack([*rows, torch.full_like(nothing, float(is_new))])
            if self._group.size() > 1:
                dist.all_reduce(message, group=self._group)
        if self._stages.size() > 1:
            dist.broadcast(message, group_src=self._stages.size() - 1, group=self._stages)
        return Totals(dict(zip(names, message.unbind(), strict=False))), message[-1, 0]

    def _without_missing(self, reduced: Totals, totals: Totals | None) -> Totals:
        """Drop names without weight that this rank does not have itself: it must look, which waits for the device."""
        have = totals.pairs if totals is not None else {}
        unsure = [name for name in reduced.pairs if name.startswith(METRIC) and name not in have]
        if not unsure:
            return reduced
        weights = torch.stack([reduced.pairs[name][1] for name in unsure]).tolist()
        dropped = {name for name, weight in zip(unsure, weights, strict=True) if weight == 0}
        return Totals({name: pair for name, pair in reduced.pairs.items() if name not in dropped})


def gather_totals(totals: Sequence[Totals], group: dist.ProcessGroup) -> list[Totals]:
    """Add up lists of totals over ranks that may have different names and lengths; the host waits for all.

    Returns:
        As many totals as the longest list has, the same on every rank.
    """
    mine = [{name: pair.tolist() for name, pair in one.pairs.items()} for one in totals]
    gathered: list[Any] = [None] * group.size()
    if group.size() > 1:
        dist.all_gather_object(gathered, mine, group=group)
    else:
        gathered = [mine]
    added = [Totals() for _ in range(max(map(len, gathered), default=0))]
    for lists in gathered:
        for index, pairs in enumerate(lists):
            numbers = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in pairs.items()}
            added[index] = added[index] + Totals(numbers)
    return added
