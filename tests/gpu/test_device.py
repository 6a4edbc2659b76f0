"""In fp32, training on a GPU and training on a CPU are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_megatron as lm
from tests.gpu.test_fused import BATCH, KINDS, ROOT, Record, config
from tests.helpers import quiet_trainer

STEPS = 6
FIRST = 2
"""Steps before the checkpoint from which both start, since a CPU and a GPU draw other weights from a seed."""


def train(name: str, accelerator: str, start: str | None, save: str | None) -> list[float]:
    """Losses of a fit that begins at ``start`` or ends at ``save``."""
    record = Record()
    model = config(name, num_layers=2, hidden_size=64)
    build, batches = KINDS[type(model)]
    trainer = quiet_trainer(
        lm.MegatronStrategy(micro_batch_size=BATCH // 2, seed=7),
        1,
        accelerator=accelerator,
        precision="32-true",
        max_steps=FIRST if save else STEPS,
        callbacks=[record],
        limit_val_batches=0,
    )
    module = build(model, lm.OptimizerConfig(lr=3e-4, lr_decay_style="constant"))
    trainer.fit(module, batches(STEPS), ckpt_path=start)
    if save:
        trainer.save_checkpoint(save)
    return [float(loss) for loss in record.losses]


def apart(name: str, accelerator: str, start: Path | None = None, save: Path | None = None) -> list[float]:
    """What :func:`train` gives in a process of its own, since one process keeps to one backend."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tests.gpu.test_device", name, accelerator, str(start or ""), str(save or "")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return losses


@pytest.mark.parametrize("accelerator", ["gpu"])
@pytest.mark.parametrize("name", ["llama", "experts", "bert", "t5"])
def test_losses_are_those_of_a_cpu(tmp_path: Path, name: str, accelerator: str) -> None:
    apart(name, "cpu", save=tmp_path / "start")
    expected = apart(name, "cpu", tmp_path / "start")
    actual = apart(name, accelerator, tmp_path / "start")
    print(f"{name}: CPU {expected}, GPU {actual}")
    assert len(expected) == STEPS - FIRST
    assert expected[-1] < expected[0]
    assert actual == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], sys.argv[2], sys.argv[3] or None, sys.argv[4] or None)))
