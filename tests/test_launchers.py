"""Lightning's own launcher, torchrun, Slurm's environment, and a notebook's fork: the recipe trains under each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_megatron.data.indexed import IndexedDatasetWriter
from tests.ranks import free_port

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "pretrain.py"
TINY = [
    *("model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "model.vocab_size=256"),
    *("model.max_position_embeddings=16", "model.make_vocab_size_divisible_by=64", "data.global_batch_size=4"),
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.enable_progress_bar=false"),
    *("trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "logger=csv", "data.split='80,20,0'"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "corpus"
    with IndexedDatasetWriter(prefix) as writer:
        for document in range(40):
            writer.add_document([(document + i) % 256 for i in range(40)])
    return prefix


def train(command: list[str], corpus: Path, run_dir: Path, *overrides: str, **environment: str) -> None:
    result = subprocess.run(
        [*command, str(RECIPE), f"data.data_path={corpus}", f"run_dir={run_dir}", *TINY, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        cwd=run_dir.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def finished(run_dir: Path) -> None:
    """The run left a whole checkpoint at step 2, a log, and its configuration."""
    assert json.loads((run_dir / "checkpoints/last.ckpt/lightning_megatron.json").read_text())["model"]["module"]
    assert "val_loss" in (run_dir / "csv/version_0/metrics.csv").read_text().splitlines()[0]
    assert "max_steps: 2" in (run_dir / "config.yaml").read_text()


@pytest.mark.slow
def test_lightnings_own_launcher_starts_the_processes(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train([sys.executable], corpus, run_dir, "trainer.devices=2", "parallel=tp2")
    finished(run_dir)
    # The checkpoint goes on in another layout.
    train([sys.executable], corpus, tmp_path / "next", "trainer.devices=2", "parallel=pp2", "trainer.max_steps=3",
          "trainer.val_check_interval=1", f"ckpt_path={run_dir}/checkpoints/last.ckpt")  # fmt: skip
    assert (tmp_path / "next/checkpoints/last.ckpt").is_dir()


def test_torchrun(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    train(command, corpus, tmp_path / "run", "trainer.devices=2", "parallel=pp2")
    finished(tmp_path / "run")


@pytest.mark.slow
def test_slurm(corpus: Path, tmp_path: Path) -> None:
    """One task, as srun would start it: the world comes from SLURM_* alone."""
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    train([sys.executable], corpus, tmp_path / "run", "trainer.devices=1", **slurm)
    finished(tmp_path / "run")


@pytest.mark.slow
def test_fork_as_in_a_notebook(corpus: Path, tmp_path: Path) -> None:
    train([sys.executable], corpus, tmp_path / "run", "trainer.devices=2", "parallel=pp2", "parallel.start_method=fork")
    finished(tmp_path / "run")
