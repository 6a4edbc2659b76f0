"""Whether the data loader keeps a training step fed.

    python benchmarks/data_loading.py [--samples 16] [--step-ms 100] [--workers 2] [--seq-length 2048]

Reads batches of a random indexed dataset of 40 million tokens while the main process sleeps for the length of a
step. Prints a table: for each reader how long a step waited for its batch, on average and at most, and how many million
tokens a second the loader gives without a step. A wait of next to nothing means that a step of this length is kept fed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np

from lightning_megatron.data import IndexedDatasetWriter, PretrainingData
from lightning_megatron.data.indexed import Reader

_WARM_UP = 5


def write_dataset(prefix: Path, tokens: int) -> None:
    """Documents of about 800 random tokens."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        lengths = random.integers(1, 1600, tokens // 800)
        writer.add_documents(
            random.integers(0, 50000, int(lengths.sum())), lengths, np.ones(len(lengths), dtype=np.int64)
        )


def waits(module: PretrainingData, steps: int, step_seconds: float) -> list[float]:
    """Seconds that each step waited for its batch."""
    module.setup("fit")
    iterator = iter(module.train_dataloader())
    measured = []
    for _ in range(steps + _WARM_UP):
        started = time.perf_counter()
        next(iterator)
        measured.append(time.perf_counter() - started)
        time.sleep(step_seconds)
    return measured[_WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="of a step, on one data-parallel rank")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--step-ms", type=float, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "corpus"
        write_dataset(prefix, 40_000_000)
        tokens = args.samples * args.seq_length

        def module(reader: Reader) -> PretrainingData:
            return PretrainingData(
                prefix,
                seq_length=args.seq_length,
                global_batch_size=args.samples,
                split="1,0,0",
                reader=reader,
                num_workers=args.workers,
                vocab_size=50257,
            )

        print(
            f"{args.samples} samples of {args.seq_length} tokens, {args.workers} workers, {args.step_ms:.0f} ms a step"
        )
        print(f"{'reader':>7} {'mean wait':>10} {'longest':>9} {'without a step':>19}")
        for reader in get_args(Reader):
            slept = waits(module(reader), args.steps, args.step_ms / 1000)
            free = waits(module(reader), args.steps, 0.0)
            rate = tokens / statistics.mean(free) / 1e6
            mean, longest = 1e3 * statistics.mean(slept), 1e3 * max(slept)
            print(f"{reader:>7} {mean:>7.2f} ms {longest:>6.1f} ms {rate:>8.1f} M tokens/s", flush=True)


if __name__ == "__main__":
    main()
