"""Data for one replica of the model: one rank reads, the others of its tensor and pipeline group receive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.errors import DataError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.read_ahead import ReadAhead

_STOP, _SAME, _NEW, _ERROR = range(4)
_Schema = list[tuple[str, tuple[int, ...], torch.dtype]]


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
        if layout.model_parallel_size == 1:
            return
        everyone, with_data = self._ranks(layout, world_size, data_on_every_stage)
        mine = next(index for index, ranks in enumerate(everyone) if rank in ranks)
        self.reader = rank == everyone[mine][0]
        self.has_data = rank in with_data[mine]
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
    pipeline stages get tensors that take no memory and tell nothing but the shape.

    Any iterable of dicts works. A key ``index``, the number of each sample, is kept beside what a module makes of a
    batch. The position is part of a checkpoint: a loader with ``state_after(num_batches)`` and
    ``load_state_dict`` (as those of :mod:`lightning_megatron.data`) is asked for its state; of another, the batches
    that a resumed epoch has seen are read again and dropped.
    """

    def __init__(
        self,
        loader: Any,
        groups: ReplicaGroups,
        prepare: Callable[[Mapping[str, Any]], dict[str, Any]],
        *,
        seed: int = 0,
        first_epoch: int = 0,
    ) -> None:
        self.loader = loader
        self._groups = groups
        self._prepare = prepare
        self._seed = seed
        self._epoch = first_epoch - 1
        self._batches = 0
        self._resumed = 0
        self._to_drop = 0
        self._exhausted = False
        self.ahead = ReadAhead(iter(()))
        """The iteration under way."""

    def __len__(self) -> int:
        return len(self.loader)

    # Neither `sampler` nor `batch_sampler`, whose epoch Lightning would set to its count of epochs. That count goes up
    # when max_steps ends a fit inside an epoch, and a run that resumes there would read the rest of another epoch.
    def _set_epoch(self) -> None:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        samplers = (getattr(self.loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        for sampler in {id(sampler): sampler for sampler in samplers}.values():
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self._epoch)

    # ----------------------------------------------------------------- position

    @property
    def _sized(self) -> bool:
        try:
            return len(self.loader) < math.inf
        except TypeError:
            return False

    @property
    def consumed_batches(self) -> int:
        """Batches of this epoch that the training loop has used."""
        if self._exhausted:
            return 0  # the next epoch begins at its start
        # Lightning reads one batch ahead of a loader whose end it cannot know.
        ahead = 0 if self._sized else 1
        consumed = max(0, self._batches - ahead)
        return 0 if self._sized and consumed >= len(self) else consumed

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank of every replica."""
        consumed = self.consumed_batches
        # The epoch under way, or the one before that which comes next.
        state: dict[str, Any] = {"consumed_batches": consumed, "epoch": self._epoch if consumed else self._epoch + 1}
        if hasattr(self.loader, "state_after"):
            state["loader"] = self.loader.state_after(consumed)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position, in the epoch that is iterated next."""
        self._resumed = state["consumed_batches"]
        self._epoch = state["epoch"] - 1
        if "loader" in state:
            self.loader.load_state_dict(state["loader"])
        else:
            self._to_drop = self._resumed

    # ---------------------------------------------------------------- iteration

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.ahead = ReadAhead(self._iterate())
        return self.ahead

    def _iterate(self) -> Iterator[dict[str, Any]]:
        self._batches, self._resumed = self._resumed, 0
        drop, self._to_drop = self._to_drop, 0
        self._exhausted = False
        self._epoch += 1
        self._set_epoch()
        source = _with_own_generator(self.loader, drop, self._seed + self._epoch) if self._groups.reader else None
        exchange = _Exchange(self._groups) if self._groups.all is not None else None
        while True:
            batch, error = self._next(source)
            if exchange is not None:
                batch = exchange(batch, error)
            elif error is not None:
                raise error
            if batch is None:
                break
            self._batches += 1
            yield _pinned(batch) if self._groups.has_data else batch
        self._exhausted = True

    def _next(self, source: Iterator[Mapping[str, Any]] | None) -> tuple[dict[str, Any] | None, Exception | None]:
        if source is None:
            return None, None
        try:
            batch = next(source)
            return _with_index(self._prepare(batch), batch), None
        except StopIteration:
            return None, None
        except Exception as error:
            return None, error


def _with_index(prepared: dict[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a batch's ``index``, the number of each sample in its dataset, for whoever reports on samples."""
    index = batch.get("index") if isinstance(batch, Mapping) else None
    if not torch.is_tensor(index) or index.dim() != 1 or "index" in prepared:
        return prepared
    sizes = {value.size(0) for value in prepared.values() if torch.is_tensor(value) and value.dim()}
    return prepared | {"index": index} if sizes == {index.size(0)} else prepared


def _with_own_generator(loader: Any, drop: int, seed: int) -> Iterator[Any]:
    """The batches of ``loader`` after the first ``drop``, read with a random state that the model never sees.

    A DataLoader draws from torch's generator, at least a seed for its workers. On the reading rank alone that would
    shift the generator from which, on a CPU, all tensor-parallel ranks must draw the same dropout masks. The seed is
    that of the epoch, so that a resumed one has the order it had.
    """
    outer = torch.get_rng_state()
    torch.manual_seed(seed)
    batches = islice(iter(loader), drop, None)
    while True:
        try:
            batch = next(batches, None)
        finally:
            inner = torch.get_rng_state()
            torch.set_rng_state(outer)
        if batch is None:
            return
        yield batch
        outer = torch.get_rng_state()
        torch.set_rng_state(inner)


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """In page-locked memory where there is CUDA: copying other memory makes the host wait for the step before."""
    if not torch.cuda.is_available():
        return batch
    return {key: value.contiguous().pin_memory() if _on_host(value) else value for key, value in batch.items()}


def _on_host(value: Any) -> bool:
    return torch.is_tensor(value) and value.device.type == "cpu"


class _Exchange:
    """Tells a replica, step by step, what comes; then what it looks like, if that is new; then the bytes."""

    def __init__(self, groups: ReplicaGroups) -> None:
        self._groups = groups
        self._schema: _Schema = []
        self._extras: dict[str, Any] = {}

    def __call__(self, batch: dict[str, Any] | None, error: Exception | None) -> dict[str, Any] | None:
        """The reader passes its batch, or ``None`` at the end; everyone gets the batch, or ``None`` at the end.

        Raises:
            DataError: on every rank, if the reader passed an error.
        """
        kind, announcement, tensors = self._announce(batch, error)
        header = torch.tensor([kind])
        dist.broadcast(header, group_src=0, group=self._groups.all)
        kind = int(header)
        if kind == _STOP:
            return None
        if kind != _SAME:
            told = [announcement]
            dist.broadcast_object_list(told, group_src=0, group=self._groups.all)
            if kind == _ERROR:
                reader = dist.get_process_group_ranks(self._groups.all)[0]
                raise DataError(f"Rank {reader} reads for this replica of the model, and failed: {told[0]}") from error
            self._schema, self._extras = told[0]
        if not self._groups.has_data:
            return _shapes(self._schema) | self._extras
        return _broadcast_tensors(tensors, self._schema, self._groups.data) | self._extras

    def _announce(
        self, batch: dict[str, Any] | None, error: Exception | None
    ) -> tuple[int, Any, dict[str, torch.Tensor]]:
        if error is not None:
            return _ERROR, f"{type(error).__name__}: {error}", {}
        if batch is None:
            return _STOP, None, {}
        tensors = {key: value.contiguous() for key, value in batch.items() if torch.is_tensor(value)}
        extras = {key: value for key, value in batch.items() if key not in tensors}
        schema = [(key, tuple(value.shape), value.dtype) for key, value in tensors.items()]
        kind = _SAME if (schema, extras) == (self._schema, self._extras) else _NEW
        return kind, (schema, extras), tensors


def _shapes(schema: _Schema) -> dict[str, torch.Tensor]:
    return {key: torch.zeros((), dtype=dtype).expand(shape) for key, shape, dtype in schema}


def _broadcast_tensors(tensors: dict[str, torch.Tensor], schema: _Schema, group: Any) -> dict[str, torch.Tensor]:
    """All tensors of a batch as one message from the first rank of ``group``."""
    sizes = [math.prod(shape) * dtype.itemsize for _, shape, dtype in schema]
    if tensors:
        message = torch.cat([tensors[key].reshape(-1).view(torch.uint8) for key, _, _ in schema])
    else:
        message = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(message, group_src=0, group=group)
    if tensors:
        return tensors
    parts = message.split(sizes)
    return {
        # A part may begin between two elements of its type, so it is copied before it is viewed.
        key: part.clone().view(dtype).view(shape)
        for part, (key, shape, dtype) in zip(parts, schema, strict=True)
    }
