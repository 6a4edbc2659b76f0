"""What a user meets first, on a GPU: the doctor, the planner's choice, and what callbacks measure there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_megatron as lm
from tests.gpu.test_fused import SEQUENCE, VOCAB, Batches

ROOT = Path(__file__).parents[2]


def test_doctor() -> None:
    command = [
        sys.executable,
        "-m",
        "lightning_megatron.cli.main",
        "doctor",
        "--accelerator",
        "cuda",
        "--timeout",
        "120",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert "Self-test" in result.stdout, result.stdout + result.stderr
    test = result.stdout[result.stdout.index("Self-test") :]
    assert "problem" not in test.replace("No problem found", ""), test
    assert "fused Triton kernels" in result.stdout
    assert "cuda:0" in result.stdout


class Wall(pl.Callback):
    """Seconds of the host for all but the first steps, the device's work included."""

    def __init__(self, skip: int) -> None:
        self.skip, self.seconds = skip, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.skip:
            torch.cuda.synchronize()
            self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.cuda.synchronize()
        self.seconds += time.perf_counter()


def test_the_planners_choice_and_measurements() -> None:
    steps, skip = 60, 40
    wall, memory, throughput = Wall(skip), lm.callbacks.MemoryByRank(), lm.callbacks.Throughput(window=steps - skip)
    config = lm.GPTConfig(
        num_layers=4, hidden_size=1024, num_attention_heads=16, vocab_size=VOCAB, max_position_embeddings=SEQUENCE,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    trainer = pl.Trainer(
        strategy=lm.MegatronStrategy("auto"), accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=steps,
        log_every_n_steps=10, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[throughput, memory, lm.callbacks.Norms(), wall],
    )  # fmt: skip
    trainer.fit(lm.GPTModule(config), Batches(steps))
    assert str(trainer.strategy.layout) == "tp1"
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    parts = metrics["data_time"] + metrics["schedule_time"] + metrics["optimizer_time"]
    assert parts == pytest.approx(metrics["step_time"], rel=1e-4)
    # The device's own times, read without waiting for it, are those of the wall.
    assert metrics["step_time"] == pytest.approx(wall.seconds / (steps - skip), rel=0.25)
    assert 0 < metrics["mfu"] < 1
    assert metrics["memory/rank_0"] == pytest.approx(torch.cuda.max_memory_allocated() / 2**30, rel=0.05)
    assert metrics["param_norm"] > 0
