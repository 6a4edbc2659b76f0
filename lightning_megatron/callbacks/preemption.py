"""Saves and leaves when the machine is about to be taken away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_megatron.strategy import MegatronStrategy

REQUEUE = 75
"""``EX_TEMPFAIL``: a scheduler that requeues on failure tries again."""


class Preemption(pl.Callback):
    """After a signal to any rank, saves at the end of the running step, on all ranks, and exits with a code.

    Under Slurm the checkpoint is the ``hpc_ckpt_<n>.ckpt`` that Lightning resumes from by itself, and the job is
    requeued. Elsewhere it is ``last.ckpt`` beside those of the first ModelCheckpoint, which ``ckpt_path="last"`` finds.
    Lightning's own reaction to these signals saves in the handler, on each rank in another step, which a model that is
    spread over ranks cannot do; this callback replaces it.

    Args:
        signals: what announces the end.
        exit_code: what the process exits with.
        directory: where to save instead.
        requeue: whether to call ``scontrol requeue`` under Slurm.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
        *,
        exit_code: int = REQUEUE,
        directory: str | Path | None = None,
        requeue: bool = True,
    ) -> None:
        self._signals = [signal.Signals[name] for name in signals]
        self._exit_code = exit_code
        self._directory = directory
        self._requeue = requeue
        self._before: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over; Lightning has installed its own handlers by now."""
        self._received = None
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask all ranks, since a signal reaches them in different steps, or only one of them."""
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        path = self._path(trainer)
        rank_zero_info(f"{self._received.name if self._received else 'A signal'}: saving {path} and leaving.")
        if isinstance(trainer.strategy, MegatronStrategy):
            trainer.strategy.finish_saving()  # with when_busy="skip" it would be skipped while another is written
        trainer.save_checkpoint(path)
        trainer.strategy.teardown()  # waits for what is written in the background
        if self._requeue and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
            _requeue_slurm_job()
        sys.exit(self._exit_code)

    def _path(self, trainer: pl.Trainer) -> Path:
        if self._directory is not None:
            return Path(self._directory) / "last.ckpt"
        root = Path(trainer.default_root_dir)
        if "SLURM_JOB_ID" in os.environ:
            taken = [path.stem.removeprefix("hpc_ckpt_") for path in root.glob("hpc_ckpt_*.ckpt")]
            number = max((int(text) for text in taken if text.isdigit()), default=0) + 1
            return root / f"hpc_ckpt_{trainer.strategy.broadcast(number)}.ckpt"
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        return (Path(folder) if folder else root) / "last.ckpt"

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()


def _requeue_slurm_job() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"Slurm job {job} could not be requeued: {error}")
