"""Token for token what Hugging Face generates with the same weights, at every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation import reference
from tests.ranks import RankPool

LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
PROMPTS = [[5, 17, 3, 90, 41], [7, 7, 64, 2, 19], [100, 1, 33, 58, 12]]


def _generate(config: Any, whole: Any, strategy: dict[str, Any], calls: list[dict[str, Any]]) -> list[Any]:
    module = reference.build(config, whole, strategy)
    return [module.generate(**call) for call in calls]


def _expected(model: Any, prompts: list[list[int]], **options: Any) -> list[tuple[int, ...]]:
    with torch.no_grad():
        out = model.generate(torch.tensor(prompts), attention_mask=torch.ones(len(prompts), len(prompts[0])), **options)
    return [tuple(row) for row in out.tolist()]


MODELS = {
    "gpt2": reference.gpt2,
    "llama": reference.llama,
    "llama_mqa": lambda: reference.llama(key_value_heads=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MODELS)
def test_greedy(ranks: RankPool, family: str, layout: str) -> None:
    model = MODELS[family]()
    expected = _expected(model, PROMPTS, max_new_tokens=24, do_sample=False)
    assert len({token for row in expected for token in row[5:]}) > 10  # a text that could go wrong
    world, strategy = LAYOUTS[layout]
    call = {"prompts": PROMPTS, "max_new_tokens": 24}
    results = ranks.run(_generate, world, reference.gpt_config(model), reference.weights(model), strategy, [call])
    for rank in results:
        assert [generation.tokens for generation in rank[0]] == expected
