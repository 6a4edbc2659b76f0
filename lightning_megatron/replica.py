"""Data for one replica of the model: one rank reads, the others of its tensor and pipeline group receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.errors import DataError
from lightning_megatron.exchange import Lockstep, ReplicaBroadcast, public
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.position import Position, PositionTracker, Resume, settled
from lightning_megatron.read_ahead import ReadAhead
from lightning_megatron.reading import END, WHOLE, LoaderHistory, Pass, set_epoch


class ReplicaGroups:
    """Host-side process groups of each model replica, over gloo, so that no device waits for the data loader."""

    def __init__(
        self,
        layout: ParallelLayout,
        world_size: int,
        rank: int,
        *,
        data_on_every_stage: bool,
        timeout: timedelta | None = None,
    ) -> None:
        self.reader = True
        """Whether this rank reads."""
        self.has_data = True
        """Whether this rank's stage gets tensors: the first and the last do, and all if the module asks for it."""
        self.all: dist.ProcessGroup | None = None
        self.data: dist.ProcessGroup | None = None
        self.readers: dist.ProcessGroup | None = None
        """The reading ranks of all replicas, if there are several."""
        self.replica = layout.coordinates(rank, world_size).data
        self.num_replicas = layout.data_parallel_size(world_size)
        everyone, with_data = self._ranks(layout, world_size, data_on_every_stage)
        mine = next(index for index, ranks in enumerate(everyone) if rank in ranks)
        self.reader = rank == everyone[mine][0]
        self.has_data = rank in with_data[mine]
        if len(everyone) > 1:
            self.readers = dist.new_group([ranks[0] for ranks in everyone], timeout=timeout, backend="gloo")
        if layout.model_parallel_size == 1:
            return
        self.all, _ = dist.new_subgroups_by_enumeration(everyone, timeout=timeout, backend="gloo")
        self.data = self.all
        if with_data != everyone:
            self.data, _ = dist.new_subgroups_by_enumeration(with_data, timeout=timeout, backend="gloo")

    @staticmethod
    def _ranks(layout: ParallelLayout, world_size: int, data_on_every_stage: bool) -> tuple[list[list[int]], ...]:
        replicas = layout.data_parallel_size(world_size)
        everyone: list[list[int]] = [[] for _ in range(replicas)]
        with_data: list[list[int]] = [[] for _ in range(replicas)]
        for rank in range(world_size):
            place = layout.coordinates(rank, world_size)
            everyone[place.data].append(rank)
            if data_on_every_stage or place.pipeline in (0, layout.pipeline_model_parallel_size - 1):
                with_data[place.data].append(rank)
        return everyone, with_data


class ReplicaDataLoader:
    """A data loader that only the first rank of each replica iterates.

    Every rank of a replica gets the same batches, the same end, and the same error if reading fails. Ranks of middle
    pipeline stages get tensors that take no memory and tell nothing but the shape. Attributes of the user's loader
    (``dataset``, ``batch_size``, ``sampler``, ...) can be read from it.

    Any iterable of dicts works. A key ``index``, the number of each sample, is kept beside what a module makes of a
    batch. The position is part of a checkpoint: a loader with ``state_after(num_batches)`` and
    ``load_state_dict`` (as those of :mod:`lightning_megatron.data`) is asked for its state; of another, the batches
    that a resumed epoch has seen are read again and dropped.

    Args:
        loader: the user's.
        groups: of this replica.
        prepare: completes a batch where it is read.
        seed: of the random states that reading draws from.
        first_epoch: of the first iteration.
        epoch: for evaluation, the epoch of each iteration; training counts its own.
        lockstep: of the replicas while they train.
        num_batches: of an epoch, if not all that ``loader`` has.
    """

    def __init__(
        self,
        loader: Any,
        groups: ReplicaGroups,
        prepare: Callable[[Any], dict[str, Any]],
        *,
        seed: int = 0,
        first_epoch: int = 0,
        epoch: Callable[[], int] | None = None,
        lockstep: Lockstep | None = None,
        num_batches: int | None = None,
    ) -> None:
        self.loader = loader
        self.groups = groups
        self._prepare = prepare
        self._seed = seed
        self._first_epoch = first_epoch
        self._evaluated_epoch = epoch
        self.lockstep = lockstep
        self.num_batches = num_batches
        self._tracker = PositionTracker(first_epoch)
        self._history = LoaderHistory()
        self._loaded: dict[str, Any] | None = None
        self._live: _Iteration | None = None
        self.ahead = ReadAhead(iter(()))
        """The iteration under way."""

    def __len__(self) -> int:
        return len(self.loader) if self.num_batches is None else self.num_batches

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "loader":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

    @property
    def first_epoch(self) -> int:
        """The epoch for which this loader was made."""
        return self._first_epoch

    @property
    def trains(self) -> bool:
        """Whether this loader counts its epochs and its position for training."""
        return self._evaluated_epoch is None

    @property
    def _iterator(self) -> Any:
        # Lightning ends the worker processes of a DataLoader through this attribute.
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator

    @property
    def worker_init_fn(self) -> Any:
        """Called in each worker; Lightning sets it after ``seed_everything(workers=True)``."""
        return self.loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self.loader.worker_init_fn = function

    # ----------------------------------------------------------------- position

    def use(self) -> None:
        """Training uses the oldest batch that it has fetched and not used."""
        self._tracker.use()
        self.ahead.use()
        if self._live is not None:
            self._live.use()

    def generator_states(self) -> dict[str, list[torch.Tensor]] | None:
        """States of the ``generator=`` of the user's loader on a reading rank: at the start of the epoch, and now."""
        now = self._history.generators_now(self.loader)
        if not now or not self.groups.reader:
            return None
        return {"start": self._history.generators_at_start or now, "now": now}

    @property
    def _count(self) -> int:
        return WHOLE if self._tracker.ended else self._tracker.read.batches

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank of every replica."""
        following = self._tracker.next
        state: dict[str, Any] = {
            "epoch": following.epoch,
            "batches": following.batches,
            "first_epoch": self._first_epoch,
            "passes": [list(entry) for entry in self._history.passes],
            "current": self._count,
        }
        if self._loaded is not None:
            state |= {key: self._loaded.get(key) for key in ("loader", "loader_again")}
        elif hasattr(self.loader, "state_after") and following.epoch == self._tracker.start.epoch:
            state["loader"] = self.loader.state_after(following.batches)
            state["loader_again"] = self.loader.state_after(max(0, following.batches - 1))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position, in the epoch that is iterated next, or that Lightning has begun to fetch."""
        state = settled(state, Resume.AFTER)
        generators = state.get("generators")
        self._first_epoch = state.get("first_epoch", self._first_epoch)
        passes = state.get("passes", ())
        self._history.restore(passes, None if generators is None else _of(generators["start"], self.groups.replica))
        self._loaded = state if state.get("loader") is not None else None
        if self._loaded is not None:
            self.loader.load_state_dict(state["loader"])
        position = Position(state["epoch"], state["batches"])
        if self._live is None or self._tracker.unused != 1:
            self._tracker.move(position)
        else:
            self._live.move(position)

    # ---------------------------------------------------------------- iteration

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.ahead = ReadAhead(_Iteration(self))
        return self.ahead

    def prepared(self, batch: Any) -> dict[str, Any]:
        """What the module makes of a batch.

        Raises:
            DataError: something else than a batch.
        """
        if batch is None:
            raise DataError("The data loader gave None in place of a batch. Does its collate_fn return the batch?")
        try:
            return _with_index(self._prepare(batch), batch)
        except DataError:
            raise
        except Exception as error:
            if isinstance(batch, Mapping):
                raise
            raise DataError(
                f"The data loader gave a {type(batch).__name__} as a batch, but a batch is a dict of tensors."
            ) from error

    def begin(self, iteration: _Iteration) -> PositionTracker:
        """Begin a pass over the data."""
        if self._evaluated_epoch is not None:
            return PositionTracker(self._evaluated_epoch())
        before, count = self._tracker.start, self._count
        if self._tracker.begin().epoch != before.epoch:
            self._history.add(count)
        else:
            self._history.rewind(self.loader)
        self._live = iteration
        return self._tracker

    def open(self, position: Position) -> Pass:
        """Begin to read at a position, on the rank that reads."""
        state, self._loaded = self._loaded, None
        restore = None if state is None else lambda: self.loader.load_state_dict(state["loader"])
        return Pass(
            self.loader,
            position.epoch,
            position.batches,
            seed=self._seed,
            history=LoaderHistory() if self._evaluated_epoch else self._history,
            restore=restore,
        )


class _Iteration(Iterator[dict[str, Any]]):
    """One iteration of a :class:`ReplicaDataLoader`. It opens the user's loader when the first batch is asked for."""

    def __init__(self, owner: ReplicaDataLoader) -> None:
        self._owner = owner
        self._groups = groups = owner.groups
        self._broadcast: ReplicaBroadcast | None = None
        if groups.all is not None:
            self._broadcast = ReplicaBroadcast(groups.all, groups.data, has_data=groups.has_data)
        self._tracker: PositionTracker | None = None
        self._pass: Pass | None = None
        self._error: Exception | None = None
        self._has_indices = False
        self._ended = False
        self._unused: dict[str, Any] | None = None

    def __next__(self) -> dict[str, Any]:
        if self._ended:
            raise StopIteration
        if self._tracker is None:
            self._tracker = self._owner.begin(self)
            self._open(self._tracker.start)
        batch = self._step(self._tracker)
        if batch is None:
            self._tracker.end()
            self._ended, self._pass = True, None
            raise StopIteration
        self._tracker.add()
        if self._owner.trains:
            self._unused = batch
        else:
            self._tracker.use()
        return batch

    def use(self) -> None:
        """Training uses the last batch."""
        self._unused = None

    def move(self, position: Position) -> None:
        """Replace the one batch that was fetched and not used by the one at ``position``.

        Lightning fetches it from a loader without a length before it has read the checkpoint, where
        ``configure_optimizers`` asks for ``estimated_stepping_batches``.
        """
        tracker, batch = self._tracker, self._unused
        assert tracker is not None
        assert batch is not None
        read = tracker.read
        if position == Position(read.epoch, read.batches - 1):
            return
        tracker.move(position)
        if position.epoch == read.epoch and position.batches >= read.batches:
            # Not from the start, to which a stream may not be able to go back.
            if self._pass is not None:
                self._pass.skip(position.batches - read.batches)
        else:
            self._open(position)
        new = self._step(tracker)
        if new is None:
            raise DataError(f"The data end before batch {position.batches}, with which the checkpoint continues.")
        tracker.add()
        batch.clear()
        batch.update(new)

    def _open(self, position: Position) -> None:
        loader = self._owner.loader
        try:
            if self._groups.reader:
                self._pass = self._owner.open(position)
            else:
                set_epoch(loader, position.epoch)
        except Exception as error:  # reported with the first batch
            self._error = error
        if self._broadcast is not None and not self._owner.trains:
            # Lightning reads the indices of predicted samples from its own batch sampler, on every rank.
            sampler: Any = getattr(loader, "batch_sampler", None)
            self._has_indices = self._broadcast.share(hasattr(sampler, "seen_batch_indices"))
            if self._has_indices and not self._groups.reader:
                iter(sampler)

    def _step(self, tracker: PositionTracker) -> dict[str, Any] | None:
        """The next batch on this rank, or ``None`` at the end."""
        batch, error = self._read(tracker) if self._groups.reader else (None, None)
        if self._owner.lockstep is not None and self._groups.reader:
            batch, error = self._owner.lockstep(batch, error, tracker.read.batches)
        if self._broadcast is not None:
            batch = self._broadcast(batch, error)
        elif error is not None:
            raise public(error)
        if batch is None:
            return None
        if self._has_indices:
            self._share_indices(tracker.read.batches)
        return _pinned(batch) if self._groups.has_data else batch

    def _read(self, tracker: PositionTracker) -> tuple[dict[str, Any] | None, Exception | None]:
        limit = self._owner.num_batches
        if self._error is not None:
            return None, self._error
        assert self._pass is not None
        try:
            if limit is not None and tracker.read.batches >= limit:
                return None, None
            batch = self._pass.next()
            return (None, None) if batch is END else (self._owner.prepared(batch), None)
        except Exception as error:
            return None, error

    def _share_indices(self, number: int) -> None:
        assert self._broadcast is not None
        seen = self._owner.loader.batch_sampler.seen_batch_indices
        mine = self._broadcast.share(seen[number] if self._groups.reader else None)
        if not self._groups.reader:
            seen.append(mine)


def _of(states: Sequence[Any], replica: int) -> Any:
    """The entry of a replica; the first one's if there were fewer replicas."""
    return states[replica] if replica < len(states) else states[0]


def _with_index(prepared: dict[str, Any], batch: Any) -> dict[str, Any]:
    """Keep a batch's ``index``, the number of each sample in its dataset, for whoever reports on samples."""
    index = batch.get("index") if isinstance(batch, Mapping) else None
    if not torch.is_tensor(index) or index.dim() != 1 or "index" in prepared:
        return prepared
    sizes = {value.size(0) for value in prepared.values() if torch.is_tensor(value) and value.dim()}
    sizes |= {len(value) for value in prepared.values() if isinstance(value, list)}
    return prepared | {"index": index} if sizes == {index.size(0)} else prepared


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """In page-locked memory where there is CUDA: copying other memory makes the host wait for the step before."""
    if not torch.cuda.is_available():
        return batch
    return {key: value.contiguous().pin_memory() if _on_host(value) else value for key, value in batch.items()}


def _on_host(value: Any) -> bool:
    return torch.is_tensor(value) and value.device.type == "cpu"
