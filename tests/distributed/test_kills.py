"""A rank that dies, stops, fails, or is told to leave: all ranks end, in time, and know why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_megatron as lm
from lightning_megatron.checkpoint import CheckpointOptions, io
from tests.checkpoint.runs import make_module
from tests.helpers import SharedLoader, quiet_trainer
from tests.ranks import RankPool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp4": (4, {"use_distributed_optimizer": True}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
}
EVENT_AT = 2
ROOT = Path(__file__).parents[2]
COLLECTIVE_TIMEOUT = 15.0


class Event(pl.Callback):
    """What happens to one rank, or to all, in the third step."""

    def __init__(self, how: str, victim: int, directory: Path) -> None:
        self.how, self.victim, self.directory = how, victim, directory

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        (self.directory / f"pid{trainer.global_rank}").write_text(str(os.getpid()))
        trainer.strategy.barrier()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != EVENT_AT:
            time.sleep(0.05)
            return
        if trainer.global_rank == self.victim:
            time.sleep(1.5)  # so that the others have heard of this step
            (self.directory / "at").write_text(str(time.time()))
            self.happen(trainer)

    def happen(self, trainer: pl.Trainer) -> None:
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "raise":
            raise KeyError("of this rank alone")
        elif self.how == "terminate":
            pids = [int((self.directory / f"pid{rank}").read_text()) for rank in range(trainer.world_size)]

            def twice() -> None:
                for _ in range(2):
                    for pid in pids:
                        os.kill(pid, signal.SIGTERM)
                    time.sleep(0.3)

            threading.Thread(target=twice, daemon=True).start()


def run(layout: str, how: str, victim: int, saving: bool, directory: Path) -> tuple[str, float, int]:
    """The error of this rank, when it came, and how many threads of a watch are left."""
    world_size, sizes = LAYOUTS[layout]
    write = io.write_file

    def slowly(path: Path, parts: Any, **options: Any) -> Any:
        return write(path, (part for part in parts if time.sleep(0.02) is None), **options)

    if saving:
        io.write_file = slowly
    strategy = lm.MegatronStrategy(
        **sizes,
        micro_batch_size=2,
        seed=7,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT if how == "stop" else 300.0),
        checkpoint=CheckpointOptions(background=saving),
    )
    module = make_module()
    callbacks: list[pl.Callback] = [Event(how, victim, directory)]
    if saving:
        callbacks.append(ModelCheckpoint(directory / "checkpoints", save_last=True, every_n_train_steps=1))
    trainer = quiet_trainer(strategy, world_size, max_steps=20, callbacks=callbacks, enable_checkpointing=saving)
    text = "none"
    try:
        trainer.fit(module, SharedLoader(module, length=400))
    except BaseException as error:
        text = f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"
        if isinstance(error, SystemExit):
            text += f"exit code {error.code}"
    finally:
        io.write_file = write
    ended = time.time()
    took = ended - float((directory / "at").read_text())
    while (threads := _threads()) and time.time() < ended + 45.0:  # rank 0 is there for the others until they leave
        time.sleep(0.1)
    return text, took, threads


def _threads() -> int:
    return sum(thread.name in ("peers", "checkpoint") for thread in threading.enumerate())


EXPECTED = {
    "kill": r"Rank {victim} has died.*last step was 2",
    "stop": r"rank {victim} for \d+ s \(its last step was 2\)",
    "raise": r"KeyError: 'of this rank alone'",
    "terminate": r"SIGTERMException.*exit code 143",
}


def check(pool: RankPool, layout: str, how: str, victim: int, saving: bool, directory: Path) -> float:
    """All ranks but the victim of a kill end with the reason; the longest time it took."""
    directory.mkdir()
    world_size, _ = LAYOUTS[layout]
    gone = {victim} if how in ("kill", "stop") else set()
    results, errors = pool.attempt(
        run, world_size, layout, how, victim, saving, directory, timeout=100.0, absent=victim if gone else None
    )
    if how == "terminate":  # the second signal meets a process that has left the fit
        gone |= {rank for rank, text in errors.items() if "died with exit code -15" in text}
    assert set(results) == set(range(world_size)) - gone, errors
    for text, _, threads in results.values():
        assert re.search(EXPECTED[how].format(victim=victim), text, re.DOTALL), text
        assert threads == 0
    return max((seconds for _, seconds, _ in results.values()), default=0.0)


LIMITS = {"kill": 10.0, "stop": COLLECTIVE_TIMEOUT + 20.0, "raise": 40.0, "terminate": 50.0}
MATRIX = [
    (layout, how, victim, saving)
    for layout, (world_size, _) in LAYOUTS.items()
    for how in EXPECTED
    for victim in sorted({0, world_size - 1})
    for saving in (False, True)
]


WHOLE = pytest.mark.skipif(os.environ.get("LONG_TESTS") != "1", reason="an hour of waiting; LONG_TESTS=1 runs it")
SOME = [("pp2_dp2", "stop", 3, True), ("tp2_dp2", "raise", 3, True), ("tp2_dp2", "kill", 0, True)]


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME)
def test_ranks_of_other_groups_end(ranks: RankPool, tmp_path: Path, case: tuple[str, str, int, bool]) -> None:
    assert check(ranks, *case, tmp_path / "case") < LIMITS[case[1]]


@WHOLE
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_layout_ends(ranks: RankPool, tmp_path: Path) -> None:
    for number, case in enumerate(MATRIX):
        seconds = check(ranks, *case, tmp_path / str(number))
        assert seconds < LIMITS[case[1]], (case, seconds)


@pytest.mark.parametrize(("layout", "how", "saving"), [("pp2_dp2", "kill", True), ("tp2_pp2", "terminate", False)])
def test_all_ranks_end(ranks: RankPool, tmp_path: Path, layout: str, how: str, saving: bool) -> None:
    assert check(ranks, layout, how, 2, saving, tmp_path / "case") < LIMITS[how]


LAUNCHERS = {
    "lightning": [sys.executable, "-m"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"],
}


def _left(argument: str) -> list[int]:
    processes = psutil.process_iter(["pid", "cmdline"])
    return [process.info["pid"] for process in processes if argument in (process.info["cmdline"] or [])]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("how", "victim"),
    [
        pytest.param("kill", 0, marks=WHOLE),
        ("kill", 1),
        pytest.param("stop", 1, marks=WHOLE),
        pytest.param("raise", 0, marks=WHOLE),
        pytest.param("raise", 1, marks=WHOLE),
        pytest.param("terminate", 1, marks=WHOLE),
    ],
)
def test_launchers_end_and_leave_nothing(launcher: str, how: str, victim: int, tmp_path: Path) -> None:
    command = [*LAUNCHERS[launcher], "tests.distributed.launched", how, str(victim), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        code = process.wait(280)
    while left := _left(str(tmp_path)):
        time.sleep(0.1)
        assert time.time() < float((tmp_path / "at").read_text()) + 60.0, left
    seconds = time.time() - float((tmp_path / "at").read_text())
    text = (tmp_path / "output").read_text()
    assert code != 0
    assert seconds < (50.0 if how == "stop" else 40.0), seconds
    reason = "Received SIGTERM" if how == "terminate" else EXPECTED[how].format(victim=victim)
    assert re.search(reason, text, re.DOTALL), text[-3000:]
    assert not list(tmp_path.glob("pymp-*"))
