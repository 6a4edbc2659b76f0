"""A rank is killed at a random moment of training and saving; the run resumes with nothing lost."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_megatron.checkpoint import CheckpointOptions, io, verify
from tests.checkpoint.runs import Case, make_module, tensors
from tests.helpers import Record, SharedLoader, quiet_trainer
from tests.ranks import RankPool

CASE = Case(2, {"tensor_model_parallel_size": 2})
STEPS = 8


def _run(directory: Path, background: bool, victim: int | None, delay: float) -> tuple[int, float, float]:
    """Train to the end unless this is the victim; the step it began at, its last loss, and how long it took."""
    write = io.write_file

    def slowly(path: Path, parts: Any, **options: Any) -> Any:
        # So that kills meet half-written files.
        return write(path, (part for part in parts if time.sleep(0.001) is None), **options)

    io.write_file = slowly
    strategy = CASE.strategy()
    strategy._checkpoint_options = CheckpointOptions(background=background)
    module, record = make_module({"hidden_dropout": 0.1}), Record()
    checkpoint = ModelCheckpoint(directory, save_last=True, save_top_k=1, every_n_train_steps=1)
    trainer = quiet_trainer(strategy, 2, max_steps=STEPS, callbacks=[record, checkpoint], enable_checkpointing=True)
    if victim == int(os.environ["RANK"]):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    began = time.monotonic()
    try:
        trainer.fit(module, SharedLoader(module, length=160), ckpt_path="last")
    finally:
        io.write_file = write
    return STEPS - len(record.losses), record.losses[-1], time.monotonic() - began


def _step(path: Path) -> int:
    return torch.load(path / "lightning.pt", weights_only=True)["global_step"] if path.exists() else 0


def _kill_and_resume(directory: Path, kills: int, seed: int) -> int:
    """Kill ``kills`` times; how many of them hit a running process."""
    chance, hits = random.Random(seed), 0
    pool = RankPool(2)
    try:
        pool.run(_run, 2, directory / "warm", False, None, 0.0)
        _, loss, duration = pool.run(_run, 2, directory / "straight", False, None, 0.0)[0]
        expected = tensors(directory / "straight" / "last.ckpt")
        run = 0
        while hits < kills:
            run += 1
            folder, done = directory / f"run{run}", 0
            while done < STEPS:
                victim = chance.randrange(2) if hits < kills else None
                delay = chance.uniform(0.0, duration)
                results, errors = pool.attempt(_run, 2, folder, bool(run % 2), victim, delay)
                now = _step(folder / "last.ckpt")
                assert now >= done, "a step that was saved is lost"
                assert not (folder / "last.ckpt").exists() or verify(folder / "last.ckpt") == []
                if errors:
                    hits += 1
                    assert any("exit code -9" in text for text in errors.values()), errors
                else:
                    assert results[0][:2] == (done, loss)
                    assert now == STEPS
                done = now if errors else STEPS
            final = tensors(folder / "last.ckpt")
            assert all(torch.equal(expected[key], final[key]) for key in expected | final)
    finally:
        pool.stop()
    return hits


@pytest.mark.slow
def test_killed_ranks(ranks: RankPool, tmp_path: Path) -> None:
    assert _kill_and_resume(tmp_path, 1, seed=1) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ranks_thirty_times(ranks: RankPool, tmp_path: Path) -> None:
    assert _kill_and_resume(tmp_path, 30, seed=2) == 30
