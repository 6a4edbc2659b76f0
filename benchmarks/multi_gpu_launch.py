"""Starts the ranks of :mod:`benchmarks.multi_gpu`, watches them, and lets neither a failure nor a hang end the run."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.multi_gpu_events import Events, Setting
from benchmarks.multi_gpu_kinds import Job, Training

ROOT = Path(__file__).parent.parent
START = 90.0
"""Seconds that processes may take until they begin their first job."""
STOP_WITHIN = 90.0
"""Seconds within which the ranks beside a killed one must have stopped."""
_POLL = 0.02
_TAIL = 1500
_STACKS = 4000
"""Characters of a rank's log in a report; the innermost frames of a stack come first."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A job came to its end."""

    ranks: list[dict[str, Any]]
    """Its numbers by rank."""
    wall_s: float


@dataclass(frozen=True, slots=True)
class Killed:
    """A rank was killed as planned, and the others stopped with an error."""

    after_s: float
    """Seconds until the last of them had."""
    exit_codes: tuple[int, ...]
    errors: tuple[str, ...]
    """The last line that each wrote."""


@dataclass(frozen=True, slots=True)
class Failed:
    """It raised, died, hung, or went on beside a dead rank."""

    reason: str
    detail: str = ""
    """The end of what the ranks wrote."""


@dataclass(frozen=True, slots=True)
class NotRun:
    """There was no time for it."""

    reason: str


Outcome = Finished | Killed | Failed | NotRun


class Group:
    """Processes that run a list of jobs."""

    def __init__(self, jobs: Sequence[Job], setting: Setting) -> None:
        self.jobs = jobs
        self._directory = Path(tempfile.mkdtemp(prefix="group-", dir=setting.directory))
        self._events = Events(self._directory)
        (self._directory / "jobs.pickle").write_bytes(pickle.dumps((setting, list(jobs))))
        self._setting = setting
        self._logs: list[IO[bytes]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._running: int | None = None
        self._since = time.monotonic()

    def __enter__(self) -> Group:
        for rank in range(max(job.layout.gpus for job in self.jobs)):
            log = (self._directory / f"rank{rank}.log").open("wb")
            self._logs.append(log)
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.multi_gpu_rank", str(self._directory)],
                    env=_environment(rank, self._setting),
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for log in self._logs:
            log.close()

    def watch(self, deadline: float, heard: Callable[[Job, Outcome], None]) -> None:
        """Tell of each job's outcome until one does not finish, or all have."""
        done = 0
        while done < len(self.jobs):
            time.sleep(_POLL)
            for event in self._events.new():
                if "begin" in event:
                    self._running, self._since = event["begin"], time.monotonic()
                elif "end" in event:
                    heard(self.jobs[event["end"]], Finished(event["ranks"], event["wall_s"]))
                    self._running, self._since = None, time.monotonic()
                    done = event["end"] + 1
                elif event["step"] == self._kill_at:
                    heard(self.jobs[done], self._kill_a_rank())
                    return
            if done < len(self.jobs) and (outcome := self._broken(self.jobs[done], deadline)):
                heard(self.jobs[done], outcome)
                return

    @property
    def _kill_at(self) -> int | None:
        job = None if self._running is None else self.jobs[self._running]
        return job.kill_at if isinstance(job, Training) else None

    def _broken(self, job: Job, deadline: float) -> Outcome | None:
        """Why the next job will not finish."""
        codes = [process.poll() for process in self._processes[: job.layout.gpus]]
        if any(codes):
            time.sleep(1.0)  # what broke first may not be what is seen first
            broken = [rank for rank in range(len(codes)) if self._processes[rank].poll()]
            reasons = [
                f"rank {rank} ended with {self._processes[rank].returncode}: {self._error(rank)}" for rank in broken
            ]
            return Failed("; ".join(reasons), self._tails(broken))
        if codes[0] == 0 and not self._events.unread:
            return Failed("rank 0 ended without a result", self._tails([0]))
        waited = time.monotonic() - self._since
        limit = START if self._running is None else job.limit
        if time.monotonic() > deadline:
            return NotRun("out of time" + (f", after {waited:.0f} s of it" if self._running is not None else ""))
        if waited > limit:
            return Failed(f"hung: no result in {limit:g} s", self._where())
        return None

    def _kill_a_rank(self) -> Outcome:
        assert self._running is not None
        *others, victim = self._processes[: self.jobs[self._running].layout.gpus]
        victim.kill()
        began = time.monotonic()
        while time.monotonic() - began < STOP_WITHIN and any(process.poll() is None for process in others):
            time.sleep(_POLL)
        codes = [process.poll() for process in others]
        if None in codes:
            return Failed(f"ranks beside the killed one were still there after {STOP_WITHIN:g} s", self._where())
        errors = tuple(self._error(rank) for rank in range(len(others)))
        if 0 in codes:
            return Failed(f"a rank ended as if nothing had happened beside a killed one: {codes}")
        return Killed(time.monotonic() - began, tuple(code for code in codes if code is not None), errors)

    def _where(self) -> str:
        """The stacks of all ranks that are there, which they print when they are asked."""
        alive = [rank for rank, process in enumerate(self._processes) if process.poll() is None]
        before = {rank: len(self._log(rank)) for rank in alive}
        for rank in alive:
            self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(1.0)
        return "\n".join(f"--- rank {rank}\n{self._log(rank)[before[rank] :][:_STACKS]}" for rank in alive)

    def _log(self, rank: int) -> str:
        return (self._directory / f"rank{rank}.log").read_text(errors="replace")

    def _tails(self, ranks: Sequence[int]) -> str:
        return "\n".join(f"--- rank {rank}\n{self._log(rank)[-_TAIL:]}" for rank in ranks)

    def _error(self, rank: int) -> str:
        """The last exception that a rank wrote, or its last line."""
        lines = [line.strip() for line in self._log(rank).replace(f"[rank{rank}]: ", "").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return (errors or lines or [""])[-1][:200]


def _environment(rank: int, setting: Setting) -> dict[str, str]:
    """torchrun's variables, on top of this process's; those of a job are added when it begins."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": path,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "multi-gpu",
        **({"CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else {}),
    }


def run_jobs(jobs: Sequence[Job], setting: Setting, deadline: float, heard: Callable[[Job, Outcome], None]) -> None:
    """Run jobs in one group of processes, and in another those that follow one that failed.

    Args:
        deadline: of ``time.monotonic()``, after which what is left is told as not run.
        heard: called once for each job.
    """
    waiting = list(jobs)

    def told(job: Job, outcome: Outcome) -> None:
        waiting.remove(job)
        heard(job, outcome)
        if isinstance(outcome, Failed):
            for other in [other for other in waiting if other.needs(job)]:
                if other in waiting:  # one that needs two jobs is told once
                    told(other, NotRun(f"needs {job.name!r}, which failed"))

    while waiting:
        if time.monotonic() > deadline:
            told(waiting[0], NotRun("out of time"))
            continue
        with Group(tuple(waiting), setting) as group:
            group.watch(deadline, told)
