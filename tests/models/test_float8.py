"""FP8 layers on CPU, where torch multiplies FP8 too: errors of values, curves, layouts, accumulation, checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.models.fused import float8_reference as reference
from lightning_megatron.models.fused.float8 import LayerFloat8, Slot
from lightning_megatron.models.fused.types import Cast
from lightning_megatron.precision import DtypePolicy
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config

LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "num_query_groups": 2,
}
MODELS: dict[str, dict[str, Any]] = {"gpt2": {}, "llama": LLAMA}
EVERYTHING = lm.Float8()
WITHOUT_WEIGHT_GRADIENTS = lm.Float8(weight_gradients=False)
"""All products in FP8, which only a CPU allows so far."""


class Gradients(pl.Callback):
    """Of each step, before the optimizer."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.steps.append({name: g.float().clone() for name, g in trainer.strategy.gradients()})


def train(
    fp8: lm.Float8 | None,
    model: dict[str, Any],
    strategy: dict[str, Any] | None = None,
    steps: int = 4,
    lr: float = 5e-3,
    load: str | None = None,
    save: str | None = None,
    precision: str = "bf16-mixed",
) -> tuple[list[float], list[float], list[dict[str, torch.Tensor]]]:
    """Losses, gradient norms and, at a learning rate of zero, gradients."""
    record, gradients = Record(), Gradients()
    module = lm.GPTModule(tiny_config(**model), lm.OptimizerConfig(lr=lr, lr_warmup_steps=2))
    module.fused = True
    plugin = lm.MegatronPrecision(precision, fp8=fp8 or False)  # type: ignore[arg-type]
    trainer = quiet_trainer(
        lm.MegatronStrategy(**(strategy or {})),
        int(os.environ["WORLD_SIZE"]),
        max_steps=steps,
        max_epochs=100,
        callbacks=[record] if lr else [record, gradients],
        plugins=[plugin],
    )
    trainer.fit(module, SharedLoader(module), ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    return record.losses, record.norms, gradients.steps


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((actual - expected).norm() / expected.norm())


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All of them in one."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [
        ("gpt2", EVERYTHING, 0.12),
        ("llama", EVERYTHING, 0.12),
        ("llama", lm.Float8(gradients="e4m3"), 0.08),
        ("llama", WITHOUT_WEIGHT_GRADIENTS, 0.09),
    ],
)
def test_gradients_are_within_the_rounding_of_fp8(ranks: Any, name: str, options: lm.Float8, bound: float) -> None:
    """All gradients together within 5% of float32's, and each weight's within ``bound``.

    A product of two E4M3 operands is off by about 3.7%, with an E5M2 operand 6%, and four layers lie in a row. Step 1
    measures its tensors, the others take the scales of the steps before; the weights do not change.
    """
    expected = ranks.run(train, 1, None, MODELS[name], {}, 3, 0.0, None, None, "32-true")[0]
    actual = ranks.run(train, 1, options, MODELS[name], {}, 3, 0.0)[0]
    assert actual[0] == pytest.approx(expected[0], rel=1e-3)
    for gradients, exact in zip(actual[2], expected[2], strict=True):
        assert distance(flat(gradients), flat(exact)) < 0.05
        for key in exact:
            if exact[key].dim() == 2:
                assert distance(gradients[key], exact[key]) < bound, key


@pytest.mark.parametrize("name", MODELS)
def test_loss_curve_follows_bf16(ranks: Any, name: str) -> None:
    expected = ranks.run(train, 1, None, MODELS[name], {}, 30)[0][0]
    actual = ranks.run(train, 1, EVERYTHING, MODELS[name], {}, 30)[0][0]
    assert expected[-1] < 0.8 * expected[0]
    assert actual == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("name", "layout"), [("gpt2", {}), ("llama", {"sequence_parallel": True})])
def test_tensor_parallel_equals_one_rank(ranks: Any, name: str, layout: dict[str, Any]) -> None:
    """Scales are powers of two, so a part of a tensor rounds as in the whole."""
    expected = ranks.run(train, 1, EVERYTHING, MODELS[name], {}, 3, 0.0)[0]
    strategy = {"tensor_model_parallel_size": 2, **layout}
    for actual in ranks.run(train, 2, EVERYTHING, MODELS[name], strategy, 3, 0.0):
        assert actual[0] == pytest.approx(expected[0], rel=1e-4)
        assert actual[1] == pytest.approx(expected[1], rel=5e-3)


@pytest.mark.parametrize("options", [EVERYTHING, WITHOUT_WEIGHT_GRADIENTS])
def test_gradients_of_microbatches_add_up(ranks: Any, options: lm.Float8) -> None:
    whole = ranks.run(train, 1, options, LLAMA, {}, 3, 0.0)[0][2]
    parts = ranks.run(train, 1, options, LLAMA, {"micro_batch_size": 2}, 3, 0.0)[0][2]
    for gradients, expected in zip(parts, whole, strict=True):
        assert distance(flat(gradients), flat(expected)) < 0.03


def test_pipeline_keeps_the_scales_of_each_microbatch(ranks: Any) -> None:
    """Several forwards come before the first backward."""
    expected = ranks.run(train, 1, EVERYTHING, LLAMA, {"micro_batch_size": 2})[0]
    strategy = {"pipeline_model_parallel_size": 2, "micro_batch_size": 2}
    for actual in ranks.run(train, 2, EVERYTHING, LLAMA, strategy):
        assert actual[0] == pytest.approx(expected[0], abs=5e-3)
        assert actual[1] == pytest.approx(expected[1], rel=0.03)


def test_bf16_gradient_buffers(ranks: Any) -> None:
    expected = ranks.run(train, 1, None, LLAMA, {"micro_batch_size": 4}, 4, 5e-3, None, None, "bf16-true")[0]
    actual = ranks.run(train, 1, EVERYTHING, LLAMA, {"micro_batch_size": 4}, 4, 5e-3, None, None, "bf16-true")[0]
    assert actual[0] == pytest.approx(expected[0], rel=0.01)


def test_checkpoint_resumes_and_is_that_of_bf16(ranks: Any, tmp_path: Path) -> None:
    """Scales are measured again, so the resumed run is as close as two roundings are; either precision loads it."""
    path = str(tmp_path / "two_steps.ckpt")
    straight = ranks.run(train, 1, EVERYTHING, LLAMA)[0][0]
    ranks.run(train, 1, EVERYTHING, LLAMA, {}, 2, 5e-3, None, path)
    for options in (EVERYTHING, None):
        resumed = ranks.run(train, 1, options, LLAMA, {}, 4, 5e-3, path)[0][0]
        assert resumed == pytest.approx(straight[2:], abs=0.01)


# ------------------------------------------------------------------------------------------------------------ scales


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scale_is_the_largest_power_of_two_that_fits(dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    amax = torch.tensor([limit, limit * 1.001, limit / 2, 1.0, 1e-6, 0.0, float("inf"), float("nan"), 1e-38])
    scale = reference.scale_for(amax, dtype)
    assert scale[:3].tolist() == [1.0, 0.5, 2.0]
    assert ((amax * scale)[3:5] <= limit).all()
    assert ((amax * scale)[3:5] > limit / 2).all()
    assert scale[5:].tolist() == [1.0, 1.0, 1.0, 2.0**64]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_growth_past_the_scale_saturates(dtype: torch.dtype) -> None:
    cast = Cast(dtype, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0), dynamic=False, beside="columns")
    quantized = reference.quantize(torch.tensor([[1e9, -1e9, float("inf"), 0.5]]), cast)
    limit = torch.finfo(dtype).max
    assert quantized.rows.float().tolist() == [[limit, -limit, limit, 0.5]]
    assert cast.amax == float("inf")


def layer(options: lm.Float8 = EVERYTHING) -> tuple[LayerFloat8, list[torch.nn.Parameter]]:
    weights = [torch.nn.Parameter(torch.randn(32, 16, dtype=torch.bfloat16)) for _ in range(4)]
    return LayerFloat8(options, weights), weights


def test_scales_follow_the_last_calls_and_evaluation_leaves_them() -> None:
    state, _ = layer(lm.Float8(history=2))
    state.refresh(training=True)
    inverses = []
    for value in (448.0, 1.0, 1.0, 1.0):
        call = state.begin(training=True)
        inverses.append(float(call.cast(Slot.ACTIVE).inverse))
        reference.quantize(torch.full((1, 16), value), call.cast(Slot.ACTIVE))
        state.backward_done()
        reference.quantize(torch.full((1, 16), 1e6), state.begin(training=False).cast(Slot.ACTIVE))
    assert inverses == [1.0, 1.0, 1.0, 2.0**-8]


def test_weights_are_cast_once_a_step() -> None:
    state, weights = layer()
    state.refresh(training=True)
    before = state.weight(0).rows.clone()  # type: ignore[arg-type]
    for weight in weights:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        weight.data.neg_()
    state.refresh(training=True)  # a later micro-batch
    assert torch.equal(state.weight(0).rows.float(), before.float())  # type: ignore[arg-type]
    weights[0].grad_added_to_main_grad = False  # type: ignore[attr-defined]
    state.refresh(training=True)
    assert torch.equal(state.weight(0).rows.float(), -before.float())  # type: ignore[arg-type]
    assert torch.equal(state.weight(0).columns.float(), -before.float().t())  # type: ignore[arg-type,union-attr]
    for weight in weights:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        weight.data.neg_()
    state.refresh(training=False)
    assert torch.equal(state.weight(0).rows.float(), before.float())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_other_precisions_are_refused(precision: Any) -> None:
    with pytest.raises(ValueError, match="fp8 needs 'bf16-mixed' or 'bf16-true'"):
        lm.MegatronPrecision(precision, fp8=True)


def test_options_reach_the_policy() -> None:
    assert lm.MegatronPrecision("bf16-mixed").policy == DtypePolicy.of("bf16-mixed")
    assert lm.MegatronPrecision("bf16-mixed", fp8=True).policy.float8 == lm.Float8()
    options = lm.Float8(weight_gradients=False)
    assert lm.MegatronPrecision("bf16-true", fp8=options).policy.float8 is options
    for wrong in ({"gradients": "e3m4"}, {"history": 0}, {"fast_accumulation": "backward"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lm.Float8(**wrong)  # type: ignore[arg-type]


def test_older_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    EVERYTHING.check_device(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"8\.9 or higher .* A100 has 8\.0"):
        EVERYTHING.check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    EVERYTHING.check_device(torch.device("cuda"))


def test_sizes_without_a_product_are_refused() -> None:
    weights = [torch.nn.Parameter(torch.zeros(24, 16))] * 4
    with pytest.raises(ValueError, match=r"multiples of 16, but qkv has \(24, 16\)"):
        LayerFloat8(EVERYTHING, weights)
    state, _ = layer()
    state.check_tokens(32)
    with pytest.raises(ValueError, match="multiple of 16 tokens, but got 33"):
        state.check_tokens(33)
    with torch.no_grad():
        state.check_tokens(33)


def refused(module: Any) -> str:
    """The message with which a fit of one step is refused."""
    plugin = lm.MegatronPrecision("bf16-mixed", fp8=True)
    trainer = quiet_trainer(lm.MegatronStrategy(), 1, max_steps=1, plugins=[plugin])
    with pytest.raises(ValueError, match="fp8") as raised:
        trainer.fit(module(), SharedLoader(module()))
    return str(raised.value)


def unfused() -> Any:
    module = lm.GPTModule(tiny_config(), lm.OptimizerConfig())
    module.fused = False
    return module


def with_experts() -> Any:
    return lm.GPTModule(tiny_config(num_moe_experts=2), lm.OptimizerConfig())


def t5() -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 128, "make_vocab_size_divisible_by": 32}
    return lm.T5Module(lm.T5Config(num_layers=2, **sizes), lm.OptimizerConfig())


@pytest.mark.parametrize(
    ("module", "words"),
    [(unfused, "run unfused"), (with_experts, "num_moe_experts=2"), (t5, "run unfused")],
)
def test_layers_without_fp8_are_refused(ranks: Any, module: Any, words: str) -> None:
    assert words in ranks.run(refused, 1, module)[0]


def run_script(name: str, **environment: str) -> None:
    """In a process of its own."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    command = [sys.executable, str(root / "tests/models" / name)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_in_triton_interpreter() -> None:
    """Every kernel's values without a GPU."""
    run_script("check_float8.py", TRITON_INTERPRET="1")


def test_code_of_kernels_for_hopper() -> None:
    """What the interpreter does not see."""
    run_script("check_float8_code.py")
