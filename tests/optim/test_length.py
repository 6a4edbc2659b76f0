"""Schedules of runs whose length nobody knows."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

import lightning_megatron as lm
from tests.helpers import SharedLoader, Tokens, quiet_trainer, tiny_config
from tests.optim.test_optimizer import Rates


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return (Tokens()[index] for index in range(24))


def rates(unsized: bool, limits: dict[str, Any], options: dict[str, Any]) -> list[float] | str:
    """The rate of each step, or what the error says."""
    record = Rates()
    module = lm.GPTModule(tiny_config(num_layers=1), lm.OptimizerConfig(lr=1e-2, **options))
    trainer = quiet_trainer(lm.MegatronStrategy(), 1, callbacks=[record], **limits)
    try:
        trainer.fit(module, DataLoader(Stream(), batch_size=8) if unsized else SharedLoader(module, length=24))
    except lm.ModuleError as error:
        return str(error)
    return record.rates


KNOWN_FROM_ELSEWHERE: list[tuple[bool, dict[str, Any], dict[str, Any], list[float]]] = [
    (True, {"max_steps": 2}, {"lr_decay_style": "linear"}, [1e-2, 5e-3]),
    (True, {"max_epochs": 2, "limit_train_batches": 2}, {"lr_decay_style": "linear"}, [1e-2, 7.5e-3, 5e-3, 2.5e-3]),
    (True, {"max_epochs": 1}, {"lr_decay_style": "linear", "lr_decay_steps": 10}, [1e-2, 9e-3, 8e-3]),
    (True, {"max_epochs": 1}, {"lr_decay_style": "constant"}, [1e-2] * 3),
    (True, {"max_epochs": 1}, {"lr_decay_style": "inverse-square-root"}, [1e-2, 1e-2, 1e-2 / 2**0.5]),
    (False, {"max_time": {"hours": 1}, "max_steps": 2}, {"lr_decay_style": "linear"}, [1e-2, 5e-3]),
    (False, {"max_epochs": 1}, {"lr_decay_style": "linear"}, [1e-2 * (1 - step / 3) for step in range(3)]),
]
GROWING_DECAY = {"start_weight_decay": 0.0, "end_weight_decay": 0.1, "weight_decay_incr_style": "linear"}
UNKNOWN: list[tuple[bool, dict[str, Any], dict[str, Any], str]] = [
    (True, {"max_epochs": 2}, {}, "Set lr_decay_steps=... in the OptimizerConfig, or Trainer(max_steps=...)"),
    (False, {"max_time": {"hours": 1}}, {"lr_decay_style": "linear"}, "lr_decay_style='linear' takes the length"),
    (True, {"max_epochs": -1, "limit_train_batches": 2}, {}, "max_steps=-1, max_epochs=-1"),
    (True, {"max_epochs": 1}, {"lr_decay_style": "constant", **GROWING_DECAY}, "Set Trainer(max_steps=...)"),
]


def _each(cases: list[tuple[Any, ...]]) -> list[list[float] | str]:
    return [rates(unsized, limits, options) for unsized, limits, options, _ in cases]


def test_a_schedule_over_a_run_of_unknown_length_is_refused(ranks: Any) -> None:
    (found,) = ranks.run(_each, 1, [*UNKNOWN, *KNOWN_FROM_ELSEWHERE])
    for said, (*_, message) in zip(found, UNKNOWN, strict=False):
        assert message in said
    for got, (*_, wanted) in zip(found[len(UNKNOWN) :], KNOWN_FROM_ELSEWHERE, strict=True):
        assert got == pytest.approx(wanted)
