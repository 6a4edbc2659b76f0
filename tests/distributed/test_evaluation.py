"""Evaluation and prediction where replicas have different numbers of batches: equal to one process."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

import lightning_megatron as lm
from tests.helpers import Tokens, quiet_trainer, tiny_config
from tests.models.runs import strategy
from tests.ranks import RankPool

ROWS = 8
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}


class Stream(IterableDataset):
    """Samples of some numbers."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __iter__(self) -> Any:
        return (Tokens()[number] for number in self.numbers)


def _loader(trainer: Any, cut: int, kind: str, batch_size: int) -> DataLoader:
    """Rows up to ``cut`` on the first replica, the rest on the second; all in one process."""
    mine = [range(ROWS)] if trainer.strategy.data_parallel_size == 1 else [range(cut), range(cut, ROWS)]
    numbers = mine[trainer.strategy.data_parallel_rank]
    return DataLoader(Stream(numbers) if kind == "stream" else Subset(Tokens(), numbers), batch_size)


def evaluated(layout: dict[str, Any], model: dict[str, Any], cases: list[tuple[int, str, int]]) -> list[Any]:
    """For each case, the loss of a validation, and the logits that a prediction gives for this replica's rows."""
    results = []
    for cut, kind, batch_size in cases:
        config = tiny_config(num_layers=2, hidden_size=16, num_attention_heads=2, **model)
        module = lm.GPTModule(config, lm.OptimizerConfig(lr_decay_steps=9), return_logits="every_rank")
        trainer = quiet_trainer(strategy(seed=7, mbs=2, **layout), int(os.environ["WORLD_SIZE"]))
        loader = _loader(trainer, cut, kind, batch_size)
        (means,) = trainer.validate(module, loader, verbose=False)
        predicted: Any = trainer.predict(module, loader)
        logits = torch.cat([batch["logits"] for batch in predicted]) if predicted else torch.empty(0)
        results.append((means["val_loss"], [batch["logits"].size(0) for batch in predicted], logits))
    return results


def check(pool: RankPool, world: int, layout: dict[str, Any], model: dict[str, Any], cases: list[Any]) -> None:
    ((loss, _, logits),) = pool.run(evaluated, 1, {}, model, [(ROWS, "sized", 2)])[0]
    size = layout.get("tp", 1) * layout.get("pp", 1)
    order = lm.MegatronStrategy(tensor_model_parallel_size=layout.get("tp", 1),
                                pipeline_model_parallel_size=layout.get("pp", 1)).layout  # fmt: skip
    assert world == 2 * size
    for rank, results in enumerate(pool.run(evaluated, world, layout, model, cases)):
        replica = order.coordinates(rank, world).data
        for (cut, kind, batch_size), (mean, sizes, mine) in zip(cases, results, strict=True):
            rows = range(cut) if replica == 0 else range(cut, ROWS)
            case = (rank, cut, kind, batch_size)
            assert mean == pytest.approx(loss, abs=2e-6), case
            assert sizes == [len(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)], case
            if len(rows):
                torch.testing.assert_close(mine, logits[rows.start : rows.stop], atol=2e-6, rtol=2e-6)


CASES = [(5, "stream", 1), (5, "sized", 2), (3, "stream", 4)]


def test_replicas_that_share_experts_evaluate_different_numbers_of_batches(ranks: RankPool) -> None:
    check(ranks, 2, {"ep": 2}, EXPERTS, [*CASES, (0, "stream", 2), (8, "stream", 3)])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), [(2, {}), (4, {"pp": 2}), (4, {"tp": 2})])
def test_replicas_evaluate_different_numbers_of_batches(ranks: RankPool, world: int, layout: dict[str, Any]) -> None:
    check(ranks, world, layout, {}, [*CASES, (0, "stream", 2)])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"pp": 2, "ep": 2}, {"tp": 2, "ep": 2, "sp": True}])
def test_experts_and_other_layouts(ranks: RankPool, layout: dict[str, Any]) -> None:
    check(ranks, 4, layout, EXPERTS, [*CASES, (0, "stream", 2)])


def trained(cut: int, batch_size: int) -> str:
    module = lm.GPTModule(tiny_config(num_layers=2, **EXPERTS), lm.OptimizerConfig(lr_decay_steps=9))
    trainer = quiet_trainer(strategy(seed=7, mbs=2, ep=2), 2, max_epochs=1)
    try:
        trainer.fit(module, _loader(trainer, cut, "sized", batch_size))
    except lm.DataError as error:
        return str(error)
    return "trained"


def test_batches_of_different_sizes_do_not_train_shared_experts(ranks: RankPool) -> None:
    for message in ranks.run(trained, 2, 5, 5):
        assert "share experts" in message
        assert "5, 3 (by replica)" in message  # samples that 2 does not divide are cut one by one
    assert ranks.run(trained, 2, 4, 3) == ["trained"] * 2
