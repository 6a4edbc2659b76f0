"""What the Trainer costs: steps through Lightning beside steps of a bare megatron-core loop, in one process.

python benchmarks/trainer.py [--steps 20] [--rounds 3]

Both run the same chunk, gradient buffers and optimizer on the same batches; the loops take turns, so that a busy
machine is as busy for both. The ratio of the medians should be at most 1.03.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_megatron as lm
from lightning_megatron.backends import core

MICRO_BATCHES, MICRO_BATCH, SEQUENCE = 2, 4, 128


class Batches:
    """The same random batch again and again."""

    def __init__(self, config: lm.GPTConfig, length: int) -> None:
        text = torch.randint(0, config.vocab_size, (MICRO_BATCHES * MICRO_BATCH, SEQUENCE + 1))
        self.batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(self.length):
            yield dict(self.batch)


class StepTimes(pl.Callback):
    """Seconds from the end of one step to the end of the next: all that Lightning does is in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


def with_trainer(module: lm.GPTModule, steps: int) -> tuple[list[float], pl.Trainer]:
    """Step times of a fit."""
    times = StepTimes()
    trainer = pl.Trainer(
        strategy=lm.MegatronStrategy(micro_batch_size=MICRO_BATCH),
        accelerator="cpu",
        devices=1,
        max_steps=steps + 3,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(module.config, steps + 3))
    return times.seconds[2:], trainer


def bare(module: lm.GPTModule, trainer: pl.Trainer, steps: int) -> list[float]:
    """Step times of megatron-core's own calls, on what the fit has built."""
    strategy: Any = trainer.strategy
    chunk, optimizer = strategy._chunks[0], strategy.megatron_optimizer.core
    run = core.get_forward_backward_func(1, None)
    batch = module.prepare_batch(Batches(module.config, 1).batch)
    microbatches = [{k: v[i * MICRO_BATCH : (i + 1) * MICRO_BATCH] for k, v in batch.items()} for i in range(2)]

    def forward_step(data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
        b = next(data)
        output = model(b["tokens"], b["position_ids"], None, labels=b["labels"])

        def loss(losses: torch.Tensor) -> Any:
            total = (losses.float() * b["loss_mask"]).sum()
            return total, b["loss_mask"].sum().to(torch.int), {"loss": total.detach().clone()}

        return output, loss

    core.get_model_config(chunk).finalize_model_grads_func = core.finalize_model_grads
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=chunk,
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    config = lm.GPTConfig(
        num_layers=4,
        hidden_size=256,
        num_attention_heads=4,
        vocab_size=4096,
        max_position_embeddings=SEQUENCE,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    lightning, plain = [], []
    for _ in range(arguments.rounds):
        module = lm.GPTModule(config)
        times, trainer = with_trainer(module, arguments.steps)
        lightning += times
        plain += bare(module, trainer, arguments.steps)
    a, b = statistics.median(lightning), statistics.median(plain)
    print(f"Trainer {a * 1e3:.1f} ms, bare megatron-core loop {b * 1e3:.1f} ms per step: ratio {a / b:.3f}")


if __name__ == "__main__":
    main()
