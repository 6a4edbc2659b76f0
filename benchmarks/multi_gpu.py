"""The layouts on several GPUs: equality with one process, speed, checkpoints, generation, and the death of a rank.

    python -m benchmarks.multi_gpu                           # all visible GPUs, all parts, at most 9.5 minutes
    python -m benchmarks.multi_gpu --device cpu --gpus 4     # the same with gloo and tiny sizes

(a) Every layout has the losses and gradient norms of one process, in fp32 and bf16. (b) Tokens/s and MFU per GPU, peak
memory, the efficiency against one GPU, and how much of the communication runs beside other work. (c) Checkpoints go on
in another layout. (d) Greedy tokens are those of one process. (e) Beside a killed rank the others stop with an error,
and the run goes on from its last checkpoint.

Each part runs in processes of its own; what fails or hangs is told, and the rest goes on. Every result is a line of
JSON, and a table follows. The exit status is 1 if anything of a, c, d or e failed, never because of a speed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.multi_gpu_events import Setting
from benchmarks.multi_gpu_jobs import ORDER, PARTS, SHARES, plan
from benchmarks.multi_gpu_kinds import Job, Plan
from benchmarks.multi_gpu_launch import Outcome, run_jobs
from benchmarks.multi_gpu_report import Judge, Result, show, skipped

CPU_RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    device: Literal["cuda", "cpu"]
    gpus: int
    """Or gloo's processes on a CPU."""
    parts: tuple[str, ...]
    tiny: bool
    minutes: float
    words: tuple[str, ...]
    results: Path | None


class Budget:
    """Shares out the time among the parts."""

    def __init__(self, seconds: float, parts: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._left = [part for part in ORDER if part in parts]

    def deadline(self, part: str) -> float:
        """When this part must end, which begins now; what it leaves is the others'."""
        share = SHARES[part] / sum(SHARES[other] for other in self._left)
        self._left.remove(part)
        return self._clock() + max(0.0, self._end - self._clock()) * share


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options with their defaults on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is any")
    parser.add_argument("--gpus", type=int, help=f"default: all that are visible; {CPU_RANKS} processes on a CPU")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="tiny models, which a CPU gets anyway")
    parser.add_argument("--minutes", type=float, default=9.5, help="what does not fit is told (default: 9.5)")
    parser.add_argument("--jobs", nargs="+", default=[], metavar="WORD", help="those with a word in their names alone")
    parser.add_argument("--results", type=Path, help="a file for the lines of JSON, beside standard output")
    found = parser.parse_args(arguments)
    gpus = _visible_gpus() if found.device != "cpu" else 0
    device: Literal["cuda", "cpu"] = found.device or ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        parser.error("--device cuda, but torch sees no GPU. Use --device cpu.")
    count = gpus if device == "cuda" else CPU_RANKS
    if found.gpus is not None:
        if found.gpus < 1 or (device == "cuda" and found.gpus > gpus):
            parser.error(f"--gpus {found.gpus}, but there are {gpus}.")
        count = found.gpus
    return Options(
        device=device,
        gpus=count,
        parts=tuple(part for part in ORDER if part in found.parts),
        tiny=found.tiny or device == "cpu",
        minutes=found.minutes,
        words=tuple(found.jobs),
        results=found.results,
    )


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def run(options: Options, heard: Callable[[Result], None]) -> list[Result]:
    """Run the parts one after another; ``heard`` gets each result when it is known."""
    what: Plan = plan(options.parts, options.gpus, tiny=options.tiny, words=options.words)
    judge, results = Judge(), []

    def tell(result: Result) -> None:
        results.append(result)
        heard(result)

    def done(job: Job, outcome: Outcome) -> None:
        tell(judge.result(job, outcome))

    budget = Budget(options.minutes * 60, options.parts)
    for part in options.parts:
        deadline = budget.deadline(part)
        with tempfile.TemporaryDirectory(prefix="multi-gpu-", ignore_cleanup_errors=True) as directory:
            setting = Setting(device=options.device, tiny=options.tiny, directory=Path(directory))
            run_jobs(what.part(part), setting, deadline, done)
    for one in what.skipped:
        tell(skipped(one))
    return results


def versions(options: Options) -> dict[str, str | int]:
    """What the numbers depend on; the GPUs' name comes with their speed, since asking here would take memory there."""
    from importlib.metadata import version

    names = ("torch", "megatron-core", "lightning")
    return {"device": options.device, "ranks": options.gpus, **{name: version(name) for name in names}}


def main() -> int:
    """Run, print, and say by the exit status whether all that must hold does."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks are killed on the way out
    lines = options.results.open("w") if options.results else None

    def write(line: dict[str, object]) -> None:
        print(json.dumps(line), flush=True)
        if lines is not None:
            print(json.dumps(line), file=lines, flush=True)

    write({"versions": versions(options)})
    results = run(options, lambda result: write(result.as_dict()))
    show(results)
    broken = [result.job for result in results if result.breaks]
    if broken:
        print(f"{len(broken)} failed: {'; '.join(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
