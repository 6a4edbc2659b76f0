"""Saves at once, or in the background while training goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_megatron.checkpoint.io import Snapshot
from lightning_megatron.checkpoint.publish import remove
from lightning_megatron.checkpoint.together import Team
from lightning_megatron.errors import CheckpointError

_AFTER_FAILURE = 35.0
"""Seconds that a background save may go on after a failure: a little longer than other ranks let it."""


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """How checkpoints are saved."""

    background: bool = False
    """Copy the state to host memory, then write it while training goes on."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a save does while the one before is still being written; a skipped save warns."""
    on_error: Literal["raise", "warn"] = "raise"
    """Whether a failed save, on a full disk for instance, ends the training. Earlier checkpoints stay either way."""

    read_back: bool = False
    """Read every file from the disk again, and compare, before a checkpoint gets its name. Without it the files'
    sizes and the presence of every element are verified, and the checksums at each load."""

    def __post_init__(self) -> None:
        if self.when_busy not in ("wait", "skip"):
            raise ValueError(f"when_busy={self.when_busy!r} is neither 'wait' nor 'skip'.")
        if self.on_error not in ("raise", "warn"):
            raise ValueError(f"on_error={self.on_error!r} is neither 'raise' nor 'warn'.")


class Saver:
    """Writes snapshots, one at a time. Every rank calls the same methods in the same order."""

    def __init__(self, options: CheckpointOptions, group: Callable[[str], dist.ProcessGroup]) -> None:
        """``group`` returns a gloo group of all ranks by its name."""
        self.options = options
        self.team = Team(group("checkpoint"))
        """For the calling thread."""
        self._writers = Team(group("checkpoint writers")) if options.background else self.team
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._staging: list[Tensor] = []
        self._doomed: list[Path] = []
        self.failed = False
        """Whether the run has failed, so that the other ranks may never join in what is being written."""

    def ready(self) -> bool:
        """Whether a save may begin; waits for the one before, if that is what to do."""
        if self._thread is not None and self.options.when_busy == "skip" and any(self.team.share(self.busy)):
            rank_zero_warn("A checkpoint is skipped: the one before is still being written. Save less often.")
            return False
        self.wait()
        return True

    @property
    def busy(self) -> bool:
        """Whether this rank is writing in the background."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, or begin to.

        Raises:
            CheckpointError: it failed, unless errors are to be warned of.
        """
        if not self.options.background:
            try:
                snapshot.write(self.team)
            except CheckpointError as error:
                self._report(error)
            return
        staged = snapshot.with_tensors(self._stage(list(snapshot.tensors)))
        # Not a daemon: a process that exits in the ordinary way finishes its checkpoint first.
        self._thread = threading.Thread(target=self._write, args=(staged,), name="checkpoint")
        self._thread.start()

    def _stage(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies in host memory, which is kept for the next save: allocating pinned memory is slow."""
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in self._staging]:
            self._staging = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
        with torch.no_grad():
            for copy, tensor in zip(self._staging, tensors, strict=True):
                copy.copy_(tensor, non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return self._staging

    def _write(self, snapshot: Snapshot) -> None:
        # Of this thread alone: training has the cores first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            snapshot.write(self._writers)
        except CheckpointError as error:
            self._error = error
        except Exception as error:  # a rank has died, so a collective fails; nothing was published
            self._error = CheckpointError(f"Saving the checkpoint {snapshot.path} was abandoned: {error}")

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: what was written in the background failed, unless errors are to be warned of.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        doomed, self._doomed = self._doomed, []
        if error is not None:
            self._report(error)  # and what this checkpoint was to replace stays
            return
        for path in doomed:
            remove(path)

    def finish(self, abort: Callable[[], None]) -> None:
        """As :meth:`wait`, at the end of a run or after an exception, which no other error must hide.

        Args:
            abort: makes the collectives of this process fail; called if the run has failed and writing takes longer
                than other ranks go on after a failure.
        """
        if self.failed and self._thread is not None:
            self._thread.join(_AFTER_FAILURE)
            if self._thread.is_alive():
                abort()
        self.failed = False
        try:
            self.wait()
        except CheckpointError as error:
            rank_zero_warn(str(error))

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, but not before the one that replaces it is whole."""
        if not self.team.first:
            return
        if self._thread is not None:
            self._doomed.append(path)
        else:
            remove(path)

    def _report(self, error: CheckpointError) -> None:
        if self.options.on_error == "raise":
            raise error
        rank_zero_warn(f"{error} Training goes on; earlier checkpoints are intact.")
