"""Whether training goes on while a checkpoint is written in the background.

    python benchmarks/background_save.py

A Trainer trains a small GPT on one process and saves every few steps, once with ``CheckpointOptions(background=True)``
and once without. Prints a table of medians: a step during which nothing is written, the step right after a save, and
how long the call that saves keeps the Trainer (in the background: a copy of the state to other memory, after which a
thread writes). The ratio to look at is "step after / normal", at most 1.2.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_megatron as lm
from lightning_megatron.checkpoint import CheckpointOptions


class Batches:
    """The same random batch again and again."""

    def __init__(self, vocab_size: int, batch: int, sequence: int, steps: int) -> None:
        text = torch.randint(0, vocab_size, (batch, sequence + 1))
        self.batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(self.steps):
            yield dict(self.batch)


class SaveEvery(pl.Callback):
    """Saves every few steps, and sorts the times of steps by whether a checkpoint was being written."""

    def __init__(self, path: Path, every: int, warm_up: int) -> None:
        self.path, self.every, self.warm_up = path, every, warm_up
        self.normal: list[float] = []
        self.after: list[float] = []
        self.calls: list[float] = []
        self._began, self._saved_in, self._busy = 0.0, -1, False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to time a step."""
        self._began = time.perf_counter()
        self._busy = self._writing(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Time the step, and save if it is its turn."""
        seconds = time.perf_counter() - self._began
        if batch_idx >= self.warm_up:
            if batch_idx == self._saved_in + 1:
                self.after.append(seconds)
            elif not (self._busy or self._writing(trainer)):
                self.normal.append(seconds)
        if batch_idx >= self.warm_up and (batch_idx - self.warm_up) % self.every == 0:
            began = time.perf_counter()
            trainer.save_checkpoint(self.path, weights_only=False)
            self.calls.append(time.perf_counter() - began)
            self._saved_in = batch_idx

    @staticmethod
    def _writing(trainer: pl.Trainer) -> bool:
        strategy = trainer.strategy
        assert isinstance(strategy, lm.MegatronStrategy)
        return strategy.saving_in_background


def measure(background: bool, args: argparse.Namespace) -> SaveEvery:
    """Train, and return the times."""
    config = lm.GPTConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.hidden // 64,
        vocab_size=8192,
        max_position_embeddings=args.sequence,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    steps = args.warm_up + args.saves * args.every
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        times = SaveEvery(Path(folder) / "last.ckpt", args.every, args.warm_up)
        trainer = pl.Trainer(
            accelerator=args.device,
            devices=1,
            strategy=lm.MegatronStrategy(checkpoint=CheckpointOptions(background=background)),
            precision="bf16-mixed" if args.device == "gpu" else "32-true",
            max_steps=steps,
            callbacks=[times],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        module = lm.GPTModule(config)
        trainer.fit(module, Batches(config.vocab_size, args.batch, args.sequence, steps))
        size = sum(file.stat().st_size for file in times.path.iterdir())
    print(f"{'background' if background else 'at once':>10}: {size / 1e6:.0f} MB a checkpoint", flush=True)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--every", type=int, default=6, help="steps between saves; enough for the writing to end")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where to write; default: the system's temporary directory")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for background in (True, False):
        times = measure(background, args)
        normal, after = statistics.median(times.normal), statistics.median(times.after)
        rows.append(("background" if background else "at once", normal, after, after / normal, times))
    print(f"{'save':>10} {'normal step':>12} {'step after':>11} {'step after / normal':>20} {'the call':>9}")
    for name, normal, after, ratio, times in rows:
        call = statistics.median(times.calls)
        print(f"{name:>10} {normal * 1e3:>9.1f} ms {after * 1e3:>8.1f} ms {ratio:>20.2f} {call * 1e3:>6.0f} ms")


if __name__ == "__main__":
    main()
