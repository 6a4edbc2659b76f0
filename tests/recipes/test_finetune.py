"""From a directory of Hugging Face to another, from the shell."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lightning_megatron.data import load_tokenizer, train_byte_level_bpe

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all"])
def test_finetune(tmp_path: Path, lora: bool) -> None:
    """Capitals are learnt at TP=2, and transformers knows them."""
    examples = [
        {"prompt": f"The capital of {land} is", "completion": f" {city}."}
        for land, city in {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}.items()
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples * 16))
    texts = [example["prompt"] + example["completion"] for example in examples] * 20
    theirs, tuned = tmp_path / "theirs", tmp_path / "tuned"
    tokenizer = load_tokenizer(train_byte_level_bpe(texts, 320, theirs))
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": len(tokenizer)}
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    transformers.GPT2LMHeadModel(config).save_pretrained(theirs)
    everything = "[linear_qkv,linear_proj,linear_fc1,linear_fc2]"
    command = [
        *(sys.executable, str(ROOT / "recipes/finetune.py"), f"pretrained={theirs}", f"save_path={tuned}"),
        *(f"data.train_path={tmp_path / 'train.jsonl'}", "data.seq_length=32", "data.global_batch_size=4"),
        *("trainer.accelerator=cpu", "trainer.devices=2", "parallel=tp2", "trainer.max_steps=60", "optim.lr=3e-3"),
        *(
            "trainer.enable_progress_bar=false",
            "trainer.log_every_n_steps=1",
            "logger=csv",
            "callbacks=none",
            f"run_dir={tmp_path / 'run'}",
        ),
        *(
            ["lora.rank=16", "lora.alpha=64", f"lora.target_modules={everything}", f"adapter_path={tmp_path / 'a'}"]
            if lora
            else ["lora=null"]
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "a/adapter_config.json").is_file() == lora
    with (tmp_path / "run/csv/version_0/metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]
    # All weights pass the plateau of cities without their lands, log(3) / 3; the logits of frozen embeddings stay flat.
    assert losses[-1] < (losses[0] - 1 if lora else 0.2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    for example in examples:
        ids = torch.tensor([tokenizer(example["prompt"] + example["completion"])["input_ids"]])
        start = len(tokenizer(example["prompt"])["input_ids"])
        with torch.no_grad():
            guesses = model(ids).logits.argmax(-1)
        assert torch.equal(guesses[0, start - 1 : -1], ids[0, start:])
