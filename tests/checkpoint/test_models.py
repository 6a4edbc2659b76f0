"""Checkpoints of BERT, T5 and mixtures of experts: any layout loads any other's, as those of GPT do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from tests.checkpoint.runs import tensors
from tests.helpers import Record, quiet_trainer
from tests.models import test_bert, test_gpt, test_t5
from tests.models.runs import Batch, Shared, strategy
from tests.ranks import RankPool

OPTIMIZER = lm.OptimizerConfig(lr=1e-2, lr_warmup_steps=2, lr_decay_steps=40)
DISTRIBUTED = {"use_distributed_optimizer": True, "ddp": {"bucket_size": 3000, "overlap_grad_reduce": True}}


@dataclass(frozen=True)
class Family:
    """A model, what it learns, and layouts by name, each with a world size."""

    make: Callable[[], lm.MegatronModule]
    batch: Callable[[], Batch]
    layouts: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)


PLAIN = (1, {"mbs": 2})
FAMILIES = {
    "bert": Family(
        test_bert.make,
        test_bert.batch,
        {
            "plain": PLAIN,
            "tp2_pp2_sp": (4, {"tp": 2, "pp": 2, "sp": True, "mbs": 2}),
            "pp2_dp2_distributed": (4, {"pp": 2, "mbs": 2, **DISTRIBUTED}),
            "pp2_vpp2": (2, {"pp": 2, "vpp": 2, "mbs": 1}),
        },
    ),
    "t5": Family(
        test_t5.make,
        test_t5.batch,
        {
            "plain": PLAIN,
            "tp2_pp2_sp": (4, {"tp": 2, "pp": 2, "sp": True, "mbs": 2}),
            "pp2_dp2_distributed": (4, {"pp": 2, "mbs": 2, **DISTRIBUTED}),
            "pp4": (4, {"pp": 4, "mbs": 2}),
        },
    ),
    "moe": Family(
        partial(test_gpt.make, **test_gpt.EXPERTS),
        test_gpt.tokens,
        {
            "plain": PLAIN,
            "ep2_distributed": (2, {"ep": 2, "mbs": 2, **DISTRIBUTED}),
            "pp2_ep2": (4, {"pp": 2, "ep": 2, "mbs": 2}),
            "pp2_ep2_distributed": (4, {"pp": 2, "ep": 2, "mbs": 2, **DISTRIBUTED}),
        },
    ),
}
PAIRS = [
    ("bert", "tp2_pp2_sp", "pp2_dp2_distributed"),
    ("bert", "pp2_dp2_distributed", "pp2_vpp2"),
    ("bert", "pp2_vpp2", "plain"),
    ("t5", "tp2_pp2_sp", "pp2_dp2_distributed"),
    ("t5", "pp2_dp2_distributed", "pp4"),
    ("t5", "pp4", "plain"),
    ("moe", "ep2_distributed", "pp2_ep2"),
    ("moe", "pp2_ep2", "plain"),
    ("moe", "plain", "pp2_ep2_distributed"),
    ("moe", "pp2_ep2_distributed", "ep2_distributed"),
]
FAST = {("moe", "pp2_ep2_distributed")}


def _train(family: str, layout: dict[str, Any], steps: int, save: Path | None, resume: Path | None) -> list[float]:
    case, record = FAMILIES[family], Record()
    module = case.make()
    module.optimizer_config = OPTIMIZER
    trainer = quiet_trainer(
        strategy(**layout, seed=7), int(os.environ["WORLD_SIZE"]), max_steps=steps, callbacks=[record]
    )
    trainer.fit(module, Shared(module, case.batch(), 20), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return record.losses


@pytest.mark.parametrize(
    ("family", "source", "target"),
    [pytest.param(*pair, marks=[] if pair[:2] in FAST else [pytest.mark.slow]) for pair in PAIRS],
)
def test_pairs(ranks: RankPool, tmp_path: Path, family: str, source: str, target: str) -> None:
    world, layout = FAMILIES[family].layouts[source]
    path, again = tmp_path / "three", tmp_path / "again"
    first = ranks.run(_train, world, family, layout, 3, path, None)[0]
    straight = ranks.run(_train, world, family, layout, 8, None, None)[0]
    resumed = ranks.run(_train, world, family, layout, 8, None, path)[0]
    assert first + resumed == straight  # bit for bit at the same layout
    world, layout = FAMILIES[family].layouts[target]
    ranks.run(_train, world, family, layout, 3, again, path)  # loads, takes no step, and saves
    one, other = tensors(path), tensors(again)
    assert one.keys() == other.keys()
    assert len(one) == 3 * len([key for key in one if not key.startswith("optimizer.")])  # weights, two moments
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    for losses in ranks.run(_train, world, family, layout, 8, None, path):
        assert len(losses) == 5
        torch.testing.assert_close(losses, straight[3:], rtol=0, atol=1e-5)
