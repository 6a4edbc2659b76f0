"""Damaged directories of other tools end in one error that names what is wrong, in bounded time and memory."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop import damage_trial, damaged

SAMPLE = (
    *("gpt2:n_layer=1000000000", "gpt2:tie_word_embeddings='no'", "gpt2:config.json:endless", "gpt2:config.json:fifo"),
    *("model.safetensors:shifted_-4", "model.safetensors:header_twice", "model.safetensors:all_I32"),
    *("weight_map={'a': '../x'}", "shard:endless", "lightning_megatron.json:model/config/num_layers=1000000000"),
    *(
        "tokenizer:tokenizer.json:fifo",
        "tokenizer.json:added_tokens=[{'id': 100000000, 'cont",
        "generation:eos_token_id='x'",
    ),
)


def test_a_sample(tmp_path: Path) -> None:
    damage_trial.sources(tmp_path)
    chosen = [case for case in damaged.cases() if case.name in SAMPLE]
    assert len(chosen) == len(SAMPLE)
    found = {case.name: damage_trial.attempt(case, tmp_path) for case in chosen}
    assert {verdict for verdict, _ in found.values()} == {"named"}, found


def run(directory: Path) -> dict[str, tuple[str, str]]:
    """Verdict and message of every case, each in a process whose memory is limited."""
    damage_trial.sources(directory)
    found: dict[str, tuple[str, str]] = {}
    total, first = len(damaged.cases()), 0
    while first < total:
        command = [sys.executable, "-m", "tests.interop.damage_trial", str(directory), str(first)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        for line in done.stdout.splitlines():
            if line.startswith("["):
                number, name, verdict, said = json.loads(line)
                found[f"{number} {name}"], first = (verdict, said or done.stderr[-500:]), number + 1
        assert done.stdout, done.stderr[-2000:]
    return found


@pytest.mark.slow
def test_all(tmp_path: Path) -> None:
    found = run(tmp_path)
    counts = collections.Counter(verdict for verdict, _ in found.values())
    print(f"{len(found)} inputs: {dict(counts)}")
    left = {name: result for name, result in found.items() if result[0] != "named"}
    assert counts["named"] + counts["unclear"] == len(found), left
    assert counts["unclear"] < 0.02 * len(found), left
