"""Fused layers and loss against megatron-core's own modules, on CPU: values, layouts, checkpoints, fall-backs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lightning_megatron as lm
from lightning_megatron.models.fused import TensorParallel, linear_cross_entropy, reason_not_used
from lightning_megatron.models.fused.cross_entropy import VocabularyShard
from lightning_megatron.models.fused.layer import FusedTransformerLayer, reason_without_graphs
from lightning_megatron.models.fused.linear import handed_over, weight_gradient
from tests.distributed.test_layouts import LAYOUTS
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config

LLAMA = {
    "normalization": "RMSNorm",
    "activation": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "num_query_groups": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gelu": {"activation": "gelu"},
    "padded vocabulary": {"make_vocab_size_divisible_by": 96},
    "llama": LLAMA,
    "partial rotary": {**LLAMA, "rotary_percent": 0.5, "add_bias_linear": True},
    "recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "core attention recomputed": {"recompute_granularity": "selective"},
}


def train(
    world_size: int,
    fused: bool,
    strategy: dict[str, Any],
    model: dict[str, Any],
    precision: str = "32-true",
    load: str | None = None,
    save: str | None = None,
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of four steps; with ``save``, of one step that ends in a checkpoint."""
    record = Record()
    module = lm.GPTModule(tiny_config(**model), lm.OptimizerConfig(lr=5e-3, lr_warmup_steps=2))
    module.fused = fused
    strategy = lm.MegatronStrategy(micro_batch_size=2, **strategy)
    steps = 1 if save else 5 if load else 4
    trainer = quiet_trainer(strategy, world_size, max_steps=steps, callbacks=[record], precision=precision)
    trainer.fit(module, SharedLoader(module), ckpt_path=load)
    layers = [m for m in module.modules() if isinstance(m, FusedTransformerLayer)]
    assert bool(layers) == fused
    assert all(layer._reason is None for layer in layers)
    if save is not None:
        trainer.save_checkpoint(save)
    return record.losses, record.norms


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_unfused(ranks: Any, name: str) -> None:
    expected = ranks.run(train, 1, 1, False, {}, MODELS[name])[0]
    actual = ranks.run(train, 1, 1, True, {}, MODELS[name])[0]
    assert actual[0] == pytest.approx(expected[0], abs=3e-6)
    assert actual[1] == pytest.approx(expected[1], rel=3e-6)


def test_bf16_training_is_close_to_unfused(ranks: Any) -> None:
    expected = ranks.run(train, 1, 1, False, {}, {}, "bf16-mixed")[0]
    actual = ranks.run(train, 1, 1, True, {}, {}, "bf16-mixed")[0]
    assert actual[0] == pytest.approx(expected[0], abs=2e-3)
    assert actual[1] == pytest.approx(expected[1], rel=5e-3)


@pytest.fixture(scope="module")
def checkpoint(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One step of the small GPT-2, written unfused by one process."""
    path = str(tmp_path_factory.mktemp("fused") / "gpt2.ckpt")
    ranks.run(train, 1, 1, False, {}, {}, "32-true", None, path)
    return path


def compare_layout(ranks: Any, layout: str, model: dict[str, Any], path: str | None) -> None:
    world_size, strategy = LAYOUTS[layout]
    expected = ranks.run(train, 1, 1, False, {}, model, "32-true", path)[0]
    for actual in ranks.run(train, world_size, world_size, True, strategy, model, "32-true", path):
        assert actual[0] == pytest.approx(expected[0], abs=5e-6)
        assert actual[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("layout", ["tp2", "tp2 sp", "pp2 interleaved"])
def test_layouts_continue_an_unfused_checkpoint(ranks: Any, checkpoint: str, layout: str) -> None:
    """Names, shapes and shards are megatron-core's, and so are the numbers."""
    compare_layout(ranks, layout, {}, checkpoint)


@pytest.mark.parametrize("layout", ["tp4", "dp2 overlapped", "tp2 pp2 interleaved sp"])
def test_layouts_equal_one_unfused_process(ranks: Any, layout: str) -> None:
    compare_layout(ranks, layout, {}, None)


@pytest.mark.parametrize("layout", ["tp2", "tp2 sp", "pp2"])
def test_layouts_of_llama_equal_one_unfused_process(ranks: Any, layout: str) -> None:
    compare_layout(ranks, layout, LLAMA, None)


def test_dropout_is_the_same_again_when_recomputed(ranks: Any) -> None:
    dropout = {"hidden_dropout": 0.2}
    expected = ranks.run(train, 1, 1, True, {}, dropout)[0]
    again = ranks.run(train, 1, 1, True, {}, {**dropout, **MODELS["recomputed"]})[0]
    without = ranks.run(train, 1, 1, True, {}, {})[0]
    assert again[0] == pytest.approx(expected[0], abs=1e-6)
    assert abs(expected[0][0] - without[0][0]) > 1e-4


# ---------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("real", [50, 37])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients(keep_bytes: int, real: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_megatron.models.fused.cross_entropy._CHUNK_BYTES", 4 * 50 * 3)  # 3 tokens a chunk
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    bias = torch.randn(50, requires_grad=True)
    wanted = (hidden, weight, bias) if with_bias else (hidden, weight)
    labels = torch.randint(real, (2, 5))
    upstream = torch.randn(2, 5)
    shard = VocabularyShard(0, real, TensorParallel(None, 1, False), keep_bytes)
    loss = linear_cross_entropy(hidden, weight, labels, shard, bias if with_bias else None)
    actual = torch.autograd.grad(loss, wanted, upstream)
    logits = (hidden @ weight.t() + (bias if with_bias else 0.0))[..., :real]
    expected_loss = F.cross_entropy(logits.transpose(0, 1).transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(loss, expected_loss)
    for a, e in zip(actual, torch.autograd.grad(expected_loss, wanted, upstream), strict=True):
        torch.testing.assert_close(a, e)


# ------------------------------------------------------------------------------------------------- weight gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_adds_to_main_grad(dtype: torch.dtype) -> None:
    dy, x = torch.randn(6, 3, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    weight = torch.nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    assert torch.equal(weight_gradient(dy, x, weight), dy.t() @ x)  # type: ignore[arg-type]
    weight.main_grad = torch.ones(3, 4)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    placeholder = weight_gradient(dy, x, weight)
    assert placeholder is not None
    assert placeholder.shape == weight.shape
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(weight.main_grad, 1 + (dy.t() @ x).float())  # type: ignore[attr-defined]
    weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    assert not handed_over(weight).any()


# -------------------------------------------------------------------------------------------------------- reasons


def core_config(**changes: Any) -> Any:
    from lightning_megatron.backends.core import TransformerConfig

    return TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, **{"attention_dropout": 0.0, **changes}
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"num_moe_experts": 2}, "num_moe_experts"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection"),
        ({"activation_func": torch.tanh}, "activation_func"),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, "mlp"),
    ],
)
def test_configurations_that_run_unfused_say_why(changes: dict[str, Any], word: str) -> None:
    assert word in (reason_not_used(core_config(**changes)) or "")


def test_ordinary_configurations_are_fused_and_captured() -> None:
    assert reason_not_used(core_config()) is None
    assert reason_without_graphs(core_config()) is None
    assert "attention_dropout" in (reason_without_graphs(core_config(attention_dropout=0.1)) or "")  # of FP8 alone


def test_every_field_that_must_be_off_exists() -> None:
    """Fails when an upgrade of megatron-core renames one."""
    from lightning_megatron.models.fused.layer import _MUST_BE_OFF

    config = core_config()
    assert all(hasattr(config, name) for name in _MUST_BE_OFF)


@pytest.mark.slow
def test_kernels_in_triton_interpreter() -> None:
    """Every Triton kernel's values without a GPU, in a process of its own."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    script = str(root / "tests/models/check_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_other_calls_take_megatron_cores_path_and_keep_their_gradients() -> None:
    """A parameter whose last gradient was handed over gets the next one, from the unfused path, by autograd."""
    from lightning_megatron.models.fused.linear import gradients_come_by_autograd

    parameter = SimpleNamespace(grad_added_to_main_grad=True)
    x = torch.ones(2, requires_grad=True)
    out = 2 * x
    gradients_come_by_autograd(out, [parameter])
    assert out._base is None
    out.sum().backward()
    assert parameter.grad_added_to_main_grad is False
    assert torch.equal(x.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]
