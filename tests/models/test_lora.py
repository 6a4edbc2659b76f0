"""LoRA at every layout: the same training, the same model merged, and adapters in peft's form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lightning_megatron as lm
from lightning_megatron.lora import LINEARS, is_adapter
from tests.helpers import Record, quiet_trainer
from tests.interop import tiny
from tests.models.runs import Batch, Shared, strategy
from tests.ranks import RankPool

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2, "sp": True},
}
LORA = lm.LoRAConfig(rank=4, alpha=12, target_modules=LINEARS)


def make(path: str, lora: lm.LoRAConfig = LORA, **changes: Any) -> Any:
    changes = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "make_vocab_size_divisible_by": 4, **changes}
    module = lm.from_pretrained(path, lm.OptimizerConfig(lr=1e-2), return_logits="every_rank", **changes)
    module.lora = lora
    return module


def logits(module: Any, layout: dict[str, Any], batch: Batch, **options: Any) -> torch.Tensor:
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]))
    found: torch.Tensor = trainer.predict(module, Shared(module, batch, 1), **options)[0]["logits"]
    return found


def train(path: str, layout: dict[str, Any], batch: Batch, out: str, changes: dict[str, Any] | None = None) -> Any:
    """Losses and norms, logits before and after, and names of weights that changed; exports all; on every rank."""
    module, record = make(path, **(changes or {})), Record()
    before = logits(module, layout, batch)
    weights = {name: value.clone() for name, value in module.state_dict().items() if torch.is_tensor(value)}
    trainer = quiet_trainer(
        strategy(**layout), int(os.environ["WORLD_SIZE"]), max_steps=3, max_epochs=1, callbacks=[record]
    )
    trainer.fit(module, Shared(module, batch, 3))
    changed = [
        name for name, value in module.state_dict().items() if name in weights and (value != weights[name]).any()
    ]
    module.save_pretrained(f"{out}/merged")
    module.save_adapter(f"{out}/adapter")
    trainer.save_checkpoint(f"{out}/last.ckpt")
    frozen = all(parameter.requires_grad == is_adapter(name) for name, parameter in module.named_parameters())
    return record.losses, record.norms, before, logits(module, layout, batch), changed, frozen


def run(ranks: RankPool, layout: str, path: Path, batch: Batch, out: Path, **changes: Any) -> Any:
    sizes = LAYOUTS[layout]
    world = int(sizes.get("tp", 1)) * int(sizes.get("pp", 1))
    return ranks.run(train, world, str(path), sizes, batch, str(out), changes)


def applied(model: Any, path: Path) -> Any:
    """A model of transformers with an adapter added by hand."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    targets = {name.rpartition(".lora_")[0] for name in tensors}
    for target in targets:
        name = target.removeprefix("base_model.model.")
        assert any(name.endswith(f".{suffix}") for suffix in config["target_modules"])
        delta = scale * tensors[f"{target}.lora_B.weight"] @ tensors[f"{target}.lora_A.weight"]
        with torch.no_grad():
            model.get_submodule(name).weight += delta.t() if config["fan_in_fan_out"] else delta
    return model


def check_files(name: str, model: Any, batch: Batch, after: torch.Tensor, out: Path) -> None:
    merged = type(model).from_pretrained(out / "merged").eval()
    for found in (merged, applied(model, out / "adapter")):
        torch.testing.assert_close(after, tiny.outputs(found, batch)[1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "qwen2"))])
def test_training_and_export(ranks: RankPool, name: str, tmp_path: Path) -> None:
    model, batch = tiny.save(name, tmp_path / "theirs"), tiny.batch(name)
    base = tiny.outputs(model, batch)[1]
    reference: Any = None
    for layout in ("tp1", "tp2_sp", "pp2"):
        found = run(ranks, layout, tmp_path / "theirs", batch, tmp_path / layout)
        losses, norms, before, after, *_ = found[0]
        reference = reference or (losses, norms, after)
        torch.testing.assert_close(before, base, atol=2e-5, rtol=0)
        assert (after - before).abs().max() > 1e-2
        assert max(abs(a - b) for a, b in zip(losses, reference[0], strict=True)) < 1e-5
        assert max(abs(a - b) for a, b in zip(norms, reference[1], strict=True)) < 1e-4
        for *_, changed, frozen in found:
            assert frozen
            assert changed
            assert all(is_adapter(weight) for weight in changed)
        check_files(name, tiny.build(name), batch, after, tmp_path / layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "tp2_pp2"])
@pytest.mark.parametrize("changes", [{}, {"recompute_granularity": "full"}], ids=["plain", "recompute"])
def test_more_layouts(ranks: RankPool, layout: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if changes:
        changes = {**changes, "recompute_method": "uniform", "recompute_num_layers": 1}
    model, batch = tiny.save("llama", tmp_path / "theirs"), tiny.batch("llama")
    reference = run(ranks, "tp1", tmp_path / "theirs", batch, tmp_path / "tp1")[0]
    found = run(ranks, layout, tmp_path / "theirs", batch, tmp_path / layout, **changes)[0]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(reference[0]), atol=1e-5, rtol=0)
    check_files("llama", model, batch, found[3], tmp_path / layout)


def restored(path: str, layout: dict[str, Any], batch: Batch, checkpoint: str, fused: bool) -> Any:
    """Logits and the next tokens of a checkpoint; runs on every rank."""
    module = make(path)
    module.fused = fused
    found = logits(module, layout, batch, ckpt_path=checkpoint, weights_only=False)
    tokens = module.generate([batch["input_ids"][0].tolist()], max_new_tokens=1)[0].new_tokens
    return found, tokens


def test_checkpoints_and_generation(ranks: RankPool, tmp_path: Path) -> None:
    """Adapters of TP=2 load at PP=2, beside a request for fused layers; and decoding uses them."""
    tiny.save("llama", tmp_path / "theirs")
    batch = tiny.batch("llama")
    after = run(ranks, "tp2_sp", tmp_path / "theirs", batch, tmp_path)[0][3]
    for layout in ("pp2", "tp2"):
        arguments = (str(tmp_path / "theirs"), LAYOUTS[layout], batch, str(tmp_path / "last.ckpt"), layout == "pp2")
        for found, tokens in ranks.run(restored, 2, *arguments):
            torch.testing.assert_close(found, after, atol=2e-5, rtol=0)
            assert tokens == (int(after[0, -1].argmax()),)


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match=r"'linear_qvk', which is none of linear_qkv.*Did you mean 'linear_qkv'"):
        lm.LoRAConfig(target_modules=("linear_qvk",))
    with pytest.raises(ValueError, match="'q_proj', which is none of"):
        lm.LoRAConfig(target_modules=("q_proj",))
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        lm.LoRAConfig(rank=0)
    with pytest.raises(lm.ModuleError, match="no adapter to save"):
        lm.GPTModule(lm.GPTConfig.gpt2("small")).save_adapter("x")
