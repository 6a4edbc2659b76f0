"""What ranks tell each other about a batch, over gloo, so that no device waits for a data loader."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.distributed as dist

from lightning_megatron.errors import DataError

_STOP, _SAME, _NEW, _ERROR = range(4)
_Schema = list[tuple[str, tuple[int, ...], torch.dtype]]

Uneven = Literal["error", "drop"]
"""What happens when one replica's data end before another's: an error, or the end of the epoch for all of them."""


def describe(error: Exception) -> str:
    """The text of an error for other ranks, with its type unless it is an error of this package."""
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


class _SharedError(DataError):
    """An error that all replicas know."""


def public(error: Exception) -> Exception:
    """The error to raise for one that :class:`Lockstep` has returned."""
    if not isinstance(error, _SharedError):
        return error
    shared = DataError(str(error))
    shared.__cause__ = error.__cause__
    return shared


def settle(group: dist.ProcessGroup) -> None:
    """Wait until all ranks have read what they are about to raise, since the first to raise closes its connections."""
    with suppress(RuntimeError):  # another rank has left already, so this one has what it needs
        dist.barrier(group)


class Lockstep:
    """Keeps the reading ranks of all replicas at the same batch of training data.

    Training waits for every replica in each step, so the end of one replica's data, or an error in reading them, must
    reach the others before that step. One all-reduce of seven integers on the host does both.

    Args:
        group: the reading ranks of all replicas, in the order of the replicas.
        uneven: what happens when the data of one replica end before another's.
        microbatches: micro-batches of a batch, for replicas that share experts, which must run as many of them.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        uneven: Uneven,
        microbatches: Callable[[dict[str, Any]], int] | None = None,
    ) -> None:
        self._group = group
        self._uneven = uneven
        self._microbatches = microbatches

    def __call__(
        self, batch: dict[str, Any] | None, error: Exception | None, number: int
    ) -> tuple[dict[str, Any] | None, Exception | None]:
        """The batch that this replica trains on, ``None`` at the end, or the error that all replicas raise.

        Args:
            number: of the batch in its epoch.
        """
        stops = batch is None and error is None
        parts = 0 if batch is None or self._microbatches is None else self._microbatches(batch)
        told = [error is not None, stops, not stops, number, -number, parts, -parts]
        state = torch.tensor(told, dtype=torch.int64)
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._group)
        failed, stopped, going_on, highest, lowest, most, least = state.tolist()
        if failed:
            return None, self._shared(error)
        if highest != -lowest:
            return None, self._uneven_error((number, False))
        if stopped and going_on:
            return None, None if self._uneven == "drop" else self._uneven_error((number, stops))
        if most != -least:
            return None, self._unequal_batches(parts)
        return batch, None

    def _shared(self, error: Exception | None) -> Exception:
        told = self._gather(None if error is None else describe(error))
        ranks = dist.get_process_group_ranks(self._group)
        shared = _SharedError(
            " ".join(reader_failed(rank, text) for rank, text in zip(ranks, told, strict=True) if text)
        )
        shared.__cause__ = error
        return shared

    def _uneven_error(self, state: tuple[int, bool]) -> Exception:
        told = self._gather(state)
        counts = (f"{'' if ended else 'more than '}{count}" for count, ended in told)
        return _SharedError(uneven_message(f"by replica: {', '.join(counts)}"))

    def _unequal_batches(self, parts: int) -> Exception:
        counts = ", ".join(map(str, self._gather(parts)))
        return _SharedError(
            "The replicas share experts, so each needs as many micro-batches in a training batch, but they have "
            f"{counts} (by replica). Give them batches of one size: drop_last=True leaves out a smaller one at the end."
        )

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._group.size()
        dist.all_gather_object(values, value, group=self._group)
        settle(self._group)
        return values


def reader_failed(rank: int, text: str) -> str:
    """The error of a rank that reads for others, as they report it."""
    return f"Rank {rank} reads for this replica of the model, and failed: {text}"


def uneven_message(lengths: str) -> str:
    """The error of replicas whose training data differ in length."""
    return (
        f"The replicas have different numbers of training batches ({lengths}), but every step needs one of each. Give "
        "each replica as many batches (use_distributed_sampler=True does), set limit_train_batches to the fewest, or "
        "end each epoch with the shortest by MegatronStrategy(uneven_batches='drop')."
    )


def length_of(loader: Any) -> int | None:
    """The number of batches of a loader, if it knows it."""
    try:
        length: int = len(loader)
    except (TypeError, NotImplementedError):
        return None
    return length


def check_lengths(lengths: Sequence[int | None], group: dist.ProcessGroup, *, may_be_empty: bool) -> None:
    """Check the lengths of a loader on all ranks, which are those of ``group``.

    Raises:
        DataError: some ranks have a length and others none, or no batches.
    """
    told = ", ".join(map(str, lengths))
    if None in lengths and len(set(lengths)) > 1:
        settle(group)
        raise DataError(f"A data loader has a length on some ranks and none on others (by rank: {told}). Use one kind.")
    if not may_be_empty and 0 in lengths and any(lengths):
        settle(group)
        raise DataError(
            f"A data loader has no batches on some ranks (by rank: {told}). Give each replica a sample, use fewer "
            "replicas, or set allow_zero_length_dataloader_with_multiple_devices=True on the module to evaluate."
        )


class ReplicaBroadcast:
    """Tells a replica, step by step, what comes; then what it looks like, if that is new; then the bytes.

    Args:
        everyone: all ranks of the replica, the reading one first.
        with_data: those of them that get the tensors.
        has_data: whether this rank is one of those.
    """

    def __init__(self, everyone: dist.ProcessGroup, with_data: dist.ProcessGroup | None, *, has_data: bool) -> None:
        self._everyone = everyone
        self._with_data = with_data
        self._has_data = has_data
        self._schema: _Schema = []
        self._extras: dict[str, Any] = {}

    def __call__(self, batch: dict[str, Any] | None, error: Exception | None) -> dict[str, Any] | None:
        """The reader passes its batch, or ``None`` at the end; everyone gets the batch, or ``None`` at the end.

        Raises:
            DataError: on every rank, if the reader passed an error.
        """
        kind, announcement, tensors = self._announce(batch, error)
        header = torch.tensor([kind])
        dist.broadcast(header, group_src=0, group=self._everyone)
        kind = int(header)
        if kind == _STOP:
            return None
        if kind != _SAME:
            told = self.share(announcement)
            if kind == _ERROR:
                settle(self._everyone)
                raise DataError(told) from error
            self._schema, self._extras = told
        if not self._has_data:
            return _shapes(self._schema) | self._extras
        return _broadcast_tensors(tensors, self._schema, self._with_data) | self._extras

    def share(self, value: Any) -> Any:
        """The reader's value on every rank."""
        told = [value]
        dist.broadcast_object_list(told, group_src=0, group=self._everyone)
        return told[0]

    def _announce(
        self, batch: dict[str, Any] | None, error: Exception | None
    ) -> tuple[int, Any, dict[str, torch.Tensor]]:
        if error is not None:
            return _ERROR, self._report(error), {}
        if batch is None:
            return _STOP, None, {}
        tensors = {key: value.contiguous() for key, value in batch.items() if torch.is_tensor(value)}
        extras = {key: value for key, value in batch.items() if key not in tensors}
        schema = [(key, tuple(value.shape), value.dtype) for key, value in tensors.items()]
        try:
            if (schema, extras) == (self._schema, self._extras):
                return _SAME, None, tensors
            pickle.dumps(extras)
        except Exception as failure:  # the other ranks wait for an announcement
            problem = DataError(f"The entries {sorted(extras)} of a batch cannot be sent to other ranks: {failure}")
            return _ERROR, self._report(problem), {}
        return _NEW, (schema, extras), tensors

    def _report(self, error: Exception) -> str:
        if isinstance(error, _SharedError):
            return str(error)
        return reader_failed(dist.get_process_group_ranks(self._everyone)[0], describe(error))


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
