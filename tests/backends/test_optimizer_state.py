"""What checkpoints read of megatron-core is still there."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_megatron.backends import optimizer_state, rng
from lightning_megatron.backends.core import ShardedTensor, ShardedTensorFactory, dist_checkpointing
from lightning_megatron.backends.sharded_state import model_state
from lightning_megatron.backends.shards import Box, boxes_of_range
from tests.checkpoint.runs import Case, make_module, make_trainer, tensors, train
from tests.helpers import SharedLoader
from tests.ranks import RankPool


def test_another_kind_of_optimizer_is_refused() -> None:
    unknown: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]))
    with pytest.raises(NotImplementedError, match=r"state of SimpleNamespace\. Use an optimizer that OptimizerConfig"):
        list(optimizer_state.parameter_states(unknown))


@pytest.mark.parametrize("dim", [0, 1])
def test_only_splits_along_the_first_dimension_are_covered(dim: int) -> None:
    def halves(key: str, tensor: torch.Tensor, replica_id: Any, _: Any) -> Any:
        parts = enumerate(tensor.chunk(2, dim))
        return {str(i): ShardedTensor.from_rank_offsets(f"{key}.{i}", part, replica_id=replica_id) for i, part in parts}

    def no_merge(_: Any) -> Any: ...

    factory = ShardedTensorFactory("weight", torch.zeros(4, 6), halves, no_merge, replica_id=0)
    chunk = SimpleNamespace(sharded_state_dict=lambda metadata: {"weight": factory})
    if dim:
        with pytest.raises(NotImplementedError, match=r"weight\.0 is split along an inner dimension"):
            model_state([chunk], {})
    else:
        (weight,) = model_state([chunk], {}).weights
        assert [(piece.key, piece.start) for piece in weight.pieces] == [("weight.0", 0), ("weight.1", 12)]


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (3, 4, 5), (2, 1, 3, 2)])
def test_boxes_of_range_cover_it_once(shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    flat = torch.arange(numel)
    for start in range(numel):
        for end in range(start, numel + 1):
            covered = torch.zeros(shape, dtype=torch.int64)
            boxes = list(boxes_of_range(shape, start, end))
            for box, first in boxes:
                part = Box((0,) * len(shape), shape).view(covered, box)
                part += 1
                assert torch.equal(
                    Box((0,) * len(shape), shape).view(flat.view(shape), box).flatten(), flat[first:][: box.numel]
                )
            assert torch.equal(covered.flatten(), ((flat >= start) & (flat < end)).long())
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


def _states(case: Case) -> dict[str, Any]:
    module = make_module()
    trainer = make_trainer(case, max_steps=2)
    trainer.fit(module, SharedLoader(module))
    states = list(optimizer_state.parameter_states(trainer.strategy.megatron_optimizer.core))
    parameters = {id(p): p for p in module.parameters()}
    for state in states:
        held = state.parameter.detach().view(-1)[state.start :][: state.stepped.numel()]
        assert id(state.parameter) in parameters
        assert torch.equal(state.stepped.detach().view(-1).to(held.dtype), held)
        assert state.is_master == (held.dtype != torch.float32)
        assert state.state["exp_avg"].shape == state.stepped.shape
    metadata = {"singleton_local_shards": False, "dp_cp_group": trainer.strategy.build_context.groups.dp_cp}
    described = model_state(module.chunks, metadata).weights
    return {
        "stepped": sum(state.stepped.numel() for state in states),
        "parameters": sum(p.numel() for p in module.parameters()),
        "described": {id(weight.tensor) for weight in described} >= set(parameters),
        "steps": {state.step for state in states},
    }


@pytest.mark.parametrize(
    "case",
    [
        Case(2),
        Case(2, precision="bf16-mixed"),
        Case(2, distributed=True),
        Case(2, distributed=True, precision="bf16-mixed"),
        Case(2, precision="bf16-true"),
    ],
    ids=["plain", "masters", "distributed", "distributed-masters", "no-masters"],
)
def test_every_kind_of_optimizer_is_understood(ranks: RankPool, case: Case) -> None:
    if case.precision == "bf16-true":
        case = Case(2, precision="bf16-mixed")
    found = ranks.run(_states, 2, case)
    assert all(of_rank["steps"] == {2} and of_rank["described"] for of_rank in found)
    stepped = sum(of_rank["stepped"] for of_rank in found)
    assert stepped == found[0]["parameters"] * (1 if case.distributed else 2)


def _random_numbers() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]


def _rng() -> tuple[list[float], list[float]]:
    train(Case(), 1)
    random.gauss(0, 1)  # leaves a number behind for the next call
    state = rng.capture()
    before = _random_numbers()
    rng.restore(state)
    return before, _random_numbers()


def test_random_states(ranks: RankPool) -> None:
    before, after = ranks.run(_rng, 1)[0]
    assert before == after


def _megatron_reads(path: Path) -> int:
    module = make_module()
    make_trainer(Case(), max_steps=1).fit(module, SharedLoader(module))
    loaded = dist_checkpointing.load_plain_tensors(str(path))
    ours = tensors(path)
    for key, value in ours.items():
        assert torch.equal(loaded[key], value), key
    return len(ours)


def _save(path: Path) -> None:
    train(Case(2, {"tensor_model_parallel_size": 2}), 2, save=path)


def test_megatron_core_reads_what_is_written(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_save, 2, tmp_path / "saved")
    assert ranks.run(_megatron_reads, 1, tmp_path / "saved")[0] > 30
