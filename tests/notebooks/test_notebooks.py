"""Every notebook runs from its first cell to its last, in a process where Lightning sees a notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.notebooks.execute import cells

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(path: Path, directory: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).parent / "execute.py"), str(path)]
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.mark.slow
def test_first_steps(tmp_path: Path) -> None:
    output = run(ROOT / "notebooks/01_first_steps.ipynb", tmp_path)
    assert "model parallel rank (1, 1)" in output
    assert "MegatronStrategy('auto')" in output
    assert "Return a new" in output


@pytest.mark.slow
def test_custom_loss(tmp_path: Path) -> None:
    assert "train_rare_loss" in run(ROOT / "notebooks/02_custom_loss.ipynb", tmp_path)


@pytest.mark.slow
def test_fine_tuning_from_hugging_face(tmp_path: Path) -> None:
    output = run(ROOT / "notebooks/04_fine_tune_from_hugging_face.ipynb", tmp_path)
    assert "The capital of Greece is Athens." in output
    assert (tmp_path / "fine_tuning/ours/model.safetensors").is_file()


def test_plan_a_cluster(tmp_path: Path) -> None:
    assert "best: " in run(ROOT / "notebooks/03_plan_a_cluster.ipynb", tmp_path)
    assert len(list((tmp_path / "plan").glob("*.png"))) == 2


REFUSED = """
import sys
sys.ps1 = ">>> "
import lightning as L
import lightning_megatron as lm
try:
    L.Trainer(strategy=lm.MegatronStrategy("tp2"), accelerator="cpu", devices=2)
except Exception as error:
    print(type(error).__name__)
L.Trainer(strategy="megatron_notebook", accelerator="cpu", devices=2, logger=False)
"""


@pytest.mark.slow
def test_lightnings_default_launcher_is_refused_in_a_notebook() -> None:
    result = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "MisconfigurationException" in result.stdout


USED_THREADS = """
import sys
sys.ps1 = ">>> "
import torch, lightning as L, lightning_megatron as lm
big = torch.randn(1500, 1500)
((big @ big).tanh() + 1).sum()  # OpenMP's threads exist from now on, and no fork has them
rows = [{"input_ids": torch.randint(512, (64,))} for _ in range(64)]
config = lm.GPTConfig(
    num_layers=2, hidden_size=256, num_attention_heads=4, vocab_size=512, max_position_embeddings=64
)
trainer = L.Trainer(
    strategy=lm.MegatronStrategy("tp2", start_method="fork"), accelerator="cpu", devices=2, max_steps=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False,
)
trainer.fit(lm.GPTModule(config), torch.utils.data.DataLoader(rows, batch_size=32))
"""


@pytest.mark.slow
def test_a_notebook_that_has_computed_before_can_fork() -> None:
    result = subprocess.run(
        [sys.executable, "-c", USED_THREADS], env={**os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "`max_steps=2` reached" in result.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["nbformat"] == 4
    assert document["cells"][0]["cell_type"] == "markdown"
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in document["cells"])
    for source in cells(path):
        compile(source, path.name, "exec")
