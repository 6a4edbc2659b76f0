"""Configuration, schedules and the optimizer that Lightning sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adm"}, "optimizer='adm' is none of 'adam', 'sgd'. Did you mean 'adam'?"),
        ({"lr": -1.0}, "lr=-1.0 is negative"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "min_lr=0.001 is larger than lr=0.0001"),
        ({"lr_warmup_steps": 5, "lr_decay_steps": 5}, "lr_warmup_steps=5 is not smaller"),
        ({"lr_decay_style": "WSD"}, "needs lr_wsd_decay_steps"),
        ({"start_weight_decay": 0.1}, "come together"),
        ({"weight_decay_incr_style": "linear"}, "needs start_weight_decay"),
    ],
)
def test_configuration_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace(".", r"\.")):
        lm.OptimizerConfig(**fields)


class Rates(Record):
    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.decays: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates.append(groups[0]["lr"])
        self.decays.append(max(group["weight_decay"] for group in groups))


def rates(**fields: Any) -> tuple[list[float], list[float]]:
    record = Rates()
    module = lm.GPTModule(tiny_config(), lm.OptimizerConfig(**fields))
    trainer = quiet_trainer(lm.MegatronStrategy(), 1, max_steps=10, callbacks=[record])
    trainer.fit(module, SharedLoader(module, length=80))
    return record.rates, record.decays


def cosine() -> Any:
    return rates(lr=1.0e-2, min_lr=1.0e-3, lr_warmup_steps=2)


def linear_with_decay() -> Any:
    return rates(
        lr=1.0e-2,
        lr_decay_style="linear",
        start_weight_decay=0.0,
        end_weight_decay=0.1,
        weight_decay_incr_style="linear",
    )


def test_cosine_with_warmup(ranks: Any) -> None:
    """Equation of SGDR (arXiv:1608.03983), over the 8 steps after 2 of warm-up; the run's length is the decay's."""
    got, _ = ranks.run(cosine, 1)[0]
    decay = [1e-3 + 0.5 * 9e-3 * (1 + math.cos(math.pi * (step - 2) / 8)) for step in range(2, 10)]
    assert got == pytest.approx([0.0, 5e-3, *decay])


def test_linear_with_growing_weight_decay(ranks: Any) -> None:
    got, decays = ranks.run(linear_with_decay, 1)[0]
    assert got == pytest.approx([1e-2 * (1 - step / 10) for step in range(10)])
    assert decays == pytest.approx([0.01 * step for step in range(10)])


class WithTorchScheduler(lm.GPTModule):
    def configure_optimizers(self) -> Any:
        optimizer = self.strategy.build_optimizer(lm.OptimizerConfig(lr=1e-2))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def torch_scheduler() -> list[float]:
    record = Rates()
    module = WithTorchScheduler(tiny_config())
    trainer = quiet_trainer(lm.MegatronStrategy(use_distributed_optimizer=True), 2, max_steps=5, callbacks=[record])
    trainer.fit(module, SharedLoader(module))
    return record.rates


def test_any_torch_scheduler_works(ranks: Any) -> None:
    for got in ranks.run(torch_scheduler, 2):
        assert got == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3])


def overflow() -> tuple[list[bool], list[float], list[float]]:
    skipped: list[bool] = []
    record = Rates()

    class Skips(Record):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            skipped.append(trainer.optimizers[0].skipped)

    module = lm.GPTModule(tiny_config(), lm.OptimizerConfig(lr=1e-2, lr_warmup_steps=5))
    precision = lm.MegatronPrecision("16-mixed", lm.LossScaling(initial=2.0**24, hysteresis=1))
    strategy = lm.MegatronStrategy(precision_plugin=precision)
    trainer = quiet_trainer(strategy, 1, max_steps=20, callbacks=[record, Skips()])
    trainer.fit(module, SharedLoader(module, length=160))
    return skipped, record.rates, record.losses


def test_fp16_overflows_skip_the_step_and_its_schedule(ranks: Any) -> None:
    skipped, learning_rates, losses = ranks.run(overflow, 1)[0]
    first = skipped.index(False)
    assert first > 0, "nothing overflowed"
    assert sum(skipped) < 19, "the scale did not fall"
    assert learning_rates[: first + 1] == [0.0] * (first + 1), "a skipped step moved the schedule"
    assert learning_rates[first + 1] == pytest.approx(2e-3)
    assert losses[-1] < losses[0]
