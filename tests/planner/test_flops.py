"""FLOPs and utilisation against the published tables."""

import pytest

from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner import MODELS, Recompute, hardware_flops_per_token, model_flops_per_token, utilization

SELECTIVE = Recompute(granularity="selective")
FULL = Recompute(granularity="full", method="uniform", num_layers=1)


def paper_hardware_flops(model: GPTConfig) -> float:
    """The paper counts the repeated attention core as three forwards; it runs once."""
    once = hardware_flops_per_token(model, 2048, SELECTIVE) - model_flops_per_token(model, 2048)
    return model_flops_per_token(model, 2048) + 3 * once


@pytest.mark.parametrize(
    ("name", "gpus", "batch", "seconds", "mfu", "hfu"),
    [  # arXiv:2205.05198, tables 3 and 5, on A100 of 312 TFLOP/s
        ("megatron_22b", 8, 4, 1.10, 41.5, 43.7),
        ("gpt3_175b", 64, 64, 13.75, 51.4, 52.8),
        ("megatron_530b", 280, 280, 37.83, 56.0, 57.0),
        ("megatron_1t", 512, 512, 71.49, 56.3, 57.0),
    ],
)
def test_utilization_of_table_5(name: str, gpus: int, batch: int, seconds: float, mfu: float, hfu: float) -> None:
    model, rate = MODELS[name], batch * 2048 / seconds
    # The smallest model's time has three digits, so its utilisation is known to half a percent.
    tolerance = 0.25 if name == "megatron_22b" else 0.06
    assert 100 * utilization(model_flops_per_token(model, 2048), rate, gpus, 312e12) == pytest.approx(
        mfu, abs=tolerance
    )
    assert 100 * utilization(paper_hardware_flops(model), rate, gpus, 312e12) == pytest.approx(hfu, abs=tolerance)


@pytest.mark.parametrize("name", ["gpt3_175b", "megatron_530b"])
def test_closed_forms(name: str) -> None:
    model = MODELS[name]
    layers, h, s, v = model.num_layers, model.hidden_size, 2048, 51200
    base = 72 * layers * h**2
    assert model_flops_per_token(model, s) == pytest.approx(base * (1 + s / (6 * h) + v / (12 * h * layers)))
    assert paper_hardware_flops(model) == pytest.approx(base * (1 + s / (3 * h) + v / (12 * h * layers)))
    # Full recomputation: 96 B s l h^2 (1 + s/(6h) + V/(16 l h)), arXiv:2104.04473, equation 3.
    assert hardware_flops_per_token(model, s, FULL) == pytest.approx(
        96 * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    )


@pytest.mark.parametrize(("name", "percent"), [("gpt3_175b", 2.7), ("megatron_530b", 1.6)])
def test_overhead_of_selective_recompute(name: str, percent: float) -> None:
    """Section 5: 70% of GPT-3's activations for 2.7% more FLOPs, 65% of MT-NLG's for 1.6%."""
    extra = paper_hardware_flops(MODELS[name]) / model_flops_per_token(MODELS[name], 2048) - 1
    assert round(100 * extra, 1) == percent


def test_block_recompute_counts_layers_of_every_chunk() -> None:
    model = MODELS["gpt3_175b"]
    block = Recompute(granularity="full", method="block", num_layers=2)
    chunks = (12,) * 8
    one = hardware_flops_per_token(model, 2048, FULL) - model_flops_per_token(model, 2048)
    got = hardware_flops_per_token(model, 2048, block, chunks) - model_flops_per_token(model, 2048)
    assert got == pytest.approx(one * 16 / 96)


def test_gpt2_large_as_measured_mfu_counts_it() -> None:
    """6 (12 L H^2 + V H) + 12 L H S per token, which 77,052 tokens/s turn into 40.5% of an H100."""
    model = GPTConfig.gpt2("large", vocab_size=50304)
    flops = 6 * (12 * 36 * 1280**2 + 50304 * 1280) + 12 * 36 * 1280 * 1024
    assert model_flops_per_token(model, 1024) == flops
    assert utilization(flops, 77_052, 1, 989e12) == pytest.approx(0.405, abs=0.001)
