"""T5 at every layout against one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.models.config import T5Config
from lightning_megatron.models.fused import FusedTransformerLayer
from lightning_megatron.models.t5_module import T5Module
from tests.helpers import quiet_trainer
from tests.models.runs import Batch, assert_same, evaluate, fit, strategy
from tests.ranks import RankPool

VOCAB = 96


def tiny(**changes: Any) -> T5Config:
    return T5Config(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        kv_channels=16,
        ffn_hidden_size=64,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=8,
        max_position_embeddings=32,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_factor=None,
        init_method_std=0.2,
    ).replace(**changes)


def make(**changes: Any) -> T5Module:
    return T5Module(tiny(**changes))


def batch(samples: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1, VOCAB, (samples, 12), generator=generator)
    labels[0, 7:] = -100
    mask = torch.ones(samples, 20, dtype=torch.long)
    mask[1, 11:] = 0
    tokens = torch.randint(1, VOCAB, (samples, 20), generator=generator)
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


V1_1: dict[str, Any] = {
    "activation": "gelu_tanh",
    "gated_linear_unit": True,
    "share_embeddings_and_output_weights": False,
    "scale_decoder_output": False,
}
MEGATRON: dict[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "scale_attention": True,
}


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        (
            {},
            [
                (2, {"tp": 2, "sp": True}),
                (2, {"pp": 2}),
                (4, {"pp": 4}),
                (4, {"tp": 2, "pp": 2, "sp": True}),
                (2, {"pp": 2, "vpp": 2}),
                (4, {"pp": 2, "use_distributed_optimizer": True}),
            ],
        ),
        pytest.param(V1_1, [(2, {"tp": 2}), (4, {"tp": 2, "pp": 2}), (2, {"pp": 2, "vpp": 2})], marks=pytest.mark.slow),
        pytest.param(MEGATRON, [(2, {"pp": 2}), (4, {"tp": 2, "pp": 2, "sp": True})], marks=pytest.mark.slow),
        ({"num_layers": 3, "decoder_num_layers": 1} | V1_1, [(2, {"pp": 2})]),
    ],
    ids=["v1.0", "v1.1", "megatron", "uneven"],
)
def test_layouts_agree(ranks: RankPool, config: dict[str, Any], layouts: list[tuple[int, dict[str, Any]]]) -> None:
    build = partial(make, **config)
    (reference,) = ranks.run(fit, 1, build, batch(), {})
    for world, layout in layouts:
        for run in ranks.run(fit, world, build, batch(), layout):
            assert_same(run, reference)


def make_fused(**changes: Any) -> T5Module:
    module = make(**changes)
    module.fused = True
    return module


@pytest.mark.parametrize(
    ("config", "padded"),
    [
        ({}, True),
        (V1_1 | {"init_method_std": 0.05}, False),
        pytest.param(MEGATRON, True, marks=pytest.mark.slow),
    ],
)
def test_fused_layers_and_loss_equal_unfused(ranks: RankPool, config: dict[str, Any], padded: bool) -> None:
    given = batch()
    if not padded:
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    (reference,) = ranks.run(fit, 1, partial(make, **config), given, {})
    for world, layout in [(1, {"mbs": 2}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2, "mbs": 1})]:
        for run in ranks.run(fit, world, partial(make_fused, **config), given, layout):
            assert_same(run, reference)


def _slopes() -> list[tuple[float, float]]:
    """How the fused decoder's output changes along random directions: by its gradient, and by two evaluations."""
    module = make_fused(hidden_dropout=0.3)
    quiet_trainer(strategy(), 1).predict(module, [])
    layer = module.chunks[0].decoder.layers[0].train()
    assert isinstance(layer, FusedTransformerLayer)
    bias = module.chunks[0].decoder_position_bias.shared(6, torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(length, 2, 32, generator=generator).requires_grad_() for length in (6, 9)]
    weight = torch.randn(6, 2, 32, generator=generator)

    def value(states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return (layer(states, context=context, attention_bias=bias)[0] * weight).sum()

    gradients = torch.autograd.grad(value(*inputs), inputs)
    results = []
    for index, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=generator)
        with torch.no_grad():
            above, below = [x.clone() for x in inputs], [x.clone() for x in inputs]
            above[index] += 1e-3 * direction
            below[index] -= 1e-3 * direction
            slope = (value(*above) - value(*below)) / 2e-3
        results.append((float((gradient * direction).sum()), float(slope)))
    return results


def test_fused_dropouts_are_the_same_forward_and_backward(ranks: RankPool) -> None:
    for by_gradient, by_values in ranks.run(_slopes, 1)[0]:
        assert by_gradient == pytest.approx(by_values, rel=5e-3)


@pytest.mark.parametrize("build", [make, make_fused])
def test_recompute_changes_nothing(ranks: RankPool, build: Callable[..., T5Module]) -> None:
    full = partial(build, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    (reference,) = ranks.run(fit, 1, make, batch(), {})
    for run in ranks.run(fit, 2, full, batch(), {"pp": 2}):
        assert_same(run, reference)


OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def test_recomputed_attention_hands_its_gradient_to_the_table(ranks: RankPool) -> None:
    """megatron-core's checkpoint of attention captures the bias that all layers share."""
    selective = partial(make, recompute_granularity="selective")
    (reference,) = ranks.run(fit, 1, make, batch(), {})
    for world, layout in [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2, "vpp": 2})]:
        for run in ranks.run(fit, world, selective, batch(), layout):
            assert_same(run, reference)


@pytest.mark.parametrize("build", [make, make_fused])
def test_overlapped_collectives_change_nothing(ranks: RankPool, build: Callable[..., T5Module]) -> None:
    """Of two stages one has no layer that reads the decoder's table, the other none that reads the encoder's."""
    (reference,) = ranks.run(fit, 1, make, batch(), {})
    for layout in ({"pp": 2}, {"pp": 2, "vpp": 2}):
        for run in ranks.run(fit, 4, build, batch(), layout | OVERLAPPED):
            assert_same(run, reference)


def test_padding_does_not_count(ranks: RankPool) -> None:
    """Other tokens under the padding mask, or behind labels that do not count, give the same loss."""
    changed = batch()
    changed["input_ids"][1, 11:] = 5
    (reference,) = ranks.run(evaluate, 1, make, batch(), {})
    (result,) = ranks.run(evaluate, 1, make, changed, {})
    torch.testing.assert_close(result["loss"], reference["loss"], atol=1e-6, rtol=0)
    del changed["attention_mask"]
    (result,) = ranks.run(evaluate, 1, make, changed, {})
    assert abs(float(result["loss"] - reference["loss"])) > 1e-4


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="'relatve' is none of"):
        tiny(position_embedding_type="relatve")
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        tiny(relative_attention_num_buckets=6)
    with pytest.raises(ValueError, match="num_query_groups=2 groups queries"):
        tiny(num_query_groups=2)
    with pytest.raises(lm.DataError, match="has the keys"):
        make().prepare_batch({"input_ids": torch.zeros(1, 4)})
    with pytest.raises(lm.DataError, match="40 tokens in 'encoder_tokens'"):
        make().prepare_batch({"input_ids": torch.ones(1, 40).long(), "labels": torch.ones(1, 4).long()})


def _dropped() -> tuple[float, float, list[float]]:
    """How much the second linear of an MLP is kept from, in training and not; and its masks' parts on this rank."""
    module = make(hidden_dropout=0.25)
    quiet_trainer(strategy(tp=2), 2).predict(module, [])
    linear = module.chunks[0].decoder.layers[0].mlp.linear_fc2
    linear.weight.data.copy_(torch.eye(32))  # this rank's half of the inner width, so the output is a sum of two halves
    ones, zeros = torch.ones(8, 4, 32), torch.zeros(8, 4, 32)
    rank = module.trainer.global_rank
    linear.train()
    first = linear(ones if rank == 0 else zeros)[0]
    second = linear(ones if rank == 1 else zeros)[0]
    linear.eval()
    kept = linear(ones)[0]
    return float((first == 0).float().mean()), float((kept == 0).float().mean()), (first - second).flatten().tolist()


def test_dropout_inside_the_mlp(ranks: RankPool) -> None:
    """As Hugging Face's between the activation and ``wo``; tensor-parallel ranks draw masks of their own."""
    for dropped, in_evaluation, difference in ranks.run(_dropped, 2):
        assert 0.2 < dropped < 0.3
        assert in_evaluation == 0.0
        assert any(difference)
    options = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain = ranks.run(fit, 2, partial(make, **options), batch(), {"tp": 2, "sp": True})
    recomputed = ranks.run(fit, 2, partial(make, **options, **full), batch(), {"tp": 2, "sp": True})
    assert recomputed == plain
