"""Full, read-only, vanishing and slow storage under checkpoints and logs: training goes on or stops with one error.

The user of the tests may be root, who writes wherever modes forbid it, so the storage is a file system of its own that
is mounted for the test: full when a file has taken the rest of it, read-only when it is mounted again so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_megatron as lm
from lightning_megatron.checkpoint import CheckpointOptions, io, verify
from lightning_megatron.checkpoint.integrity import LIGHTNING_FILE
from lightning_megatron.checkpoint.trainer_state import read_trainer_state
from lightning_megatron.errors import CheckpointError
from tests.checkpoint.runs import make_module
from tests.helpers import SharedLoader, quiet_trainer
from tests.ranks import RankPool

STEPS, BREAKS = 5, 3


def _mount(path: Path, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(("size=8m", *options)), "tmpfs", str(path)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "storage"
    path.mkdir()
    try:
        _mount(path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs root and a system that lets it")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def _fill(storage: Path) -> None:
    with open(storage / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            return


def _forbid(storage: Path) -> None:
    _mount(storage, "remount", "ro")


BREAK: dict[str, Callable[[Path], None]] = {"full": _fill, "read-only": _forbid}
MESSAGES = {"full": "the disk is full", "read-only": "the file system is read-only"}


class _Breaks(pl.Callback):
    """Lets the storage break before a step, when nothing is being written, and logs more than fits into a page."""

    def __init__(self, storage: Path, how: Callable[[Path], None]) -> None:
        self._storage, self._how = storage, how

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == BREAKS - 1:
            trainer.strategy.finish_saving()
            self._how(self._storage)

    def on_train_batch_end(self, *args: Any) -> None:
        self.log_dict({f"metric {number}": number / 7 for number in range(300)})


def _fit(storage: Path, how: Callable[[Path], None], options: CheckpointOptions, **trainer: Any) -> tuple[str, int]:
    """Train with a checkpoint at each step, into the storage; the error, and the steps."""
    module = make_module()
    keeps = ModelCheckpoint(storage / "checkpoints", "{step}", every_n_train_steps=1, save_last=True)
    strategy = lm.MegatronStrategy(seed=7, checkpoint=options)
    fits = quiet_trainer(
        strategy, 1, max_steps=STEPS, callbacks=[_Breaks(storage, how), keeps], enable_checkpointing=True, **trainer
    )
    try:
        fits.fit(module, SharedLoader(module))
    except (CheckpointError, OSError) as error:
        return str(error), fits.global_step
    return "", fits.global_step


def _steps(directory: Path) -> dict[str, int]:
    """Steps of the checkpoints by name, which are all whole; nothing else is there."""
    found = {}
    for path in directory.iterdir():
        assert verify(path) == [], path
        state = read_trainer_state(path / LIGHTNING_FILE, (path / LIGHTNING_FILE).read_bytes(), None)
        found[path.name] = state["global_step"]
    return found


def _assert_kept(directory: Path) -> None:
    """The checkpoints of the step before the storage broke are there, and nothing else."""
    found = _steps(directory)
    assert found == {f"step={BREAKS - 1}.ckpt": BREAKS - 1, "last.ckpt": BREAKS - 1}, found


def _breaks(storage: Path, how: str) -> None:
    for background in (False, True):
        for on_error in ("raise", "warn"):
            options = CheckpointOptions(background=background, on_error=on_error)  # type: ignore[arg-type]
            error, step = _fit(storage, BREAK[how], options)
            if on_error == "raise":
                assert MESSAGES[how] in error
                assert BREAKS <= step <= BREAKS + 1  # of a background save the next one hears
            else:
                assert (error, step) == ("", STEPS)
            _assert_kept(storage / "checkpoints")
            _mount(storage, "remount", "rw")
            for path in storage.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("how", list(BREAK))
def test_a_save_that_cannot_be_written(ranks: RankPool, storage: Path, how: str) -> None:
    ranks.run(_breaks, 1, storage, how)


def _logs(storage: Path, how: str) -> None:
    checkpoints = storage.parent / "elsewhere"
    checkpoints.mkdir()
    module = make_module()
    keeps = ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=1, save_last=True)
    logger = CSVLogger(storage, flush_logs_every_n_steps=1)
    trainer = quiet_trainer(
        lm.MegatronStrategy(seed=7), 1, max_steps=STEPS, callbacks=[_Breaks(storage, BREAK[how]), keeps],
        enable_checkpointing=True, logger=logger, log_every_n_steps=1,
    )  # fmt: skip
    with pytest.raises(OSError, match="No space left" if how == "full" else "Read-only"):
        trainer.fit(module, SharedLoader(module))
    assert set(_steps(checkpoints).values()) <= {BREAKS - 1, BREAKS}
    assert "last.ckpt" in _steps(checkpoints)


@pytest.mark.parametrize("how", list(BREAK))
def test_a_log_that_cannot_be_written(ranks: RankPool, storage: Path, how: str) -> None:
    ranks.run(_logs, 1, storage, how)


def _vanishes(directory: Path) -> None:
    for background in (False, True):
        options = CheckpointOptions(background=background)
        between = directory / f"between, {background}"
        # Between two saves: the directory is made again.
        assert _fit(between, lambda at: shutil.rmtree(at / "checkpoints"), options) == ("", STEPS)
        assert _steps(between / "checkpoints") == {f"step={STEPS}.ckpt": STEPS, "last.ckpt": STEPS}
        # While a save is being written.
        write = io.write_file

        def vanishing(path: Path, *args: Any, **kwargs: Any) -> Any:
            shutil.rmtree(path.parent)
            return write(path, *args, **kwargs)  # noqa: B023

        def begin(at: Path) -> None:
            io.write_file = vanishing

        try:
            error, _ = _fit(directory / f"during, {background}", begin, options)
        finally:
            io.write_file = write
        assert "a file or directory has vanished" in error
        _assert_kept(directory / f"during, {background}" / "checkpoints")


@pytest.mark.slow
def test_a_directory_that_vanishes(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_vanishes, 1, tmp_path)


def _slow(directory: Path) -> float:
    """Seconds of training while one background save waits for the disk."""
    sync = os.fsync

    def slowly(descriptor: int) -> None:
        time.sleep(0.1)
        sync(descriptor)

    os.fsync = slowly
    began = time.monotonic()
    try:
        options = CheckpointOptions(background=True, when_busy="skip")
        assert _fit(directory, lambda at: None, options) == ("", STEPS)
    finally:
        os.fsync = sync
    return time.monotonic() - began


@pytest.mark.slow
def test_a_disk_that_is_slow(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_slow, 1, tmp_path)
    assert _steps(tmp_path / "checkpoints") == {f"step={STEPS}.ckpt": STEPS, "last.ckpt": STEPS}


def _saves_again_and_again(directory: Path) -> None:
    import torch

    from lightning_megatron.checkpoint.metadata import CheckpointMetadata
    from lightning_megatron.checkpoint.single_file import _outlines
    from lightning_megatron.checkpoint.together import Alone

    tensors = {"weight": torch.full((1000,), float(os.environ["RANK"]))}
    for step in range(20):
        state = io.pickled({"global_step": step})
        shot = io.Snapshot(
            directory / "last.ckpt", [*tensors.values()], [[*_outlines(tensors)]], state, CheckpointMetadata({}, {}, 1)
        )
        shot.write(Alone())


def test_two_runs_that_save_under_one_name(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_saves_again_and_again, 2, tmp_path)
    assert _steps(tmp_path) == {"last.ckpt": 19}
