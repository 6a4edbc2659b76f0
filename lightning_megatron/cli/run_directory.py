"""The directory of a run: one run at a time trains in it, and a new run takes no other run's."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_megatron.errors import CheckpointError

_FOUND_BY_LIGHTNING = ("best", "last", "hpc")


@contextmanager
def claimed(config: DictConfig) -> Iterator[None]:
    """Hold the directory of a run that trains, until it ends.

    A directory with checkpoints belongs to the run that wrote them: another run's ``last.ckpt`` would be taken for
    this one's. What continues that run, by its ``ckpt_path``, may go on there. All ranks look for checkpoints, which
    none can have written before all ranks train; rank 0 holds the lock.

    Raises:
        CheckpointError: another run has trained in it, or trains in it now.
    """
    if "run_dir" not in config or config.get("task", "fit") != "fit":
        yield
        return
    directory = Path(config.run_dir)
    _check_free(directory, config.get("ckpt_path"))
    with _lock(directory):
        yield


def save_config(config: DictConfig) -> None:
    """Write the resolved configuration beside the run, on one rank: ``config.yaml`` is that of the training."""
    if _rank() == 0:
        directory, task = Path(config.run_dir), config.get("task", "fit")
        directory.mkdir(parents=True, exist_ok=True)
        name = "config.yaml" if task == "fit" else f"config.{task}.yaml"
        (directory / name).write_text(OmegaConf.to_yaml(config, resolve=True))


def _check_free(directory: Path, ckpt_path: str | None) -> None:
    found = sorted(path for pattern in ("*.ckpt", "checkpoints/*.ckpt") for path in directory.glob(pattern))
    if not found or _continues(directory, ckpt_path):
        return
    last = next((path for path in found if path.name == "last.ckpt"), found[-1])
    raise CheckpointError(
        f"run_dir={directory} holds the checkpoints of another run. Give a new run_dir=..., continue that run with "
        f"ckpt_path={last}, or remove the directory."
    )


def _continues(directory: Path, ckpt_path: str | None) -> bool:
    if ckpt_path is not None:
        own = Path(ckpt_path).resolve().is_relative_to(directory.resolve())
        return str(ckpt_path) in _FOUND_BY_LIGHTNING or own
    # Lightning resumes a requeued job from this by itself.
    return "SLURM_JOB_ID" in os.environ and any(directory.glob("hpc_ckpt_*.ckpt"))


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    if _rank() != 0:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _take(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"Another process is training in run_dir={directory}. Give a new run_dir=..., or wait until it has ended."
        ) from error
    except OSError:  # a file system without locks
        return


def _rank() -> int:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return rank_zero_only.rank  # type: ignore[attr-defined]
