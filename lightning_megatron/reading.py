"""Passes over a user's data loader: each with random states of its own, from any position, in an order that repeats."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

END = object()
"""What :meth:`Pass.next` returns at the end of the data."""

WHOLE = -1
"""Count of a pass that was read to its end."""

_WITHOUT_STATE = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


class _RandomState:
    """States of torch's, Python's and numpy's global generators that only a data loader draws from.

    On the reading rank alone, its draws would shift the generator from which, on a CPU, all tensor-parallel ranks must
    draw the same dropout masks. And a resumed run would shuffle otherwise than the first one, whose generators had
    been used before.
    """

    def __init__(self) -> None:
        self._inner: tuple[Any, Any, Any] | None = None

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Draw from generators with this seed inside."""
        self._inner = None
        with self.inside():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Go on drawing from those generators inside."""
        outer = _get_random_state()
        if self._inner is not None:
            _set_random_state(self._inner)
        try:
            yield
        finally:
            self._inner = _get_random_state()
            _set_random_state(outer)


def _get_random_state() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_random_state(state: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def samplers_of(loader: Any) -> list[Any]:
    """The sampler, the batch sampler and the sampler inside of it, as far as ``loader`` has them, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the samplers of ``loader`` which epoch comes."""
    for sampler in samplers_of(loader):
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)


def generators_of(loader: Any) -> list[torch.Generator]:
    """The ``generator=`` that the user gave to a loader or its samplers, each once."""
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers_of(loader))]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


class LoaderHistory:
    """What happened to a loader object before its current pass, as far as the order of its samples depends on it.

    A ``generator=`` goes on from epoch to epoch, so its state is kept. So does whatever a sampler of the user's own
    keeps to itself; a resumed run lets such a sampler go through the earlier epochs again, without reading samples.
    """

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        """``[batches handed out, how many passes in a row]`` of each earlier pass; :data:`WHOLE` is to the end."""
        self.opened = False
        """Whether this process has opened the loader."""
        self.generators_at_start: list[torch.Tensor] = []
        self._restored: list[torch.Tensor] | None = None

    def generators_now(self, loader: Any) -> list[torch.Tensor]:
        """States of the user's generators."""
        if self._restored is not None:
            return self._restored
        return [generator.get_state() for generator in generators_of(loader)]

    def restore(self, passes: Sequence[Sequence[int]], generators: Sequence[torch.Tensor] | None) -> None:
        """Continue the history of another process."""
        self.passes = [list(entry) for entry in passes]
        self.opened = False
        self._restored = None if generators is None else list(generators)

    def rewind(self, loader: Any) -> None:
        """Undo what opening the loader has done to the user's generators, to open it again at the same place."""
        if self.opened:
            _set_states(loader, self.generators_at_start)

    def add(self, count: int) -> None:
        """A pass over ``count`` batches is over."""
        if self.passes and self.passes[-1][0] == count:
            self.passes[-1][1] += 1
        else:
            self.passes.append([count, 1])

    def catch_up(self, loader: Any, epoch: int, seeded: Callable[[int], Any]) -> None:
        """Bring a new loader object to where the one of the first run was before ``epoch``."""
        if self.opened:
            return
        self.opened = True
        counts = [count for count, repeats in self.passes for _ in range(repeats)]
        first, begun = epoch - len(counts), 0
        if counts and getattr(loader, "persistent_workers", False):
            # Only starting workers draws their seed, so a sampler's own draws come one earlier in later epochs.
            set_epoch(loader, first)
            with seeded(first):
                iter(loader)
            begun = 1
        if _keeps_state(loader):
            for number, count in enumerate(counts[begun:], first + begun):
                set_epoch(loader, number)
                with seeded(number):
                    _pull(loader, count)
        set_epoch(loader, epoch)
        if self._restored is not None:
            _set_states(loader, self._restored)
            self._restored = None


def _set_states(loader: Any, states: Sequence[torch.Tensor]) -> None:
    for generator, state in zip(generators_of(loader), states, strict=False):
        generator.set_state(state)


def _keeps_state(loader: Any) -> bool:
    """Whether a sampler of the user's own may go on in later epochs where the earlier ones left it."""
    return isinstance(loader, DataLoader) and any(
        type(sampler) not in _WITHOUT_STATE
        # Lightning wraps a user's sampler in a DistributedSampler; others with set_epoch depend on the epoch alone.
        and (isinstance(sampler, DistributedSampler) or not callable(getattr(sampler, "set_epoch", None)))
        and type(sampler).__module__ != DataLoader.__module__  # torch's constant sampler of iterable datasets
        for sampler in samplers_of(loader)
    )


def _pull(loader: DataLoader[Any], count: int) -> None:
    """Take from a loader's sampler what an iteration of the loader over ``count`` batches takes."""
    sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    indices = iter(sampler)
    if loader.num_workers and not loader.persistent_workers:
        indices = iter(sampler)  # torch asks twice when it starts workers
    ahead = loader.num_workers * (loader.prefetch_factor or 0)
    for _ in islice(indices, None if count == WHOLE else count + ahead):
        pass


class Pass:
    """One pass over a loader.

    Args:
        loader: any iterable of batches.
        epoch: which pass it is.
        drop: batches to leave out at the beginning.
        seed: of the random states; with ``epoch`` it makes the order.
        history: of the loader.
        restore: brings the loader to its place inside the epoch, in place of ``drop``.
    """

    def __init__(
        self,
        loader: Any,
        epoch: int,
        drop: int,
        *,
        seed: int,
        history: LoaderHistory,
        restore: Callable[[], None] | None = None,
    ) -> None:
        self._random = _RandomState()
        set_epoch(loader, epoch)
        history.catch_up(loader, epoch, lambda number: _RandomState().seeded(seed + number))
        if restore is not None:
            restore()
        history.generators_at_start = history.generators_now(loader)
        with self._random.seeded(seed + epoch):
            self._batches = iter(loader)
        self.skip(0 if restore is not None else drop)

    def skip(self, count: int) -> None:
        """Leave out ``count`` batches."""
        for _ in range(count):
            if self.next() is END:
                return

    def next(self) -> Any:
        """The next batch, or :data:`END`."""
        with self._random.inside():
            return cast(Any, next(self._batches, END))
