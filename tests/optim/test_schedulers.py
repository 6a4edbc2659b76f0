"""LR schedulers of torch on a Megatron optimizer: the rates and momenta of ``torch.optim.AdamW``, resumed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.swa_utils import SWALR

import lightning_megatron as lm
from tests.checkpoint.runs import Case
from tests.helpers import SharedLoader, quiet_trainer, tiny_config

STEPS = 9
LR = 2e-3


def _chained(optimizer: Any) -> Any:
    first = torch_schedulers.ConstantLR(optimizer, factor=0.5, total_iters=3)
    return torch_schedulers.ChainedScheduler([first, torch_schedulers.ExponentialLR(optimizer, gamma=0.9)])


def _sequential(optimizer: Any) -> Any:
    first = torch_schedulers.LinearLR(optimizer, 0.1, total_iters=4)
    return torch_schedulers.SequentialLR(
        optimizer, [first, torch_schedulers.CosineAnnealingLR(optimizer, T_max=5)], milestones=[4]
    )


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: torch_schedulers.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: torch_schedulers.MultiStepLR(o, milestones=[2, 6], gamma=0.3),
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, [lambda n: 0.9**n, lambda n: 0.8**n]),
    "MultiplicativeLR": lambda o: torch_schedulers.MultiplicativeLR(o, lambda n: 0.9),
    "ConstantLR": lambda o: torch_schedulers.ConstantLR(o, factor=0.25, total_iters=5),
    "LinearLR": lambda o: torch_schedulers.LinearLR(o, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda o: torch_schedulers.ExponentialLR(o, gamma=0.7),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, T_max=6, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: torch_schedulers.CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=3),
    "CyclicLR_scaled": lambda o: torch_schedulers.CyclicLR(o, 1e-4, 1e-3, 2, scale_fn=lambda x: 0.9**x),
    "OneCycleLR": lambda o: torch_schedulers.OneCycleLR(o, max_lr=1e-2, total_steps=STEPS + 1),
    "OneCycleLR_groups": lambda o: torch_schedulers.OneCycleLR(
        o, max_lr=[1e-2, 3e-3], total_steps=STEPS + 1, three_phase=True, anneal_strategy="linear"
    ),
    "PolynomialLR": lambda o: torch_schedulers.PolynomialLR(o, total_iters=8, power=2.0),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "ReduceLROnPlateau": lambda o: torch_schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: SWALR(o, swa_lr=1e-4, anneal_epochs=5),
}
QUICK = ("OneCycleLR_groups", "ReduceLROnPlateau")


class Scheduled(lm.GPTModule):
    def __init__(self, name: str | None, **options: Any) -> None:
        config = tiny_config(num_layers=2, hidden_size=16, num_attention_heads=2)
        super().__init__(config, lm.OptimizerConfig(lr=LR, **options))
        self.scheduler = name

    def configure_optimizers(self) -> Any:
        optimizer = self.strategy.build_optimizer(self.optimizer_config)
        if self.scheduler is None:
            return optimizer
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "flat"}}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("flat", 1.0)
        return super().training_step(batch, batch_idx)


class Options(pl.Callback):
    """``(lr, momentum)`` of every group at each step."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[float, ...]]] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.seen.append(_options(trainer.optimizers[0]))


def _options(optimizer: Any) -> list[tuple[float, ...]]:
    groups = optimizer.param_groups
    return [(group["lr"], group["betas"][0] if "betas" in group else group["momentum"]) for group in groups]


def reference(name: str, kind: str = "adam") -> list[list[tuple[float, ...]]]:
    """The same of torch alone."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": decay} for decay in (0.01, 0.0)]
    optimizer: torch.optim.Optimizer
    if kind == "adam":
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    else:
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for _ in range(STEPS):
        seen.append(_options(optimizer))
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    return seen


def fit(
    name: str | None, case: Case, steps: int, *more: pl.Callback, resume: Path | None = None, **options: Any
) -> Any:
    module, seen = Scheduled(name, **options), Options()
    settings: dict[str, Any] = {"precision": case.precision}
    if case.precision == "16-mixed":
        plugin = lm.MegatronPrecision("16-mixed", lm.LossScaling(initial=2.0**8))
        settings = {"plugins": [plugin]}
    trainer = quiet_trainer(case.strategy(), case.world, max_steps=steps, callbacks=[seen, *more], **settings)
    trainer.fit(module, SharedLoader(module, length=160), ckpt_path=resume)
    return trainer, seen.seen


def options_over_a_resume(names: list[str], first: Case, second: Case, path: Path, kind: str = "adam") -> Any:
    found = {}
    for name in names:
        trainer, before = fit(name, first, 5, optimizer=kind)
        trainer.save_checkpoint(path / name)
        found[name] = before + fit(name, second, STEPS, resume=path / name, optimizer=kind)[1]
    return found


TP2 = {"tensor_model_parallel_size": 2}
CASES = {
    "plain": (Case(2), Case(2)),
    "distributed-to-tp": (Case(2, distributed=True), Case(2, TP2)),
    "bf16": (Case(2, TP2, precision="bf16-mixed"), Case(2, distributed=True, precision="bf16-mixed")),
    "fp16": (Case(2, distributed=True, precision="16-mixed"), Case(2, precision="16-mixed")),
}


def _check(ranks: Any, names: list[str], case: str, path: Path, kind: str = "adam") -> None:
    wanted = {name: reference(name, kind) for name in names}
    for found in ranks.run(options_over_a_resume, 2, names, *CASES[case], path, kind, timeout=600.0):
        for name in names:
            assert len(found[name]) == STEPS
            for step, (ours, torchs) in enumerate(zip(found[name], wanted[name], strict=True)):
                assert ours == [pytest.approx(group, rel=1e-12) for group in torchs], (name, step)


def test_schedulers_do_what_they_do_on_adamw(ranks: Any, tmp_path: Path) -> None:
    _check(ranks, list(QUICK), "distributed-to-tp", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), [*((case, "adam") for case in CASES), ("distributed-to-tp", "sgd")])
def test_every_scheduler_of_torch(ranks: Any, tmp_path: Path, case: str, kind: str) -> None:
    _check(ranks, list(SCHEDULERS), case, tmp_path, kind)


class Edit(pl.Callback):
    """Sets options by hand at step 2, as a fine-tuning callback does."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            for group, rate in zip(trainer.optimizers[0].param_groups, (7e-4, 3e-4), strict=True):
                group["lr"], group["betas"] = rate, (0.8, 0.95)


def edited(path: Path) -> Any:
    """By hand without a scheduler; each rank's options after a resume, and what a new configuration changes."""
    trainer, _ = fit(None, Case(2, distributed=True), 4, Edit())
    trainer.save_checkpoint(path)
    _, resumed = fit(None, Case(2, TP2), 6, resume=path)
    _, untouched = fit(None, Case(2), 4)
    other = Case(2)
    trainer, _ = fit(None, other, 3)
    trainer.save_checkpoint(path.with_name("unedited"))
    _, configured = fit(None, other, 5, resume=path.with_name("unedited"), adam_beta1=0.7)
    return resumed, untouched, configured


def test_options_set_by_hand_survive_a_resume(ranks: Any, tmp_path: Path) -> None:
    for resumed, untouched, configured in ranks.run(edited, 2, tmp_path / "edited"):
        assert resumed[1:] == [[(7e-4, 0.8), (3e-4, 0.8)]], resumed
        assert untouched == [[(LR, 0.9), (LR, 0.9)]] * 4
        assert configured[-1] == [(LR, 0.7), (LR, 0.7)], "what nobody changed follows this run's configuration"


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def monitored(directory: Path) -> Any:
    monitor, seen = LearningRateMonitor(log_momentum=True, log_weight_decay=True), Seen()
    module = Scheduled("OneCycleLR")
    trainer = quiet_trainer(
        lm.MegatronStrategy(use_distributed_optimizer=True),
        2,
        max_steps=4,
        callbacks=[monitor, seen],
        logger=CSVLogger(directory),
        log_every_n_steps=1,
    )
    trainer.fit(module, SharedLoader(module))
    return {name: value for name, value in seen.metrics.items() if name.startswith("lr-")}


def test_learning_rate_monitor_shows_true_values(ranks: Any, tmp_path: Path) -> None:
    wanted = reference("OneCycleLR")[3]
    name = "lr-MegatronOptimizer/pg"
    for found in ranks.run(monitored, 2, tmp_path):
        for group, decay in ((1, 0.01), (2, 0.0)):
            rate, momentum = wanted[group - 1]
            assert found[f"{name}{group}"] == pytest.approx(rate)
            assert found[f"{name}{group}-momentum"] == pytest.approx(momentum)
            assert found[f"{name}{group}-weight_decay"] == pytest.approx(decay)
