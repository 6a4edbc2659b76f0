"""Every kind of model trains from the shell, in processes of its own, on the demo's text."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lightning_megatron.checkpoint import verify
from lightning_megatron.data import IndexedDatasetWriter, load_tokenizer, train_byte_level_bpe
from lightning_megatron.data.corpus import python_documentation
from lightning_megatron.data.preprocessing.sentences import simple_sentences
from lightning_megatron.data.tokenizer import BERT_TOKENS, T5_TOKENS

ROOT = Path(__file__).parent.parent.parent
VOCABULARY = 4096

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for all objectives, and a dataset whose sequences are sentences."""
    directory = tmp_path_factory.mktemp("corpus")
    documents = list(islice(python_documentation(), 400))
    special = (*BERT_TOKENS, *T5_TOKENS)
    tokenizer = load_tokenizer(
        train_byte_level_bpe(documents, VOCABULARY, directory / "tokenizer", special_tokens=special)
    )
    with IndexedDatasetWriter(directory / "corpus", np.uint16) as writer:
        for document in documents:
            sentences = [ids for ids in tokenizer(simple_sentences(document))["input_ids"] if ids]
            writer.add_document([token for ids in sentences for token in ids], [len(ids) for ids in sentences])
    return directory


def run_recipe(name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe as from the shell."""
    command = [sys.executable, str(ROOT / "recipes" / name), "trainer.accelerator=cpu", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, env=environment)


def pretrain(corpus: Path, run: Path, devices: int, overrides: Sequence[str]) -> list[float]:
    """Train a few steps; the losses that were logged."""
    result = run_recipe(
        "pretrain.py",
        *(f"trainer.devices={devices}", f"run_dir={run}"),
        *(f"data.data_path={corpus / 'corpus'}", f"data.tokenizer={corpus / 'tokenizer'}", "data.split='950,50,0'"),
        *("trainer.max_steps=10", "trainer.val_check_interval=10", "trainer.limit_val_batches=2", "optim.lr=2e-3"),
        *("trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false"),
        *overrides,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with (run / "csv/version_0/metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]


@pytest.mark.parametrize(
    ("model", "devices", "overrides"),
    [
        ("bert_tiny", 4, ["data.objective=bert", "parallel=tp2_pp2"]),
        ("t5_tiny", 4, ["data.objective=t5", "parallel=tp2_pp2"]),
        ("t5_tiny", 4, ["data.objective=t5", "parallel=pp4", "parallel.micro_batch_size=4"]),
        ("moe_tiny", 2, ["parallel=single", "parallel.expert_model_parallel_size=2", "callbacks=robust"]),
        ("moe_tiny", 4, ["parallel=pp2", "parallel.expert_model_parallel_size=2", "parallel.micro_batch_size=4"]),
        ("llama_tiny", 4, ["parallel=tp2", "parallel.checkpoint.background=true"]),
    ],
    ids=["bert-tp2_pp2", "t5-tp2_pp2", "t5-pp4", "moe-ep2", "moe-pp2_ep2", "llama-tp2_dp2"],
)
def test_pretraining(corpus: Path, tmp_path: Path, model: str, devices: int, overrides: list[str]) -> None:
    losses = pretrain(corpus, tmp_path, devices, [f"model={model}", *overrides])
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    assert verify(tmp_path / "checkpoints/last.ckpt") == []


@pytest.mark.parametrize(
    ("model", "overrides", "layout"),
    [("gpt_tiny", [], "tp2_pp2"), ("t5_tiny", ["data.objective=t5"], "pp2")],
    ids=["gpt", "t5"],
)
def test_generation(corpus: Path, tmp_path: Path, model: str, overrides: list[str], layout: str) -> None:
    """From a checkpoint that names its tokenizer, the same text at two layouts."""
    pretrain(corpus, tmp_path / "run", 1, [f"model={model}", "trainer.max_steps=4", *overrides])
    checkpoint = f"checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}"
    prompts = 'prompts=["Return a new","The module"]'
    found = []
    for how in ([], [f"parallel={layout}"]):
        output = tmp_path / f"{len(found)}.jsonl"
        more = ["generation=sampled", "generation.max_new_tokens=8", f"output={output}", *how]
        result = run_recipe("generate.py", checkpoint, prompts, *more)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append([json.loads(line) for line in output.read_text().splitlines()])
    assert found[0] == found[1]
    assert [line["prompt"] for line in found[0]] == ["Return a new", "The module"]
    assert all(line["tokens"] for line in found[0])
    wrong = run_recipe("generate.py", checkpoint, prompts, "generation.max_new_tokens=100000")
    assert (wrong.returncode, "more than max_position_embeddings" in wrong.stderr) == (2, True)
    wrong = run_recipe("generate.py", checkpoint, prompts, "generation.top_k=5")
    assert (wrong.returncode, "top_k=5 changes nothing" in wrong.stderr) == (1, True)
