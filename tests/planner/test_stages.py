"""Layers over stages by cost: the split, its notation, and what is left as it is."""

from __future__ import annotations

import pytest

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.parameters import layers_per_chunk
from lightning_megatron.planner.stages import by_cost, output_in_layers

LARGE = GPTConfig.gpt2("large")
LLAMA = GPTConfig.llama(num_layers=16, hidden_size=2048, num_attention_heads=32, num_query_groups=8,
                        ffn_hidden_size=8192, vocab_size=32000, max_position_embeddings=4096)  # fmt: skip


def test_output_weighs_several_layers_of_a_small_model() -> None:
    assert output_in_layers(LARGE) == pytest.approx(2.89, abs=0.01)
    assert output_in_layers(LLAMA) == pytest.approx(0.84, abs=0.01)


@pytest.mark.parametrize(
    ("model", "layout", "expected"),
    [
        (LARGE, "pp2", ((20,), (16,))),
        (LARGE, "pp2_vpp2", ((10, 10), (8, 8))),
        (LARGE, "pp4", ((10,), (10,), (9,), (7,))),
        (LLAMA, "pp2", ((8,), (8,))),
        (LLAMA, "pp2_vpp2", ((5, 4), (4, 3))),
        (LARGE, "tp2_sp", ((36,),)),
    ],
)
def test_split(model: GPTConfig, layout: str, expected: tuple[tuple[int, ...], ...]) -> None:
    found = by_cost(model, ParallelLayout.parse(layout))
    assert layers_per_chunk(model.num_layers, found) == expected
    assert str(found) == layout


@pytest.mark.parametrize(
    "given",
    [
        {"num_layers_in_first_pipeline_stage": 18},
        {"num_layers_in_last_pipeline_stage": 18},
        {"pipeline_model_parallel_layout": "Et*18|t*18L"},
    ],
)
def test_what_a_layout_says_is_kept(given: dict[str, object]) -> None:
    layout = ParallelLayout(pipeline_model_parallel_size=2, **given)  # type: ignore[arg-type]
    assert by_cost(LARGE, layout) == layout
