"""The pure functions: filters against Hugging Face's, draws against the distribution, options against their ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import generation as hf

from lightning_megatron.generation import GenerationConfig, sampling

LOGITS = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 2
LOGITS[0, 3:9] = LOGITS[0, 2]  # equals


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 100])
@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_filters_as_in_hugging_face(temperature: float, top_k: int, top_p: float) -> None:
    expected = hf.TemperatureLogitsWarper(temperature)(None, LOGITS)
    if top_k:
        expected = hf.TopKLogitsWarper(top_k)(None, expected)
    if 0 < top_p < 1:
        expected = hf.TopPLogitsWarper(top_p)(None, expected)
    found = sampling.filter_logits(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(found[1:], expected[1:])
    # Among equal logits the two may keep others, but as many.
    assert found[0].isinf().sum() == expected[0].isinf().sum()


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.96, 4)):
        # 0.5 in fp32 is a hair more or less, so exact sums are not asked about
        assert int(sampling.keep_top_p(logits, p + (1e-6 if p in (0.51, 0.81) else -1e-6)).isfinite().sum()) == kept


def test_repetition_penalty_as_in_hugging_face() -> None:
    prompts = [[1, 2, 3], [5, 5, 39], [0, 1, 2], [7, 8, 9], [4, 4, 4], [10, 11, 12]]
    expected = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(prompts), LOGITS.clone())
    found = sampling.penalise_repetition(LOGITS, sampling.seen_tokens(prompts, LOGITS), 1.3)
    torch.testing.assert_close(found, expected)


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 50,000 draws from a filtered vocabulary of 12; numbers of rows and of steps both count."""
    logits = sampling.filter_logits(
        torch.randn(1, 12, generator=torch.Generator().manual_seed(3)), temperature=1.3, top_k=9, top_p=0.95
    )
    uniform = sampling.uniforms(5, list(range(500)), 100).flatten()
    tokens = sampling.draw(logits.expand(uniform.numel(), -1), uniform)
    counts = tokens.bincount(minlength=12).double()
    expected = logits[0].double().softmax(-1) * uniform.numel()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert 3 < int(kept.sum()) < 12
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations


def test_draws_of_rows_are_their_own() -> None:
    alone, beside = sampling.uniforms(7, [4], 10), sampling.uniforms(7, [0, 4, 9], 10)
    assert torch.equal(alone[0], beside[1])
    assert torch.equal(sampling.uniforms(7, [4], 3)[0], alone[0, :3])  # and a longer text begins as a shorter one
    assert not torch.equal(beside[0], beside[1])
    assert not torch.equal(sampling.uniforms(8, [4], 10), alone)


def test_draw_at_the_ends() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert sampling.draw(logits, uniform).tolist() == [1, 1, 3, 3]


def test_top_p_decays_to_its_bound() -> None:
    config = GenerationConfig(max_new_tokens=1, do_sample=True, top_p=0.8, top_p_decay=0.5, top_p_bound=0.3)
    assert [config.top_p_at(step) for step in range(4)] == pytest.approx([0.8, 0.4, 0.3, 0.3])
    assert config.replace(top_p_decay=0.0).top_p_at(9) == 0.8


BAD = [
    ({"temperature": 0.0}, r"temperature=0\.0, but must be a number in \(0, 100\]"),
    ({"temperature": 100.5}, r"temperature=100\.5"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": 1001}, "top_k=1001, but must be a whole number from 0 to 1000"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_k": True}, "top_k=True"),
    ({"top_p": 1.5}, r"top_p=1\.5, but must be a number in \[0, 1\]"),
    ({"top_p": 0.5, "top_p_decay": -0.1}, r"top_p_decay=-0\.1"),
    ({"top_p": 0.5, "top_p_bound": 2}, "top_p_bound=2"),
    ({"top_p": 0.5, "top_p_bound": 0.6}, r"top_p_bound=0\.6 is above top_p=0\.5"),
    ({"top_p_decay": 0.9}, r"top_p_decay=0\.9 needs top_p"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"seed": -1}, "seed=-1"),
    ({"num_beams": 0, "do_sample": False}, "num_beams=0"),
    ({"num_beams": 2}, "num_beams=2 with do_sample=True"),
    ({"num_beams": 2, "do_sample": False, "early_stopping": "now"}, "early_stopping='now'"),
    ({"num_beams": 2, "do_sample": False, "log_probs": True}, "log_probs=True"),
    (
        {"num_beams": 2, "do_sample": False, "num_return_sequences": 3},
        "num_return_sequences=3 is more than num_beams=2",
    ),
    ({"do_sample": False, "temperature": 0.5}, r"temperature=0\.5 changes nothing"),
    ({"stop_tokens": [-1]}, "-1"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"max_length": 3}, "one of max_new_tokens and max_length"),
    ({"max_new_tokens": None}, "one of max_new_tokens and max_length"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**{"max_new_tokens": 4, "do_sample": True, **options})
