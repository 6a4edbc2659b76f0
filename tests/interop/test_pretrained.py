"""Hugging Face directories into modules of any layout, and back: the same logits, the same bits."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from tests.helpers import quiet_trainer
from tests.interop import tiny
from tests.interop.tiny import status
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


@pytest.mark.parametrize(
    "name", tiny.some("gpt2", "llama", "mistral", "qwen2", "megatron_bert", "bert", "t5", "t5_v1_1", "mt5")
)
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
@pytest.mark.parametrize("name", tiny.some("qwen2"))
def test_logits(ranks: RankPool, name: str, layout: str, tmp_path: Path) -> None:
    check(ranks, name, tmp_path, layout)


def test_a_class_of_its_own(tmp_path: Path) -> None:
    """Each class takes its own kind, keeps changes, and a subclass stays one."""

    class Weighted(lm.GPTModule):
        pass

    tiny.save("gpt2", tmp_path)
    module = Weighted.from_pretrained(tmp_path, lm.OptimizerConfig(lr=0.5), hidden_dropout=0.25)
    assert type(module) is Weighted
    assert (module.config.hidden_dropout, module.config.num_layers, module.optimizer_config.lr) == (0.25, 2, 0.5)
    assert module.describe()["hugging_face"]["n_layer"] == 2
    with pytest.raises(lm.CheckpointError, match=r"holds a gpt2, which BertModule cannot be. Use GPTModule"):
        lm.BertModule.from_pretrained(tmp_path)
    with pytest.raises(lm.CheckpointError, match="nowhere does not exist"):
        lm.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(lm.CheckpointError, match=r"cannot be a model here.*unexpected keyword argument 'layers'"):
        lm.from_pretrained(tmp_path, layers=3)


def _other_shape(path: str) -> None:
    module = lm.from_pretrained(path)
    trainer = quiet_trainer(strategy(), int(os.environ["WORLD_SIZE"]))
    trainer.predict(module, [])


def test_config_of_another_model(ranks: RankPool, tmp_path: Path) -> None:
    tiny.save("gpt2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_positions": 12}))
    _, errors = ranks.attempt(_other_shape, 2, str(tmp_path))
    assert sorted(errors) == [0, 1]
    assert r"of the shape [16, 32], but the configuration says [12, 32]" in errors[1]


def _classify(path: str, layout: dict[str, Any], save: str) -> Any:
    module = lm.BertModule.from_pretrained(path, num_labels=3, return_logits="every_rank")
    batch = {**{k: v for k, v in tiny.batch("bert").items() if "label" not in k}, "labels": torch.tensor([0, 2])}
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]))
    logits = trainer.predict(module, Shared(module, batch, 1))[0]["logits"]
    module.save_pretrained(save)
    return logits


@pytest.mark.parametrize("name", ["megatron_bert", pytest.param("bert_mlm", marks=pytest.mark.slow)])
def test_finetuning_head(ranks: RankPool, name: str, tmp_path: Path) -> None:
    """A pre-trained BERT gets a head for three classes; transformers loads the result and agrees on all of it."""
    import transformers as hf

    tiny.save(name, tmp_path / "theirs")
    saved = tmp_path / "ours"
    found = ranks.run(_classify, 2, str(tmp_path / "theirs"), {"tp": 2}, str(saved))
    model = hf.AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.num_labels == 3
    batch = {key: value for key, value in tiny.batch(name).items() if "label" not in key}
    with torch.no_grad():
        torch.testing.assert_close(found[0], model(**batch).logits, atol=2e-5, rtol=0)
    expected = tiny.build(name).bert.encoder.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.bert.encoder.state_dict().items())


def _peak(path: str, small: str, layout: dict[str, Any]) -> tuple[int, int]:
    """The most memory that building and filling the chunks took, and what they hold."""
    world_size = int(os.environ["WORLD_SIZE"])
    quiet_trainer(strategy(**layout), world_size).predict(lm.from_pretrained(small), [])  # imports what there is
    trainer = quiet_trainer(strategy(**layout), world_size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    module = lm.from_pretrained(path)
    trainer.predict(module, [])
    return status("VmHWM") - before, sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_peak_memory_of_a_rank(ranks: RankPool, tmp_path: Path) -> None:
    """At most 1.3 times the rank's own shard and one tensor."""
    import transformers as hf

    sizes = {"n_layer": 8, "n_embd": 512, "n_head": 8, "vocab_size": 8192, "n_positions": 64}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "large", max_shard_size="20MB")
    tiny.save("gpt2", tmp_path / "small")
    largest = max(parameter.nbytes for parameter in model.parameters())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    for peak, held in ranks.run(_peak, 2, str(tmp_path / "large"), str(tmp_path / "small"), {"tp": 2}):
        assert held > 0.45 * whole
        assert peak < 1.3 * held + largest, f"{peak / 2**20:.1f} MiB for {held / 2**20:.1f} MiB"
        print(f"peak {peak / 2**20:.1f} MiB, shard {held / 2**20:.1f} MiB, largest tensor {largest / 2**20:.1f} MiB")


def test_every_rank_hears_of_a_failed_save(ranks: RankPool, tmp_path: Path) -> None:
    tiny.save("gpt2", tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    arguments = (str(tmp_path / "theirs"), LAYOUTS["tp2"], tiny.batch("gpt2"), str(tmp_path / "ours"))
    _, errors = ranks.attempt(run, 2, *arguments)
    assert sorted(errors) == [0, 1]
    assert all("ours exists already. Give a new or an empty directory" in error for error in errors.values())
    assert sorted(tmp_path.iterdir()) == [tmp_path / "ours", tmp_path / "theirs"]
