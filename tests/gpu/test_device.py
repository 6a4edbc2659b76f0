"""In fp32, training on a GPU and training on a CPU are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_megatron as lm
from tests.gpu.test_fused import BATCH, KINDS, ROOT, Record, config
from tests.helpers import quiet_trainer

NAMES = ("llama", "experts", "bert", "t5")
STEPS = 6
FIRST = 2
"""Steps before the checkpoint that the GPU starts from, since a CPU and a GPU draw other weights from a seed."""


def train(name: str, accelerator: str, start: Path | None = None, save: Path | None = None) -> list[float]:
    """Losses of the steps after the first :data:`FIRST`, which are skipped by ``start``, or end in ``save``."""
    record = Record()
    callbacks: list[Any] = [record]
    if save:
        callbacks.append(ModelCheckpoint(save.parent, save.name, every_n_train_steps=FIRST, save_top_k=-1))
    model = config(name, num_layers=2, hidden_size=64)
    build, batches = KINDS[type(model)]
    trainer = quiet_trainer(
        lm.MegatronStrategy(micro_batch_size=BATCH // 2, seed=7),
        1,
        accelerator=accelerator,
        precision="32-true",
        max_steps=STEPS,
        callbacks=callbacks,
        enable_checkpointing=bool(save),
        limit_val_batches=0,
    )
    module = build(model, lm.OptimizerConfig(lr=3e-4, lr_decay_style="constant"))
    trainer.fit(module, batches(STEPS), ckpt_path=start)
    return [float(loss) for loss in record.losses][0 if start else FIRST :]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Checkpoints, and the losses after them, of a process of their own, since one process keeps to one backend."""
    folder = tmp_path_factory.mktemp("cpu")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-m", "tests.gpu.test_device", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_a_cpu(on_cpu: tuple[Path, dict[str, list[float]]], name: str) -> None:
    folder, losses = on_cpu
    actual, expected = train(name, "gpu", folder / f"{name}-step={FIRST}.ckpt"), losses[name]
    print(f"{name}: CPU {expected}, GPU {actual}")
    assert len(expected) == STEPS - FIRST
    assert expected[-1] < expected[0]
    assert actual == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(json.dumps({name: train(name, "cpu", save=place / f"{name}-{{step}}") for name in NAMES}))
