"""What the benchmark of one GPU makes of its results."""

from __future__ import annotations

from benchmarks.gpu import BATCHES, compare
from benchmarks.workloads import WORKLOADS


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
