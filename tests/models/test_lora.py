"""LoRA at every layout: the same training, the same model merged, and adapters in peft's form."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

import lightning_megatron as lm
from lightning_megatron.callbacks import InitialWeights
from lightning_megatron.checkpoint.run_state import MASTER
from lightning_megatron.checkpoint.shard_files import ShardFiles
from lightning_megatron.interop.convert import open_model, structure
from lightning_megatron.lora import LINEARS, is_adapter
from tests.checkpoint.runs import Case, make_trainer
from tests.cli.test_convert import command
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config
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
FC1_B = "decoder.layers.0.mlp.linear_fc1.adapter.lora_B"
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_peft_loads_the_adapter(ranks: RankPool, name: str, tmp_path: Path) -> None:
    """On top of the model that was trained on, it gives the logits of the trained one."""
    peft = pytest.importorskip("peft")
    model, batch = tiny.save(name, tmp_path / "theirs"), tiny.batch(name)
    before = tiny.outputs(model, batch)[1]
    after = run(ranks, "tp2_sp", tmp_path / "theirs", batch, tmp_path)[0][3]
    found = tiny.outputs(peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), batch)[1]
    torch.testing.assert_close(found, after, atol=2e-5, rtol=0)
    assert (found - before).abs().max() > 1e-2


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
    [(code, out, err)] = ranks.run(command, 1, *conversion(tmp_path / layout), "--verify")
    assert code == 0, err
    assert "the same model" in out


def restored(path: str, layout: dict[str, Any], batch: Batch, checkpoint: str, fused: bool) -> Any:
    """Logits and the next tokens of a checkpoint; runs on every rank."""
    module = make(path)
    module.fused = fused
    found = logits(module, layout, batch, ckpt_path=checkpoint, weights_only=False)
    tokens = module.generate([batch["input_ids"][0].tolist()], max_new_tokens=1)[0].new_tokens
    return found, tokens


def test_checkpoints_and_generation(ranks: RankPool, tmp_path: Path) -> None:
    """Adapters of TP=2 load at PP=2, beside a request for fused layers; decoding uses them, `convert` merges them."""
    tiny.save("llama", tmp_path / "theirs")
    batch = tiny.batch("llama")
    after = run(ranks, "tp2_sp", tmp_path / "theirs", batch, tmp_path)[0][3]
    for layout in ("pp2", "tp2"):
        arguments = (str(tmp_path / "theirs"), LAYOUTS[layout], batch, str(tmp_path / "last.ckpt"), layout == "pp2")
        for found, tokens in ranks.run(restored, 2, *arguments):
            torch.testing.assert_close(found, after, atol=2e-5, rtol=0)
            assert tokens == (int(after[0, -1].argmax()),)
    # One process merges them into the weights that all ranks together wrote.
    code, out, err = command(*conversion(tmp_path))
    assert code == 0, err
    assert "hub is written, with adapters merged into the weights." in out
    listed = [line.split() for line in structure(open_model(tmp_path / "last.ckpt"))]
    assert [FC1_B, "float32", "[96,", "4]"] in listed
    converted, gathered = (load_file(tmp_path / name / "model.safetensors") for name in ("hub", "merged"))
    assert converted.keys() == gathered.keys()
    for name, tensor in gathered.items():
        torch.testing.assert_close(converted[name], tensor, atol=1e-6, rtol=0)


def conversion(path: Path) -> list[Any]:
    """Arguments of ``convert`` for the checkpoint of a training."""
    return ["--load-path", path / "last.ckpt", "--save-path", path / "hub", "--to", "huggingface"]


class SaveAt(pl.Callback):
    """Saves after a step."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def four_steps(
    case: Case, lora: lm.LoRAConfig, model: dict[str, Any], path: str, resume: bool
) -> tuple[list[float], list[float]]:
    """Losses and norms of four steps with a checkpoint after two, or of those after the checkpoint; on every rank."""
    module, record = lm.GPTModule(tiny_config(**model), lm.OptimizerConfig(lr=1e-2)), Record()
    module.lora = lora
    trainer = make_trainer(case, record, *([] if resume else [SaveAt(2, path)]), max_steps=4)
    trainer.fit(module, SharedLoader(module), ckpt_path=path if resume else None, weights_only=False)
    return record.losses, record.norms


def straight_and_resumed(ranks: RankPool, case: Case, lora: lm.LoRAConfig, path: Path, **model: Any) -> list[float]:
    """Losses of four steps, of which the last two are the same, bit for bit, after a restart."""
    losses, norms = ranks.run(four_steps, case.world, case, lora, model, str(path), False)[0]
    assert len(losses) == 4
    again = ranks.run(four_steps, case.world, case, lora, model, str(path), True)
    assert all(rank == (losses[2:], norms[2:]) for rank in again)
    return losses


ONE = Case()
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
PP2_VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(2),
        Case(2, distributed=True, ddp=OVERLAP),
        Case(2, PP2_VPP2),
        Case(4, PP2_VPP2, distributed=True, ddp=OVERLAP),
        Case(4, TP2_SP, distributed=True),
        Case(2, {"context_parallel_size": 2}),
    ],
    ids=[
        "dp2",
        "dp2_distributed_overlap",
        "pp2_vpp2",
        "pp2_vpp2_dp2_distributed_overlap",
        "tp2_sp_dp2_distributed",
        "cp2",
    ],
)
def test_replicas_and_virtual_stages(ranks: RankPool, case: Case, tmp_path: Path) -> None:
    """The training of one process, which goes on from the checkpoint of any."""
    expected, norms = ranks.run(four_steps, 1, ONE, LORA, {}, str(tmp_path / "one"), False)[0]
    assert expected[0] - expected[3] > 0.01
    assert min(norms) > 0.01
    losses = straight_and_resumed(ranks, case, LORA, tmp_path / "many")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    here = ranks.run(four_steps, 1, ONE, LORA, {}, str(tmp_path / "many"), True)[0]
    torch.testing.assert_close(here, (expected[2:], norms[2:]), atol=1e-4, rtol=0)


def base(path: str) -> float:
    """Train all weights and save them; the loss of a batch with them."""
    module = lm.GPTModule(tiny_config(), lm.OptimizerConfig(lr=1e-2))
    trainer = make_trainer(ONE, max_steps=2)
    trainer.fit(module, SharedLoader(module))
    trainer.save_checkpoint(path)
    return float(trainer.validate(module, SharedLoader(module, length=8), verbose=False)[0]["val_loss"])


def on_top(case: Case, path: str, again: bool = False) -> Any:
    """Losses of adapters on top of a checkpoint without any, and whether nothing else has moved; on every rank."""
    module: Any
    if again:
        module, callbacks = lm.GPTModule.load_from_checkpoint(path, optimizer=lm.OptimizerConfig(lr=1e-2)), []
    else:
        module, callbacks = lm.GPTModule(tiny_config(), lm.OptimizerConfig(lr=1e-2)), [InitialWeights(path)]
    module.lora = LORA
    kept, record = Kept(), Record()
    trainer = make_trainer(case, *callbacks, kept, record, max_steps=3)
    trainer.fit(module, SharedLoader(module))
    moved = {name for name, weight in module.named_parameters() if not torch.equal(weight, kept.weights[name])}
    return record.losses, bool(moved) and all(map(is_adapter, moved))


class Kept(pl.Callback):
    """The weights before the first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}


def refused(lora: lm.LoRAConfig | None, path: str) -> str:
    module = lm.GPTModule(tiny_config(), lm.OptimizerConfig(lr=1e-2))
    module.lora = lora
    try:
        make_trainer(Case(2, TP2), max_steps=3).fit(module, SharedLoader(module), ckpt_path=path)
    except lm.CheckpointError as error:
        return str(error)
    return ""


def adapters_alone(path: str) -> str:
    module = lm.GPTModule(tiny_config(), lm.OptimizerConfig(lr=1e-2))
    module.lora = LORA
    try:
        make_trainer(ONE, InitialWeights(path, include=("*lora_*",)), max_steps=1).fit(module, SharedLoader(module))
    except lm.CheckpointError as error:
        return str(error)
    return ""


def test_adapters_on_top_of_a_checkpoint_without_any(ranks: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "base")
    loss = ranks.run(base, 1, path)[0]
    expected, only = ranks.run(on_top, 1, ONE, path)[0]
    assert only
    assert expected[0] == pytest.approx(loss, abs=1e-6)  # adapters begin with nothing
    assert expected[2] < expected[0] - 1e-3
    for losses, only in ranks.run(on_top, 2, Case(2, TP2_SP), path):
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
        assert only
    for message in ranks.run(refused, 2, LORA, path):
        assert "has no adapters of LoRA" in message
        assert f"InitialWeights('{path}')" in message


@pytest.mark.slow
def test_other_ways_to_and_from_adapters(ranks: RankPool, tmp_path: Path) -> None:
    path, adapted = str(tmp_path / "base"), str(tmp_path / "adapted")
    ranks.run(base, 1, path)
    assert ranks.run(on_top, 1, ONE, path, True) == ranks.run(on_top, 1, ONE, path)
    assert "missing in it" in ranks.run(adapters_alone, 1, path)[0]
    ranks.run(four_steps, 1, ONE, LORA, {}, adapted, False)
    for message in ranks.run(refused, 2, None, adapted):
        assert "Set module.lora to the LoRAConfig" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(2, PP2_VPP2),
        Case(2, distributed=True, ddp=OVERLAP),
        Case(2, TP2, precision="bf16-mixed"),
        Case(2, distributed=True, ddp=OVERLAP, precision="bf16-mixed"),
    ],
    ids=["pp2_vpp2", "dp2", "tp2_bf16", "dp2_bf16"],
)
def test_adapters_on_top_at_more_layouts(ranks: RankPool, case: Case, tmp_path: Path) -> None:
    path = str(tmp_path / "base")
    ranks.run(base, 1, path)
    expected = ranks.run(on_top, 1, ONE, path)[0][0]
    for losses, only in ranks.run(on_top, 2, case, path):
        torch.testing.assert_close(losses, expected, atol=1e-5 if case.precision == "32-true" else 0.02, rtol=0)
        assert only


@pytest.mark.slow
def test_dropout(ranks: RankPool, tmp_path: Path) -> None:
    """Where tensor-parallel ranks hold the same, they drop the same as one process; and a restart drops on."""
    columns = lm.LoRAConfig(rank=4, alpha=12, dropout=0.5, target_modules=("linear_qkv", "linear_fc1"))
    dropped, plain = (
        ranks.run(four_steps, 1, ONE, replace(columns, dropout=rate), {}, str(tmp_path / f"{rate}"), False)[0][0]
        for rate in (0.5, 0.0)
    )
    assert dropped[0] == plain[0]  # adapters begin with nothing
    assert min(abs(a - b) for a, b in zip(dropped[1:], plain[1:], strict=True)) > 1e-4
    model = {"hidden_dropout": 0.1}
    one = straight_and_resumed(ranks, ONE, columns, tmp_path / "one", **model)
    two = straight_and_resumed(ranks, Case(2, TP2), columns, tmp_path / "two", **model)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    everywhere, model = replace(LORA, dropout=0.5), {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    straight_and_resumed(ranks, Case(2, TP2_SP), everywhere, tmp_path / "sp", **model)
    straight_and_resumed(ranks, Case(2, distributed=True), everywhere, tmp_path / "dp", **model)


@pytest.mark.slow
def test_bf16(ranks: RankPool, tmp_path: Path) -> None:
    """fp32 copies of the adapters alone: steps smaller than bf16's are not lost, and a restart finds them."""
    expected = ranks.run(four_steps, 1, ONE, LORA, {}, str(tmp_path / "fp32"), False)[0][0]
    one = straight_and_resumed(ranks, Case(precision="bf16-mixed"), LORA, tmp_path / "one")
    torch.testing.assert_close(one, expected, atol=0.02, rtol=0)
    case = Case(4, TP2, distributed=True, precision="bf16-mixed")
    many = straight_and_resumed(ranks, case, LORA, tmp_path / "many")
    torch.testing.assert_close(many, one, atol=0.01, rtol=0)
    masters = [key for key in ShardFiles.open(tmp_path / "many").shapes if key.startswith(MASTER)]
    assert len(masters) == 2 * len(LINEARS)
    assert all(is_adapter(key) for key in masters)


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match=r"'linear_qvk', which is none of linear_qkv.*Did you mean 'linear_qkv'"):
        lm.LoRAConfig(target_modules=("linear_qvk",))
    with pytest.raises(ValueError, match="'q_proj', which is none of"):
        lm.LoRAConfig(target_modules=("q_proj",))
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        lm.LoRAConfig(rank=0)
    with pytest.raises(lm.ModuleError, match="no adapter to save"):
        lm.GPTModule(lm.GPTConfig.gpt2("small")).save_adapter("x")
