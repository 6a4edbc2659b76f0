"""Hugging Face directories into modules of any layout, and back: the same logits, the same bits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from tests.helpers import quiet_trainer
from tests.interop import tiny
from tests.models.runs import Batch, Shared, strategy
from tests.ranks import RankPool

LAYOUTS = {"tp1": {}, "tp2": {"tp": 2, "sp": True}, "pp2": {"pp": 2}, "tp2_pp2": {"tp": 2, "pp": 2}}


def run(path: str, layout: dict[str, Any], batch: Batch, save: str | None = None) -> Any:
    """Loss and logits of the directory's model, which is then saved again; runs on every rank."""
    module = lm.from_pretrained(path, return_logits="every_rank", make_vocab_size_divisible_by=4)
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]))
    result = trainer.predict(module, Shared(module, batch, 1))[0]
    if save is not None:
        module.save_pretrained(save, max_shard_size="40KB")
    return result["loss"], result["logits"]


def world(layout: dict[str, Any]) -> int:
    return int(layout.get("tp", 1)) * int(layout.get("pp", 1))


def check(ranks: RankPool, name: str, path: Path, layout: str, save: Path | None = None) -> None:
    model, batch = tiny.save(name, path), tiny.batch(name)
    loss, logits = tiny.outputs(model, batch)
    sizes = LAYOUTS[layout]
    for found in ranks.run(run, world(sizes), str(path), sizes, batch, None if save is None else str(save)):
        torch.testing.assert_close(found[0], loss, atol=2e-5, rtol=0)
        here, there = tiny.real(name, batch, found[1]), tiny.real(name, batch, logits)
        torch.testing.assert_close(here, there, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_there_and_back_at_tp2_pp2(ranks: RankPool, name: str, tmp_path: Path) -> None:
    """Logits, and every tensor bit for bit after Hugging Face -> TP2 x PP2 -> Hugging Face."""
    check(ranks, name, tmp_path / "theirs", "tp2_pp2", tmp_path / "ours")
    original = type(tiny.build(name)).from_pretrained(tmp_path / "theirs")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    again, report = type(original).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = original.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
@pytest.mark.parametrize(
    "name", [n if n in ("qwen2", "bert") else pytest.param(n, marks=pytest.mark.slow) for n in tiny.MODELS]
)
def test_logits(ranks: RankPool, name: str, layout: str, tmp_path: Path) -> None:
    check(ranks, name, tmp_path, layout)
