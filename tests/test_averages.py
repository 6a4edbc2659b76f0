"""Lightning's callbacks that average weights, against torch's ``AveragedModel`` of a plain module."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_megatron.backends import optimizer_state
from tests.checkpoint.runs import Case, make_module, make_trainer
from tests.helpers import Record, SharedLoader

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def average_of(kind: str) -> pl.Callback:
    if kind == "ema":
        return EMAWeightAveraging(decay=0.8)
    if kind == "swa":
        return StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=1, annealing_epochs=2)
    return WeightAveraging()


def weights_of(module: Any) -> list[torch.Tensor]:
    """The weights, or the float32 main weights of this rank where it has any."""
    states = list(optimizer_state.parameter_states(module.strategy.megatron_optimizer.core))
    if any(state.is_master for state in states):
        return [state.stepped.detach() for state in states]
    return [parameter.detach().float() for parameter in module.parameters()]


class TorchsAverage(pl.Callback):
    """The same averages of a plain module, which is given the weights."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.averaged: AveragedModel | None = None

    def plain(self, module: Any) -> torch.nn.Module:
        with module.strategy.gathered_weights():
            return torch.nn.ParameterList([weight.clone() for weight in weights_of(module)])

    def update(self, module: Any) -> None:
        plain = self.plain(module)
        if self.averaged is None:
            self.averaged = AveragedModel(plain, avg_fn=get_ema_avg_fn(0.8) if self.kind == "ema" else None)
        self.averaged.update_parameters(plain)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self.kind != "swa":
            self.update(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.kind == "swa":
            self.update(pl_module)


class SaveAt(pl.Callback):
    def __init__(self, path: Path | None, step: int) -> None:
        self.path, self.step = path, step

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(
    case: Case, kind: str, save: Path | None = None, resume: Path | None = None, validate: bool = False
) -> tuple[list[float], dict[str, torch.Tensor], float, list[float]]:
    """Losses, weights at the end, their distance from torch's averages, and what a validation measured."""
    module, record, beside = make_module(), Record(), TorchsAverage(kind)
    measured: list[float] = []

    class Measure(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            measured.append(float(trainer.callback_metrics["val_loss"]))

    callbacks = [record, beside, average_of(kind), SaveAt(save, 4), Measure()]
    limits: dict[str, Any] = {"max_epochs": 4, "limit_train_batches": 2}
    trainer = make_trainer(case, *callbacks, **limits)
    loader = SharedLoader(module, length=16)
    trainer.fit(module, loader, SharedLoader(module, length=8) if validate else None, ckpt_path=resume)
    weights = {name: weight.detach().float().clone() for name, weight in module.named_parameters()}
    error = float("nan")
    if resume is None:
        assert beside.averaged is not None
        averages = [average.detach() for average in beside.averaged.module.parameters()]
        if case.precision == "bf16-true" and not case.distributed:  # no main weights, so the average is rounded
            averages = [average.bfloat16().float() for average in averages]
        pairs = zip(weights_of(module), averages, strict=True)
        error = max(float((one - other).abs().max()) for one, other in pairs)
    for state in optimizer_state.parameter_states(trainer.strategy.megatron_optimizer.core):
        part = state.parameter.detach().flatten()[state.start :][: state.stepped.numel()]
        assert torch.equal(part, state.stepped.detach().flatten().to(part.dtype))
    return record.losses, weights, error, measured


CASES = [
    ("ema", Case(2, TP2)),
    ("ema", Case(2, distributed=True, ddp=OVERLAP)),
    ("swa", Case(2, PP2)),
    ("ema", Case(2, distributed=True, ddp=OVERLAP, precision="bf16-mixed")),
    pytest.param("swa", Case(2, distributed=True, ddp=OVERLAP, precision="bf16-mixed"), marks=pytest.mark.slow),
    pytest.param("mean", Case(2, PP2, precision="bf16-mixed"), marks=pytest.mark.slow),
    pytest.param("ema", Case(precision="bf16-true"), marks=pytest.mark.slow),
    pytest.param("swa", Case(2, distributed=True, precision="16-mixed"), marks=pytest.mark.slow),
    pytest.param("ema", Case(), marks=pytest.mark.slow),
    pytest.param("ema", Case(2, PP2), marks=pytest.mark.slow),
    pytest.param("mean", Case(2, TP2), marks=pytest.mark.slow),
    pytest.param("mean", Case(4, PP2, distributed=True, ddp=OVERLAP), marks=pytest.mark.slow),
    pytest.param("swa", Case(), marks=pytest.mark.slow),
    pytest.param("swa", Case(2, TP2), marks=pytest.mark.slow),
    pytest.param("swa", Case(2, distributed=True, ddp=OVERLAP), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_averages_are_torchs_and_resume_exactly(kind: str, case: Case, ranks: Any, tmp_path: Path) -> None:
    straight = ranks.run(run, case.world, case, kind, tmp_path / "saved")
    then = ranks.run(run, case.world, case, kind, None, tmp_path / "saved")
    for (losses, weights, error, _), (later, others, _, _) in zip(straight, then, strict=True):
        assert error < 1e-6
        assert losses[4:] == later
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_go_to_another_layout(kind: str, ranks: Any, tmp_path: Path) -> None:
    ranks.run(run, 2, Case(2, TP2), kind, tmp_path / "saved")
    straight = ranks.run(run, 1, Case(), kind)[0]
    for case in (Case(), Case(2, PP2), Case(2, distributed=True, ddp=OVERLAP)):
        for losses, weights, _, _ in ranks.run(run, case.world, case, kind, None, tmp_path / "saved"):
            assert losses == pytest.approx(straight[0][4:], abs=2e-6)
            if case.world == 1 or case.distributed:
                for name, weight in weights.items():
                    torch.testing.assert_close(weight, straight[1][name], rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_of_main_weights_go_to_another_layout(kind: str, ranks: Any, tmp_path: Path) -> None:
    one, two = Case(precision="bf16-mixed"), Case(2, distributed=True, ddp=OVERLAP, precision="bf16-mixed")
    of_one, of_two = (ranks.run(run, case.world, case, kind, tmp_path / f"{case.world}")[0] for case in (one, two))
    for case, saved, expected in ((one, "2", of_one), (two, "1", of_two)):
        for losses, weights, _, _ in ranks.run(run, case.world, case, kind, None, tmp_path / saved):
            assert losses == expected[0][4:]
            assert all(torch.equal(weight, expected[1][name]) for name, weight in weights.items())


def validated(path: Path, precision: str) -> None:
    case = Case(2, distributed=True, ddp=OVERLAP, precision=precision)
    losses, _, error, measured = run(case, "ema", path, validate=True)
    assert error < 1e-6
    assert losses == run(case, "ema")[0]  # a validation leaves the weights as they were
    # Without the callback a checkpoint has the averages, as with Lightning's own strategies.
    module = make_module()
    metrics = make_trainer(case).validate(module, SharedLoader(module, length=8), ckpt_path=path)[0]
    assert metrics["val_loss"] == pytest.approx(measured[1], abs=1e-6)


def copied() -> None:
    module = make_module()
    loader = SharedLoader(module, length=16)
    trainer = make_trainer(Case(), max_steps=1)
    trainer.fit(module, loader)
    copy = deepcopy(module)
    for (name, one), (other_name, other) in zip(module.named_parameters(), copy.named_parameters(), strict=True):
        assert name == other_name
        assert one.data_ptr() != other.data_ptr()
        assert torch.equal(one, other)
    assert list(module.state_dict()) == list(copy.state_dict())
    measured = trainer.validate(module, loader)[0]
    again = make_trainer(Case(), max_steps=1)
    copy_loader = SharedLoader(copy, length=16)
    assert again.validate(copy, copy_loader)[0] == measured


def test_copies_and_validation(ranks: Any, tmp_path: Path) -> None:
    ranks.run(copied, 1)
    ranks.run(validated, 2, tmp_path / "saved", "32-true")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_validation_rounds_no_averages(precision: str, ranks: Any, tmp_path: Path) -> None:
    ranks.run(validated, 2, tmp_path / "saved", precision)


class Nudges(pl.Callback):
    """Adds to all weights, after the first step, less than 16 bits can tell."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.before = [weight.clone() for weight in weights_of(pl_module)]
            with trainer.strategy.main_weights(), torch.no_grad():
                for weight in pl_module.parameters():
                    assert weight.dtype == torch.float32
                    weight.mul_(1.0 + 2.0**-12)
            self.after = [weight.clone() for weight in weights_of(pl_module)]
            assert all(weight.dtype == torch.bfloat16 for weight in pl_module.parameters())


def nudged(case: Case) -> None:
    nudges, module = Nudges(), make_module()
    trainer = make_trainer(case, nudges, max_steps=2)
    trainer.fit(module, SharedLoader(module))
    for before, after in zip(nudges.before, nudges.after, strict=True):
        assert torch.equal(after, before * (1.0 + 2.0**-12))
    assert float(trainer.callback_metrics["train_loss"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(precision="bf16-mixed"), Case(2, distributed=True, ddp=OVERLAP, precision="bf16-mixed")],
    ids=["one process", "dp2"],
)
def test_callbacks_of_users_see_main_weights(ranks: Any, case: Case) -> None:
    ranks.run(nudged, case.world, case)
