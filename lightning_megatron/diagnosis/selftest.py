"""A few training steps at each kind of parallelism, in processes of its own: ``python -m ...selftest``.

Prints one JSON object. The parent imports everything once and forks, since imports take most of the time; with CUDA,
which no fork survives, it spawns.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import queue
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

_PATIENCE = 5.0  # seconds for the other ranks once one has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One layout's steps."""

    layout: str
    losses: tuple[float, ...] = ()
    """Of each step, as each rank saw them in turn."""
    seconds: float = 0.0
    error: str = ""

    @property
    def healthy(self) -> bool:
        """Whether every loss is a number, and the last is smaller than the first."""
        return not self.error and all(map(math.isfinite, self.losses)) and self.losses[-1] < self.losses[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """All layouts of one run."""

    accelerator: str
    devices: int
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0
    error: str = ""
    disagreement: float = 0.0
    """Largest relative difference between losses of the same step at different layouts, or on different ranks."""
    tolerance: float = field(default=1e-4)

    @property
    def healthy(self) -> bool:
        """Whether every layout trains, and all to the same losses."""
        fine = bool(self.trials) and all(trial.healthy for trial in self.trials)
        return not self.error and fine and self.disagreement <= self.tolerance


def layouts(devices: int) -> tuple[str, ...]:
    """Short forms of what to try on so many processes: plain data parallelism, then TP with SP, PP, and both."""
    tried = ["tp1"]
    if devices >= 2 and devices % 2 == 0:
        tried += ["tp2_sp", "pp2"]
    if devices >= 4 and devices % 4 == 0:
        tried.append("tp2_pp2_sp")
    return tuple(tried)


def run_selftest(accelerator: str, devices: int, timeout: float = 60.0) -> SelfTest:
    """Run the test in a process of its own.

    Args:
        accelerator: ``"cpu"`` or ``"cuda"``.
        devices: Processes on this machine.
        timeout: Seconds after which it counts as hanging.
    """
    command = [sys.executable, "-m", __name__, "--accelerator", accelerator, "--devices", str(devices)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if accelerator == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        [*command, "--timeout", str(timeout)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout + 10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return SelfTest(accelerator=accelerator, devices=devices, error=f"no answer in {timeout:.0f} s")
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = errors.strip().splitlines()[-1:] or ["no output"]
        return SelfTest(accelerator=accelerator, devices=devices, error=f"exit code {process.returncode}: {last[0]}")
    trials = tuple(Trial(**{**trial, "losses": tuple(trial["losses"])}) for trial in found.pop("trials"))
    return SelfTest(**found, trials=trials)


# ------------------------------------------------------------------------------------------------ inside its process


def main() -> int:
    """Start the ranks, collect what they saw, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--timeout", type=float, default=60.0)
    args = parser.parse_args()
    started = time.perf_counter()
    result = _collect(args.accelerator, args.devices, args.timeout)
    print(json.dumps({**asdict(result), "seconds": time.perf_counter() - started}), flush=True)
    return 0


def _collect(accelerator: str, devices: int, timeout: float) -> SelfTest:
    import torch.multiprocessing as mp

    if accelerator == "cpu":
        import lightning_megatron.diagnosis.trial  # noqa: F401  (before the fork)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context: Any = mp.get_context("fork" if accelerator == "cpu" else "spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, devices, accelerator, port, answers), daemon=True)
        for rank in range(devices)
    ]
    for process in ranks:
        process.start()
    by_rank: dict[int, list[Trial]] = {}
    deadline = time.monotonic() + timeout
    error = ""
    while len(by_rank) < devices and not error:
        try:
            rank, trials = answers.get(timeout=0.2)
            by_rank[rank] = [Trial(**trial) for trial in trials]
            if any(trial.error for trial in by_rank[rank]):
                deadline = min(deadline, time.monotonic() + _PATIENCE)
        except queue.Empty:
            dead = [rank for rank, p in enumerate(ranks) if p.exitcode not in (None, 0) and rank not in by_rank]
            if dead:
                error = f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}"
            elif time.monotonic() > deadline:
                failed = [trial.error for trials in by_rank.values() for trial in trials if trial.error]
                waiting = sorted(set(range(devices)) - set(by_rank))
                error = failed[0] if failed else f"ranks {waiting} did not finish in {timeout:.0f} s"
    for process in ranks:
        process.kill() if error else process.join(5)
    if error or not by_rank:
        return SelfTest(accelerator=accelerator, devices=devices, error=error)
    return _summary(accelerator, devices, by_rank)


def _summary(accelerator: str, devices: int, by_rank: dict[int, list[Trial]]) -> SelfTest:
    trials = []
    for column in zip(*(by_rank[rank] for rank in sorted(by_rank)), strict=True):
        errors = [f"rank {rank}: {trial.error}" for rank, trial in enumerate(column) if trial.error]
        trials.append(
            Trial(
                layout=column[0].layout,
                losses=column[0].losses,
                seconds=max(trial.seconds for trial in column),
                error=errors[0] if errors else "",
            )
        )
    every = [trial.losses for rank in by_rank.values() for trial in rank if not trial.error]
    spread = max((_spread(step) for step in zip(*every, strict=True)), default=0.0)
    # Initial weights of a layer are drawn on the GPU, where each tensor-parallel rank draws its own part.
    tolerance = 1e-4 if accelerator == "cpu" else 5e-2
    return SelfTest(
        accelerator=accelerator, devices=devices, trials=tuple(trials), disagreement=spread, tolerance=tolerance
    )


def _spread(values: tuple[float, ...]) -> float:
    return (max(values) - min(values)) / max(abs(max(values)), 1e-12)


def _rank(rank: int, devices: int, accelerator: str, port: int, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(devices), RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(devices), GROUP_RANK="0", TORCHELASTIC_RUN_ID="doctor")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    from lightning_megatron.diagnosis.trial import train

    trials = []
    for layout in layouts(devices):
        started = time.perf_counter()
        try:
            losses = train(layout, devices, accelerator)
            trials.append(Trial(layout=layout, losses=losses, seconds=time.perf_counter() - started))
        except Exception as error:
            trials.append(Trial(layout=layout, error=f"{type(error).__name__}: {error}"))
            break  # the other ranks may wait for this one in a collective
    answers.put((rank, [asdict(trial) for trial in trials]))
    answers.close()
    answers.join_thread()
    os._exit(0)  # without waiting for the others to leave their groups


if __name__ == "__main__":
    sys.exit(main())
