"""Work that all ranks do together, and that fails on all of them if it fails on one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lightning_megatron.errors import CheckpointError

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file is larger than the file system or a limit (ulimit -f) allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.ENOENT: "a file or directory has vanished",
    errno.ESTALE: "the network file system has lost a file",
}


@dataclass(frozen=True, slots=True)
class Team:
    """All ranks, over a gloo group that only checkpoints use, so that a thread may use it while others train."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which does what only one may do."""
        return self.rank == 0

    def gather[T](self, value: T) -> list[T]:
        """Every rank's value, on rank 0; an empty list elsewhere."""
        values: list[Any] = [None] * self.size if self.first else []
        dist.gather_object(value, values if self.first else None, dst=0, group=self.group)
        return values

    def scatter(self, values: list[Any]) -> Any:
        """Rank 0 passes one value for each rank; each gets its own."""
        mine = [None]
        dist.scatter_object_list(mine, values if self.first else None, src=0, group=self.group)
        return mine[0]

    def share[T](self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def do[T](self, what: str, work: Callable[[], T]) -> T:
        """Do ``work`` on every rank, and wait for all.

        Raises:
            CheckpointError: on every rank, if it failed on any; it names the ranks and their errors.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # whatever it is, the others must hear of it
            error = caught
        failures = {rank: text for rank, text in enumerate(self.share(_tell(error))) if text}
        if failures:
            told = set(failures.values())
            where = ", ".join(map(str, failures)) if len(failures) < self.size or len(told) > 1 else "all"
            raise CheckpointError(f"{what} failed on rank {where}: {'; '.join(sorted(told))}") from error
        return result  # type: ignore[return-value]


class Alone(Team):
    """One process without process groups, as command-line tools are."""

    def __init__(self) -> None:
        pass

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return 1

    def gather[T](self, value: T) -> list[T]:
        return [value]

    share = gather

    def scatter(self, values: list[Any]) -> Any:
        return values[0]


def _tell(error: Exception | None) -> str:
    if error is None:
        return ""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _CAUSES:
        where = f": {error.filename}" if error.filename else ""
        return f"{_CAUSES[error.errno]} ({error.strerror}{where})"
    return f"{type(error).__name__}: {error}"
