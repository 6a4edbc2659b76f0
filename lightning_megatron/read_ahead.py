"""Batches of an accumulation window, known before the first of them is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import lightning.pytorch as pl


class ReadAhead(Iterator[dict[str, Any]]):
    """Iterates batches, and shows those that come next without handing them out."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self._batches = batches
        self._unused: deque[dict[str, Any]] = deque()
        """Handed out, of which Lightning keeps one until it knows whether it is the last."""
        self._read: deque[dict[str, Any]] = deque()

    def __next__(self) -> dict[str, Any]:
        batch = self._read.popleft() if self._read else next(self._batches)
        self._unused.append(batch)
        return batch

    def use(self) -> None:
        """Training begins with the oldest batch that was handed out and not used."""
        if self._unused:
            self._unused.popleft()

    def next_batches(self, number: int) -> list[Mapping[str, Any]]:
        """The batches after those used, at most ``number``; fewer at the end of the data."""
        missing = number - len(self._unused) - len(self._read)
        self._read.extend(islice(self._batches, max(0, missing)))
        return list(islice((*self._unused, *self._read), number))


def batches_to_come(trainer: pl.Trainer) -> int:
    """How many batches Lightning adds to the one under way before the optimizer steps, unless the data end before."""
    index, window = trainer.fit_loop.batch_idx, trainer.accumulate_grad_batches
    end = (index // window + 1) * window
    return max(0, int(min(end, trainer.num_training_batches)) - index - 1)
