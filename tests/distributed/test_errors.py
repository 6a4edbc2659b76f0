"""Bad input: one clear error on every rank, with the values, before anything waits."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_megatron as lm
from tests.helpers import Record, SharedLoader, Tokens, plain_loader, quiet_trainer, tiny_config


def fit(
    world_size: int, sizes: dict[str, Any], model: dict[str, Any] | None = None, load: str | None = None
) -> list[float]:
    record = Record()
    module = lm.GPTModule(tiny_config(**(model or {})))
    trainer = quiet_trainer(lm.MegatronStrategy(**sizes), world_size, max_steps=2, callbacks=[record])
    trainer.fit(module, SharedLoader(module), ckpt_path=load)
    return record.losses


TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
EP = "expert_model_parallel_size"

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str, list[str]]] = {
    "world size": (3, {TP: 2}, {}, "LayoutError", ["world size of 3", "tensor_model_parallel_size=2", "devices="]),
    "heads": (2, {TP: 2}, {"num_attention_heads": 1}, "LayoutError", ["num_attention_heads=1", "size=2"]),
    "query groups": (4, {TP: 4}, {"num_query_groups": 1, "num_attention_heads": 2}, "LayoutError", ["=2", "=4"]),
    "ffn": (2, {TP: 2}, {"ffn_hidden_size": 33}, "LayoutError", ["ffn_hidden_size=33", "size=2"]),
    "experts": (2, {EP: 2}, {"num_moe_experts": 3}, "LayoutError", ["num_moe_experts=3", "size=2", "fit: 1, 3"]),
    "no experts": (2, {EP: 2}, {}, "LayoutError", ["expert_model_parallel_size=2", "no experts", "num_moe_experts"]),
    "layers": (2, {PP: 2}, {"num_layers": 3}, "LayoutError", ["num_layers=3", "3 layers for 2", "first_pipeline"]),
    "chunks": (2, {PP: 2, VPP: 3}, {}, "LayoutError", ["2 layers", "virtual_pipeline_model_parallel_size=3"]),
    "uneven": (2, {PP: 2, "num_layers_in_first_pipeline_stage": 9}, {}, "LayoutError", ["num_layers=4", "9"]),
    "sequence": (2, {TP: 2, "sequence_parallel": True}, {"max_position_embeddings": 15}, "DataError", ["16", "15"]),
    "vocabulary": (1, {}, {"vocab_size": 100}, "DataError", ["vocab_size=100", "another tokenizer"]),
    "checkpoint": (
        2,
        {PP: 2},
        {"hidden_size": 64},
        "CheckpointError",
        ["another model", "32", "64"],
    ),
    "no checkpoint": (1, {}, {}, "CheckpointError", ["no checkpoint at", "nowhere"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_error_on_every_rank(name: str, ranks: Any, tmp_path: Path) -> None:
    world_size, sizes, model, kind, words = CASES[name]
    load = None
    if name == "checkpoint":
        load = str(tmp_path / "other.ckpt")
        ranks.run(save, 1, load)
    elif name == "no checkpoint":
        load = "nowhere.ckpt"
    started = time.monotonic()
    _, errors = ranks.attempt(fit, world_size, world_size, sizes, model, load)
    assert sorted(errors) == list(range(world_size))
    for text in errors.values():
        last = text[text.rindex(f"{kind}: ") :]
        for word in words:
            assert word in last
    assert time.monotonic() - started < 60


def save(path: str) -> None:
    module = lm.GPTModule(tiny_config())
    trainer = quiet_trainer(lm.MegatronStrategy(), 1, max_steps=1)
    trainer.fit(module, SharedLoader(module))
    trainer.save_checkpoint(path)


def test_layouts_that_cannot_exist() -> None:
    with pytest.raises(lm.LayoutError, match=r"sequence_parallel=True .* tensor_model_parallel_size=1"):
        lm.MegatronStrategy(sequence_parallel=True)
    with pytest.raises(lm.LayoutError, match=r"interleaves .* pipeline_model_parallel_size=1"):
        lm.MegatronStrategy(virtual_pipeline_model_parallel_size=2)
    with pytest.raises(lm.LayoutError, match="tensor_model_parallel_size=0"):
        lm.MegatronStrategy(tensor_model_parallel_size=0)
    with pytest.raises(lm.LayoutError, match="overlap_param_gather=True needs"):
        lm.MegatronStrategy(overlap_param_gather=True)
    with pytest.raises(lm.LayoutError, match="micro_batch_size=0"):
        lm.MegatronStrategy(micro_batch_size=0)


def test_experts_that_cannot_be_split() -> None:
    split = lm.ParallelLayout(tensor_model_parallel_size=2)
    with pytest.raises(lm.LayoutError, match=r"tensor_model_parallel_size=2 need sequence_parallel=True"):
        split.check_experts(4, add_bias_linear=False)
    split = lm.ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True)
    split.check_experts(4, add_bias_linear=False)
    with pytest.raises(lm.LayoutError, match=r"biases .* tensor_model_parallel_size=2 .* Set add_bias_linear=False"):
        split.check_experts(4, add_bias_linear=True)


def test_gloo_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it crashes: megatron-core reduces gradients in ways that gloo has for the host alone."""
    strategy = lm.MegatronStrategy(process_group_backend="gloo")
    monkeypatch.setattr(type(strategy), "root_device", torch.device("cuda", 0))
    monkeypatch.setattr(type(strategy), "world_size", 1)
    with pytest.raises(lm.LayoutError, match=r"process_group_backend='gloo' .* cuda:0\. .* 'nccl'"):
        strategy.setup_environment()


class Plain(pl.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.zeros((), requires_grad=True)


class Manual(lm.GPTModule):
    def __init__(self) -> None:
        super().__init__(tiny_config())
        self.automatic_optimization = False


class OtherOptimizer(lm.GPTModule):
    def __init__(self) -> None:
        super().__init__(tiny_config())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_module(kind: str) -> None:
    modules = {"plain": Plain, "manual": Manual, "optimizer": OtherOptimizer}
    quiet_trainer(lm.MegatronStrategy(), 1, max_steps=1).fit(modules[kind](), plain_loader(2))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("plain", "got Plain. Derive it from MegatronModule"),
        ("manual", "Manual sets automatic_optimization=False"),
        ("optimizer", "returned ['SGD']"),
    ],
)
def test_modules_that_the_strategy_cannot_run(kind: str, message: str, ranks: Any) -> None:
    _, errors = ranks.attempt(fit_module, 1, kind)
    assert "ModuleError" in errors[0]
    assert message in errors[0]


def context_parallel(kind: str) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    module = lm.BertModule(lm.BertConfig(**sizes)) if kind == "bert" else lm.T5Module(lm.T5Config(**sizes))
    quiet_trainer(lm.MegatronStrategy(context_parallel_size=2), 2, max_steps=1).fit(module, plain_loader(2))


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param("bert", "BertModule", marks=pytest.mark.slow), ("t5", "T5Module")]
)
def test_context_parallelism_is_for_gpt(kind: str, name: str, ranks: Any) -> None:
    _, errors = ranks.attempt(context_parallel, 2, kind)
    assert sorted(errors) == [0, 1]
    for text in errors.values():
        assert f"LayoutError: {name} has no context parallelism, but context_parallel_size=2" in text


def megatron_module_elsewhere() -> None:
    quiet_trainer("ddp", 1, max_steps=1).fit(lm.GPTModule(tiny_config()), plain_loader(2))


def test_a_megatron_module_under_another_strategy(ranks: Any) -> None:
    _, errors = ranks.attempt(megatron_module_elsewhere, 1)
    assert "needs `Trainer(strategy='megatron')`" in errors[0]


class Broken(Tokens):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 5:
            raise OSError("shard 7 is gone")
        return super().__getitem__(index)


def broken_data() -> None:
    strategy = lm.MegatronStrategy(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    trainer = quiet_trainer(strategy, 4, max_steps=4)
    trainer.fit(lm.GPTModule(tiny_config()), DataLoader(Broken(), batch_size=4))


def test_a_reading_error_reaches_every_rank(ranks: Any) -> None:
    _, errors = ranks.attempt(broken_data, 4)
    assert len(errors) == 4
    for text in errors.values():
        assert "DataError: Rank 0 reads for this replica of the model, and failed: OSError: shard 7 is gone" in text


def strange_batches() -> None:
    trainer = quiet_trainer(lm.MegatronStrategy(pipeline_model_parallel_size=2), 2, max_steps=1)
    loader = DataLoader(torch.zeros(8, 4), batch_size=2, collate_fn=lambda samples: {"images": torch.stack(samples)})
    trainer.fit(lm.GPTModule(tiny_config()), loader)


def test_a_batch_of_another_kind_names_its_keys(ranks: Any) -> None:
    _, errors = ranks.attempt(strange_batches, 2)
    assert len(errors) == 2
    assert all("has the keys ['images']" in text for text in errors.values())


class Die(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            os._exit(7)


def one_dies(sizes: dict[str, Any]) -> None:
    module = lm.GPTModule(tiny_config())
    trainer = quiet_trainer(lm.MegatronStrategy(**sizes), 2, max_steps=100, callbacks=[Die()])
    trainer.fit(module, SharedLoader(module))


@pytest.mark.parametrize("sizes", [{TP: 2}, {PP: 2}, {}])
def test_the_others_stop_within_a_minute_of_a_rank_that_dies(sizes: dict[str, Any], ranks: Any) -> None:
    started = time.monotonic()
    _, errors = ranks.attempt(one_dies, 2, sizes)
    assert "exit code 7" in errors[1]
    assert 0 in errors
    assert "did not finish" not in errors[0]
    assert time.monotonic() - started < 60
