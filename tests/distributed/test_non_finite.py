"""A loss or a gradient that is NaN on one rank: one error on all ranks, or a step that all of them skip."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, override

import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.callbacks import NonFinite
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config
from tests.models.runs import strategy
from tests.ranks import RankPool

PLACES = ["loss", "forward", "gradient"]


class Poisoned(lm.GPTModule):
    """Has a NaN in the second step, on one rank."""

    def __init__(self, where: str, rank: int) -> None:
        super().__init__(tiny_config(num_layers=2), lm.OptimizerConfig(lr_decay_steps=99))
        self.where, self.rank = where, rank

    def _here(self, where: str) -> bool:
        trainer = self.trainer
        return where == self.where and trainer.global_rank == self.rank and trainer.fit_loop.batch_idx == 1

    @override
    def forward_step(self, chunk: torch.nn.Module, microbatch: dict[str, Any]) -> torch.Tensor:
        output = super().forward_step(chunk, microbatch)
        return output * torch.nan if self._here("forward") else output

    @override
    def loss(self, output: torch.Tensor, microbatch: dict[str, Any]) -> lm.Loss:
        loss = super().loss(output, microbatch)
        return replace(loss, sum=loss.sum * torch.nan) if self._here("loss") else loss

    @override
    def on_after_backward(self) -> None:
        if self._here("gradient"):
            self.strategy.gradient_buffers()[0][:3] = torch.nan


def fits(layout: dict[str, Any], policy: Any) -> list[tuple[str, int]]:
    """For each place and its first and last rank, how the fit ended, and the steps that were skipped."""
    world, results = int(os.environ["WORLD_SIZE"]), []
    for where in PLACES:
        for rank in (0, world - 1):
            record, guard = Record(), NonFinite(policy)
            module = Poisoned(where, rank)
            trainer = quiet_trainer(strategy(seed=7, mbs=2, **layout), world, max_steps=4, callbacks=[record, guard])
            try:
                trainer.fit(module, SharedLoader(module))
                results.append(("ended", guard.skipped))
            except Exception as error:
                results.append((f"{type(error).__name__}: {error}", guard.skipped))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), [(2, {}), (2, {"pp": 2}), (4, {"pp": 2})])
def test_nan_on_one_rank(ranks: RankPool, world: int, layout: dict[str, Any]) -> None:
    for policy in ("raise", "skip"):
        results = ranks.run(fits, world, layout, policy)
        assert all(mine == results[0] for mine in results)
        for index, (ended, skipped) in enumerate(results[0]):
            if PLACES[index // 2] == "loss" and index % 2 == 0 and "pp" in layout:
                assert (ended, skipped) == ("ended", 0)  # a first stage has no loss
            elif policy == "raise":
                assert ended.startswith("NonFiniteError: ")
            else:
                assert (ended, skipped) == ("ended", 1)
