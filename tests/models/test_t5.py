"""T5 at every layout against one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.models.config import T5Config
from lightning_megatron.models.t5_module import T5Module
from tests.models.runs import Batch, assert_same, evaluate, fit
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
        (V1_1, [(2, {"tp": 2}), (4, {"tp": 2, "pp": 2}), (2, {"pp": 2, "vpp": 2})]),
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


def test_recompute_changes_nothing(ranks: RankPool) -> None:
    full = partial(make, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    (reference,) = ranks.run(fit, 1, make, batch(), {})
    for run in ranks.run(fit, 2, full, batch(), {"pp": 2}):
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
    with pytest.raises(lm.DataError, match="has the keys"):
        make().prepare_batch({"input_ids": torch.zeros(1, 4)})
    with pytest.raises(lm.DataError, match="40 tokens in 'encoder_tokens'"):
        make().prepare_batch({"input_ids": torch.ones(1, 40).long(), "labels": torch.ones(1, 4).long()})
