"""Time to save and load a checkpoint, against ``torch.save`` and ``torch.load`` of the same bytes, in one run.

Both sides write a new file, through to the disk (``fsync``), then put it in the place of the old one; both read what
the system has cached. The checkpoint does more: it sums every file, and verifies each tensor that it loads.

    python benchmarks/checkpoint.py --gigabytes 1

Sides take turns. The ratio of the best times is the one to look at, at most 1.3: it is what the machine can do when
nothing else runs. That of processor times tells what the work costs, where a slow disk hides it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_megatron.backends.shards import Box
from lightning_megatron.checkpoint.integrity import open_checked
from lightning_megatron.checkpoint.io import Snapshot, pickled
from lightning_megatron.checkpoint.metadata import CheckpointMetadata
from lightning_megatron.checkpoint.shard_files import Outline, ShardFiles
from lightning_megatron.checkpoint.together import Alone


def tensors(gigabytes: float) -> dict[str, torch.Tensor]:
    """As a Transformer and its optimizer have: matrices of 16 MiB, and small vectors."""
    found = {}
    for index in range(max(1, int(gigabytes * 64))):
        found[f"layer{index}.weight"] = torch.randn(2048, 2048)
        found[f"layer{index}.bias"] = torch.randn(2048)
    return found


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the clock, and of processors, which neighbours on a busy machine do not lengthen."""
    began, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - worked


def main() -> None:
    """Print a table with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", default=None, help="where to write; default: the system's temporary directory")
    args = parser.parse_args()
    state = tensors(args.gigabytes)
    into = {key: torch.empty_like(value) for key, value in state.items()}
    outlines = [
        Outline(key, tuple(value.shape), Box((0,) * value.dim(), tuple(value.shape)), value.dtype)
        for key, value in state.items()
    ]
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        plain, ours = Path(folder) / "plain.pt", Path(folder) / "ours.ckpt"
        metadata = CheckpointMetadata({}, {}, 1)

        def save_plain() -> None:
            new = plain.with_suffix(".new")
            with open(new, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, plain)

        def save_ours() -> None:
            Snapshot(ours, list(state.values()), [outlines], pickled({}), metadata).write(Alone())

        def load_plain() -> None:
            for key, value in torch.load(plain, weights_only=True).items():
                into[key].copy_(value)

        def load_ours() -> None:
            files = open_checked(ours).files
            for outline in outlines:
                files.read(outline.key, outline.box, into[outline.key])

        def load_unchecked() -> None:
            names = [path.name for path in ours.glob("*.distcp")]
            files = ShardFiles.open(ours, trusted=names)
            for outline in outlines:
                files.read(outline.key, outline.box, into[outline.key])

        works = {"save_plain": save_plain, "save_ours": save_ours, "load_plain": load_plain, "load_ours": load_ours}
        works |= {"load_unchecked": load_unchecked}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(args.repeats):  # in turn, so that a busy machine is fair to both
            for name, work in works.items():
                times[name].append(measure(work))
        assert all(torch.equal(into[key], value) for key, value in state.items())
    size = sum(value.nbytes for value in state.values())
    best = {name: min(clock for clock, _ in values) for name, values in times.items()}
    processor = {name: min(seconds for _, seconds in values) for name, values in times.items()}
    median = {name: statistics.median(seconds for seconds, _ in values) for name, values in times.items()}
    print(f"{size / 1e9:.2f} GB, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':>5} {'torch':>10} {'ours':>10} {'ratio of best':>14} {'of medians':>11} {'of processor':>13}")
    for kind in ("save", "load"):
        one, other = f"{kind}_ours", f"{kind}_plain"
        rates = " ".join(f"{size / best[name] / 1e9:>5.2f} GB/s" for name in (other, one))
        ratios = [of[one] / of[other] for of in (best, median, processor)]
        print(f"{kind:>5} {rates} {ratios[0]:>14.2f} {ratios[1]:>11.2f} {ratios[2]:>13.2f}")

    ratio, cost = (of["load_ours"] / of["load_unchecked"] for of in (best, processor))
    print(
        f"A load that compares every file takes {ratio:.2f} times as long as one that compares none, and {cost:.2f} "
        "times the processor time."
    )


if __name__ == "__main__":
    main()
