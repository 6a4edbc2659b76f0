"""Saves at once, or in the background while training goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_megatron.checkpoint.io import Snapshot
from lightning_megatron.checkpoint.retention import Retention
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
    """What a save does while one of another state is still being written. A skipped save warns, what it was to replace
    stays, and the last step's is made up for at the end of the fit."""
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
        self._retention = Retention()
        self._skipped: dict[Path, tuple[int, bool]] = {}
        self.failed = False
        """Whether the run has failed, so that the other ranks may never join in what is being written."""

    @property
    def busy(self) -> bool:
        """Whether this rank is writing in the background."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, snapshot: Snapshot, *, step: int = 0, weights_only: bool = False, must: bool = False) -> None:
        """Write a snapshot, or begin to.

        While the save before is still being written, a snapshot of the same state, such as ``last.ckpt`` right after
        the best checkpoint, is written after it from the same copy; another one waits or is skipped.

        Args:
            step: the optimizer step of the state, and
            weights_only: what it holds, which :meth:`skipped` tells.
            must: never skip it, nor give it up for a save before it that has failed, and return when it is written:
                the run ends.

        Raises:
            CheckpointError: it failed, unless errors are to be warned of.
        """
        if not self.options.background:
            self._begin(snapshot.path)
            try:
                snapshot.write(self.team)
            except CheckpointError as error:
                self.report(error)
            else:
                self._complete(snapshot.path)
            return
        self._save_in_background(snapshot, step, weights_only, must)
        if must and self._thread is not None:
            self._thread.join()  # a run that has failed ends the connections that the writing needs

    def _save_in_background(self, snapshot: Snapshot, step: int, weights_only: bool, must: bool) -> None:
        if self._thread is not None and any(self.team.share(self.busy)):
            if all(self.team.share(self._is_staged(snapshot.tensors))):
                self._start(snapshot)
                return
            if self.options.when_busy == "skip" and not any(self.team.share(must)):
                self._begin(snapshot.path)
                self._skipped[snapshot.path] = (step, weights_only)
                rank_zero_warn(
                    f"The checkpoint {snapshot.path} is skipped: the one before is still being written. Save less "
                    "often. What it was to replace stays."
                )
                return
        self._wait_for_all(must)
        self._stage(list(snapshot.tensors))
        self._start(snapshot)

    def skipped(self, step: int, last: Collection[Path]) -> list[tuple[Path, bool]]:
        """Skipped saves that are due at the end of a fit, and whether each is of weights alone.

        Args:
            step: the last step; what was skipped there is still what the model holds.
            last: checkpoints whose names stand for the newest state, whichever step that is.
        """
        due = [(path, only) for path, (at, only) in self._skipped.items() if at == step or path in last]
        self._skipped.clear()
        return due

    def _start(self, snapshot: Snapshot) -> None:
        """Write the staged tensors in a thread, after what is being written."""
        self._begin(snapshot.path)
        write = snapshot.with_tensors(self._staging).write
        # Not a daemon: a process that exits in the ordinary way finishes its checkpoint first.
        self._thread = threading.Thread(
            target=self._write, args=(self._thread, snapshot.path, write), name="checkpoint"
        )
        self._thread.start()

    def _is_staged(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the copies that are being written hold these values, bit by bit."""
        tensors = list(tensors)
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in self._staging]:
            return False
        return all(_same_bits(copy, tensor) for copy, tensor in zip(self._staging, tensors, strict=True))

    def _stage(self, tensors: list[Tensor]) -> None:
        """Copy to host memory, which is kept for the next save: allocating pinned memory is slow."""
        if [(t.shape, t.dtype) for t in tensors] != [(t.shape, t.dtype) for t in self._staging]:
            self._staging = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
        with torch.no_grad():
            for copy, tensor in zip(self._staging, tensors, strict=True):
                copy.copy_(tensor, non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()

    def _write(self, before: threading.Thread | None, path: Path, write: Callable[[Team], None]) -> None:
        # Of this thread alone: training has the cores first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        if before is not None:
            before.join()
        try:
            write(self._writers)
            self._complete(path)
        except CheckpointError as error:
            self._error = self._error or error
        except Exception as error:  # a rank has died, so a collective fails; nothing was published
            self._error = self._error or CheckpointError(f"Saving the checkpoint {path} was abandoned: {error}")

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: what was written in the background failed, unless errors are to be warned of.
        """
        if (error := self.join()) is not None:
            self.report(error)

    def join(self) -> CheckpointError | None:
        """Until nothing is being written; why what was written in the background failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.mend_links()
        error, self._error = self._error, None
        return error

    def settle(self) -> None:
        """As :meth:`wait`, but a save that failed is warned of: what comes next must not be lost with it."""
        try:
            self.wait()
        except CheckpointError as error:
            rank_zero_warn(str(error))

    def _wait_for_all(self, must: bool) -> None:
        """As :meth:`wait`, or :meth:`settle` if any rank must save."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None and any(self.team.share(must)):
            self.settle()
        self.wait()

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
        self.settle()

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, but not before the one that replaces it is whole."""
        if self.team.first:
            self._retention.remove(path)

    def mend_links(self) -> None:
        """Point links at whole checkpoints while those that they are meant for are not."""
        if self.team.first:
            self._retention.mend_links()

    def _begin(self, path: Path) -> None:
        self._skipped.pop(path, None)
        if self.team.first:
            self._retention.begin(path)

    def _complete(self, path: Path) -> None:
        if self.team.first:
            self._retention.complete(path)

    def report(self, error: CheckpointError) -> None:
        """Raise, or warn of, an error of a save, as the options say."""
        if self.options.on_error == "raise":
            raise error
        rank_zero_warn(f"{error} Training goes on; earlier checkpoints are intact.")


def _same_bits(copy: Tensor, tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    there = copy.to(tensor.device, non_blocking=True)
    return torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (there, tensor)))
