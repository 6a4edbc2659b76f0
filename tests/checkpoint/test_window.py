"""Checkpoints inside an accumulation window, and before the first completed optimizer step."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, override

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

import lightning_megatron as lm
from lightning_megatron.callbacks import Preemption
from lightning_megatron.checkpoint.shard_files import ShardFiles
from tests.checkpoint.runs import Case, make_module, make_trainer
from tests.helpers import Record, SharedLoader

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
EXPERTS = {"num_moe_experts": 4, "add_bias_linear": False}


class TwoTerms(lm.GPTModule):
    """Its second term counts the tokens that are even, fewer or more than half of those of a batch."""

    @override
    def loss(self, output: torch.Tensor, microbatch: dict[str, Any]) -> lm.Loss:
        even = microbatch["tokens"] % 2 == 0
        terms = {"even": ((output.float() * even).sum(), even.sum())}
        return replace(super().loss(output, microbatch), extra_terms=terms)

    @override
    def loss_counts(self, batch: Any) -> dict[str, Any]:
        return {"num_tokens": batch["loss_mask"].sum(), "even": (batch["tokens"] % 2 == 0).sum()}


@dataclass(frozen=True)
class Saves:
    """Where a run saves."""

    at: int | str
    """Batches before it, or ``"start"``."""
    accumulate: int = 3
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    loss_scale: float | None = None
    kind: type[lm.GPTModule] = lm.GPTModule


class SaveAt(pl.Callback):
    def __init__(self, path: Path, at: int | str) -> None:
        self.path, self.at = path, at

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.at == "start":
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.at == trainer.fit_loop.total_batch_idx + 1:
            trainer.save_checkpoint(self.path)


def run(
    case: Case, saves: Saves, save: Path | None, resume: Path | None, steps: int = 3
) -> tuple[list[float], dict[str, torch.Tensor]]:
    plain = make_module(saves.model, **saves.optimizer)
    module, record = saves.kind(plain.config, plain.optimizer_config), Record()
    callbacks = [record, *([SaveAt(save, saves.at)] if save else [])]
    options: dict[str, Any] = {"max_steps": steps, "accumulate_grad_batches": saves.accumulate}
    trainer = make_trainer(case, *callbacks, **options)
    if saves.loss_scale is not None:
        trainer.strategy.precision_plugin = lm.MegatronPrecision("16-mixed", lm.LossScaling(initial=saves.loss_scale))
    trainer.fit(module, SharedLoader(module, length=160), ckpt_path=resume)
    return record.losses, {name: weight.detach().clone() for name, weight in module.chunks.named_parameters()}


def resumes_exactly(ranks: Any, path: Path, case: Case, saves: Saves) -> list[float]:
    """Same losses and weights, bit by bit, on every rank."""
    straight = ranks.run(run, case.world, case, saves, path, None)
    then = ranks.run(run, case.world, case, saves, None, path)
    for (losses, weights), (later, others) in zip(straight, then, strict=True):
        assert losses[-len(later) :] == later
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    return straight[0][0]


def test_inside_a_window(ranks: Any, tmp_path: Path) -> None:
    case = Case(2, TP2)
    saves = Saves(4, kind=TwoTerms)
    losses = resumes_exactly(ranks, tmp_path / "saved", case, saves)
    for other in (Case(2, distributed=True, ddp=OVERLAP), Case()):
        later = ranks.run(run, other.world, other, saves, None, tmp_path / "saved")[0][0]
        assert later == pytest.approx(losses[4:], abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "saves"),
    [
        (Case(), Saves(1)),
        (Case(2, distributed=True, ddp=OVERLAP), Saves(4)),
        (Case(2, distributed=True, ddp=OVERLAP, precision="bf16-mixed"), Saves(5)),
        (Case(2), Saves(4)),
        (Case(2, TP2), Saves(4)),
        (Case(2), Saves(5, kind=TwoTerms)),
        (Case(2, PP2, distributed=True, ddp=OVERLAP), Saves(4, kind=TwoTerms)),
        (Case(2, {"context_parallel_size": 2}, precision="bf16-mixed"), Saves(4, kind=TwoTerms)),
        (Case(2, PP2), Saves(4)),
        (Case(2, {"context_parallel_size": 2}), Saves(4)),
        (Case(2, {"expert_model_parallel_size": 2}), Saves(4, model=EXPERTS)),
        (Case(precision="16-mixed"), Saves(4)),
        (Case(2, precision="bf16-true"), Saves(4)),
        (Case(4, {**PP2, **TP2}), Saves(4)),
    ],
)
def test_inside_a_window_of_each_kind(ranks: Any, tmp_path: Path, case: Case, saves: Saves) -> None:
    losses = resumes_exactly(ranks, tmp_path / "saved", case, saves)
    if case.precision == "32-true" and "expert_model_parallel_size" not in case.layout:
        for other in (Case(), Case(4, PP2, distributed=True)):
            later = ranks.run(run, other.world, other, saves, None, tmp_path / "saved")[0][0]
            assert later == pytest.approx(losses[int(saves.at) :], abs=2e-6)


@pytest.mark.parametrize(
    ("case", "saves"),
    [
        (Case(2, distributed=True), Saves("start")),
        pytest.param(Case(), Saves("start"), marks=pytest.mark.slow),
        pytest.param(Case(precision="16-mixed"), Saves(2, accumulate=1, loss_scale=2.0**60), marks=pytest.mark.slow),
        pytest.param(Case(2, TP2, precision="bf16-mixed"), Saves("start"), marks=pytest.mark.slow),
        pytest.param(Case(2, PP2), Saves(1), marks=pytest.mark.slow),
        pytest.param(Case(2), Saves("start", optimizer={"optimizer": "sgd"}), marks=pytest.mark.slow),
    ],
    ids=["distributed", "one", "fp16-overflows", "tp2-bf16", "pp2-first-window", "sgd"],
)
def test_before_the_first_step(ranks: Any, tmp_path: Path, case: Case, saves: Saves) -> None:
    losses = resumes_exactly(ranks, tmp_path / "saved", case, saves)
    if case.precision == "32-true":
        begun = saves.at if isinstance(saves.at, int) else 0
        later = ranks.run(run, 2, Case(2, TP2), saves, None, tmp_path / "saved")[0][0]
        assert later == pytest.approx(losses[begun:], abs=2e-6)


def at_no_step(path: Path) -> None:
    module = make_module()
    trainer = make_trainer(Case(), max_steps=0)
    trainer.fit(module, SharedLoader(module))
    trainer.save_checkpoint(path)
    resumed = run(Case(), Saves(0, accumulate=1), None, path)[0]
    assert resumed == run(Case(), Saves(0, accumulate=1), None, None)[0]


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.chunks.named_parameters()}


def finds_rate(case: Case) -> tuple[float, list[float], list[float]]:
    """The rate that was found, and losses of a fit with it, after the search and without one."""
    module, record = make_module(lr=1e-3), Record()
    trainer = make_trainer(case, record, max_steps=4)
    found = Tuner(trainer).lr_find(module, SharedLoader(module, length=400), num_training=16, min_lr=1e-6, max_lr=1.0)
    assert found is not None
    assert len(found.results["lr"]) >= 10
    assert trainer.global_step == 0
    rate = found.suggestion()
    assert rate is not None
    assert module.learning_rate == module.optimizer_config.lr == rate
    untouched = make_module()
    make_trainer(case, max_steps=0).fit(untouched, SharedLoader(untouched))
    assert all(torch.equal(weight, weights(module)[name]) for name, weight in weights(untouched).items())
    trainer.fit(module, SharedLoader(module))
    assert trainer.global_step == 4
    assert trainer.strategy.megatron_optimizer.param_groups[0]["max_lr"] == rate
    other, straight = make_module(lr=rate), Record()
    make_trainer(case, straight, max_steps=4).fit(other, SharedLoader(other))
    return rate, record.losses, straight.losses


class Rates(pl.Callback):
    """The rate that each step was taken with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def searches_in_the_fit() -> None:
    module, rates = make_module(lr=1e-3, lr_warmup_steps=0, lr_decay_style="constant"), Rates()
    finder = LearningRateFinder(num_training_steps=16, min_lr=1e-6, max_lr=1.0)
    trainer = make_trainer(Case(), finder, rates, max_steps=4)
    trainer.fit(module, SharedLoader(module, length=400))
    assert finder.optimal_lr is not None
    assert rates.rates[-4:] == [finder.optimal_lr.suggestion()] * 4


def test_no_step_and_lr_find(ranks: Any, tmp_path: Path) -> None:
    ranks.run(at_no_step, 1, tmp_path / "none")
    ranks.run(searches_in_the_fit, 1)
    _, after, straight = ranks.run(finds_rate, 1, Case())[0]
    assert after == straight


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(2, distributed=True, ddp=OVERLAP), Case(2, PP2), Case(2, TP2)],
    ids=["dp2", "pp2", "tp2"],
)
def test_lr_find_on_several_ranks(ranks: Any, case: Case) -> None:
    one = ranks.run(finds_rate, 1, Case())[0][0]
    for rate, after, straight in ranks.run(finds_rate, 2, case):
        assert after == straight
        assert rate == pytest.approx(one, rel=1e-6)


# ------------------------------------------------------------------------------------------- what saves in a window


class Terminate(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def preempted(path: Path) -> bool:
    straight = run(Case(), Saves(0, accumulate=2), None, None)
    module = make_module()
    trainer = make_trainer(
        Case(), Terminate(), Preemption(directory=path), max_steps=3, accumulate_grad_batches=2, default_root_dir=path
    )
    with pytest.raises(SystemExit):
        trainer.fit(module, SharedLoader(module, length=160))
    resumed = run(Case(), Saves(0, accumulate=2), None, path / "last.ckpt")
    window = any(key.startswith("optimizer.state.accumulated.") for key in ShardFiles.open(path / "last.ckpt").shapes)
    assert all(torch.equal(weight, resumed[1][name]) for name, weight in straight[1].items())
    assert straight[0][-len(resumed[0]) :] == resumed[0]
    return window


def saved_by_checkpoints(path: Path) -> None:
    straight = run(Case(), Saves(0), None, None)
    for number, options in enumerate(({"every_n_train_steps": 1}, {"monitor": None, "every_n_epochs": 1})):
        saver = ModelCheckpoint(path / str(number), save_top_k=-1, filename="{step}-{epoch}", **options)
        module = make_module()
        trainer = make_trainer(
            Case(), saver, max_steps=3, accumulate_grad_batches=3, enable_checkpointing=True, val_check_interval=2
        )
        trainer.fit(module, SharedLoader(module, length=160), SharedLoader(module, length=8))
        for checkpoint in sorted((path / str(number)).glob("*.ckpt")):
            losses, weights = run(Case(), Saves(0), None, checkpoint)
            assert all(torch.equal(weight, weights[name]) for name, weight in straight[1].items()), checkpoint
            assert straight[0][len(straight[0]) - len(losses) :] == losses


def test_whoever_saves_in_a_window(ranks: Any, tmp_path: Path) -> None:
    assert ranks.run(preempted, 1, tmp_path / "preempted") == [True]
    ranks.run(saved_by_checkpoints, 1, tmp_path / "callbacks")
