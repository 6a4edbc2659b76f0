"""Evaluation where replicas share experts: all of them run as many micro-batches, some of which count nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Filler(dict[str, Any]):
    """A micro-batch that a replica runs for the others alone: its outputs are dropped."""


class SharedExperts:
    """Keeps replicas together that hold parts of the same experts.

    Each of their layers sends tokens to the experts of the others, so a micro-batch needs one on every replica of the
    group. While they evaluate, replicas may have different numbers of batches, and of micro-batches in a batch. The one
    with fewer repeats its last micro-batch, and after its data have ended goes on until the others are done.

    Args:
        group: ranks of one pipeline stage, one of each replica, that share experts.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._last: dict[str, Any] | None = None
        self.shape = (0, 0)
        """Samples and sequence length of a filler."""

    def fill(self, microbatches: list[dict[str, Any]], samples: int, sequence: int) -> list[dict[str, Any]]:
        """The micro-batches of a batch, and fillers up to the most that any replica has in this step."""
        self._last, self.shape = microbatches[-1], (samples, sequence)
        most = self._agree(len(microbatches))
        return microbatches + [Filler(self._last)] * (most - len(microbatches))

    def fillers(self) -> list[dict[str, Any]]:
        """What this replica runs after its data have ended; nothing once those of all have."""
        most = self._agree(0)
        if not most:
            return []
        assert self._last is not None
        return [Filler(self._last)] * most

    def _agree(self, count: int) -> int:
        told = torch.tensor([count, self._last is None], device=self._device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        most, some_have_none = told.tolist()
        if most and some_have_none:
            self._borrow()
        return int(most)

    def _borrow(self) -> None:
        """Let replicas without any batch take a micro-batch of another."""
        mine = None if self._last is None else {k: _to(v, torch.device("cpu")) for k, v in self._last.items()}
        told: list[Any] = [None] * self._group.size()
        dist.all_gather_object(told, (mine, self.shape), group=self._group)
        if self._last is None:
            found, self.shape = next(one for one in told if one[0] is not None)
            self._last = {key: _to(value, self._device) for key, value in found.items()}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if torch.is_tensor(value) else value
