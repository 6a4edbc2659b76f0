"""What the benchmark of one GPU makes of its results."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.gpu import BATCHES, compare
from benchmarks.megatron_peers import megatron, unavailable
from benchmarks.workloads import WORKLOADS
from lightning_megatron.backends import kernels
from tests.ranks import RankPool


def test_variants_are_compared_within_a_model_and_a_batch() -> None:
    rows = [("ours", "a", 8, 50.0), ("nano", "a", 8, 55.0), ("ours", "a", 24, 10.0), ("ours", "b", 8, 20.0)]
    rows += [("huggingface", "b", 8, 30.0), ("unfused", "b", 8, 10.0)]
    names = ("variant", "model", "batch", "ms")
    assert list(compare([dict(zip(names, row, strict=True)) for row in rows])) == [
        "a batch 8: ours is 1.100 times as fast as nano",
        "b batch 8: ours is 1.500 times as fast as huggingface",
        "b batch 8: ours is 0.500 times as fast as unfused",
    ]


def test_batches_are_of_models_that_exist() -> None:
    assert set(BATCHES) <= set(WORKLOADS)


def bare_megatron(name: str) -> list[float]:
    workload = WORKLOADS[name]()
    try:
        step = megatron(workload, "megatron-core", torch.device("cpu"))
        batch = workload.batch(4, torch.Generator().manual_seed(0))
        return [float(step(batch)) for _ in range(5)]
    finally:
        kernels.install()  # for the tests after this one


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_megatron_core_alone_trains(name: str, ranks: RankPool) -> None:
    (losses,) = ranks.run(bare_megatron, 1, name)
    assert losses[0] == pytest.approx(torch.tensor(512.0).log().item(), abs=0.1)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


def test_peers_that_are_not_there() -> None:
    assert unavailable("megatron-core") is None
    if importlib.util.find_spec("transformer_engine") is None:
        assert "transformer_engine cannot be imported" in str(unavailable("transformer-engine"))
    with pytest.raises(ValueError, match="no such model: BertConfig"):
        megatron(WORKLOADS["bert-large"](), "megatron-core")
