"""Any layout and kind of optimizer loads any other's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.runs import Case, tensors, train
from tests.ranks import RankPool

TP2PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}

# Small buckets, so that they are padded.
BUCKETS = {"bucket_size": 3000, "overlap_grad_reduce": True}
CASES = {
    "plain": Case(),
    "one-distributed": Case(distributed=True),
    "tp2pp2sp": Case(4, TP2PP2),
    "pp2dp2-distributed": Case(4, PP2, distributed=True),
    "dp4-distributed-buckets": Case(4, distributed=True, ddp=BUCKETS),
    "tp2dp2-distributed": Case(4, TP2, distributed=True),
    "pp2vpp2": Case(2, VPP2),
    "pp2vpp2dp2-distributed": Case(4, VPP2, distributed=True, ddp=BUCKETS),
    "tp4": Case(4, TP4),
    "dp2": Case(2),
}
PAIRS = [
    ("plain", "tp2pp2sp"),
    ("plain", "dp4-distributed-buckets"),
    ("one-distributed", "plain"),
    ("tp2pp2sp", "pp2dp2-distributed"),
    ("tp2pp2sp", "plain"),
    ("pp2dp2-distributed", "tp2pp2sp"),
    ("pp2dp2-distributed", "plain"),
    ("dp4-distributed-buckets", "tp2pp2sp"),
    ("dp4-distributed-buckets", "pp2vpp2dp2-distributed"),
    ("tp2dp2-distributed", "pp2vpp2"),
    ("pp2vpp2", "tp4"),
    ("pp2vpp2dp2-distributed", "dp2"),
    ("tp4", "pp2vpp2dp2-distributed"),
    ("dp2", "tp2dp2-distributed"),
]


class Saved:
    """Checkpoints after three steps and the losses of five more, made once for each case."""

    def __init__(self, ranks: RankPool, directory: Path) -> None:
        self.ranks, self.directory = ranks, directory
        self._losses: dict[tuple[str, str], list[float]] = {}

    def checkpoint(self, name: str, model: dict | None = None) -> Path:
        path = self.directory / f"{name}-{len(model or {})}.ckpt"
        if not path.exists():
            case = CASES[name]
            self.ranks.run(_train, case.world, case, 3, path, None, model)
        return path

    def continued(self, name: str, model: dict | None = None) -> list[float]:
        path = self.checkpoint(name, model)
        key = (name, str(model))
        if key not in self._losses:
            case = CASES[name]
            self._losses[key] = self.ranks.run(_train, case.world, case, 8, None, path, model)[0]
        return self._losses[key]


def _train(case: Case, steps: int, save: Path | None, resume: Path | None, model: dict | None) -> list[float]:
    return train(case, steps, save=save, resume=resume, model=model)


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(ranks, tmp_path_factory.mktemp("saved"))


def _close(one: Path, other: Path) -> int:
    """Assert that two checkpoints hold the same bits; how many tensors they hold."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    return len(first)


def _most_are_slow() -> list[Any]:
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (index % 7 > 0)) for index, pair in enumerate(PAIRS)]


@pytest.mark.parametrize(("source", "target"), _most_are_slow())
def test_pairs(saved: Saved, ranks: RankPool, tmp_path: Path, source: str, target: str) -> None:
    path, case = saved.checkpoint(source), CASES[target]
    again = tmp_path / "again.ckpt"
    ranks.run(_train, case.world, case, 3, again, path, None)  # loads, takes no step, and saves
    # weights, two moments
    assert _close(path, again) == 3 * len([key for key in tensors(path) if not key.startswith("optimizer.")])
    losses = ranks.run(_train, case.world, case, 8, None, path, None)
    assert all(of_rank == losses[0] for of_rank in losses)
    assert len(losses[0]) == 5
    torch.testing.assert_close(losses[0], saved.continued(source), rtol=0, atol=1e-5)
