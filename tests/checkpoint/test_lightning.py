"""Lightning's own ways to checkpoint: ModelCheckpoint, ckpt_path, the middle of an epoch, weights alone, callbacks."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_megatron as lm
from lightning_megatron.callbacks import InitialWeights, NonFinite, NonFiniteError, Preemption
from lightning_megatron.checkpoint import CheckpointOptions, verify
from lightning_megatron.checkpoint import saver as saver_module
from lightning_megatron.checkpoint.publish import local_path
from lightning_megatron.errors import CheckpointError
from tests.checkpoint.runs import Case, make_module, make_trainer, tensors, train
from tests.helpers import Record, SharedLoader, plain_loader, quiet_trainer, tiny_config
from tests.ranks import RankPool

TP2 = {"tensor_model_parallel_size": 2}
CASE = Case(2, TP2)


class Counter(pl.Callback):
    """A callback with a state of its own."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


def _fit(
    case: Case, directory: Path, steps: int, ckpt_path: Any = None, background: bool = False, **options: Any
) -> Any:
    module, record, counter = make_module(), Record(), Counter()
    checkpoint = ModelCheckpoint(
        directory, **{"filename": "{step}", "every_n_train_steps": 1, "save_last": True, **options}
    )
    strategy = case.strategy()
    strategy._checkpoint_options = CheckpointOptions(background=background)
    trainer = quiet_trainer(
        strategy, case.world, max_steps=steps, callbacks=[record, counter, checkpoint], enable_checkpointing=True
    )
    trainer.fit(module, SharedLoader(module, length=160), ckpt_path=ckpt_path)
    return record.losses, counter.batches, checkpoint.best_model_path, trainer.global_step


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_top_k_last_and_best(ranks: RankPool, tmp_path: Path, background: bool) -> None:
    options = {"monitor": "train_loss", "save_top_k": 2}
    results = ranks.run(_fit_with, 2, CASE, tmp_path, 5, None, background, options)
    losses, _, best, _ = results[0]
    assert results[0] == results[1]
    ranked = sorted(range(5), key=lambda step: losses[step])[:2]
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", *(f"step={step + 1}.ckpt" for step in ranked)}
    assert Path(best).name == f"step={ranked[0] + 1}.ckpt"
    assert all(verify(path) == [] for path in tmp_path.iterdir())
    resumed, batches, _, step = ranks.run(_fit_with, 2, CASE, tmp_path, 7, "last", background, options)[0]
    assert (len(resumed), batches, step) == (2, 7, 7)
    straight = ranks.run(_fit_with, 2, CASE, tmp_path / "straight", 7, None, False, {})[0][0]
    assert losses + resumed == straight


def _fit_with(case: Case, directory: Path, steps: int, ckpt_path: Any, background: bool, options: dict) -> Any:
    return _fit(case, directory, steps, ckpt_path, background, **options)


def _epochs(directory: Path, steps: int, resume: Path | None) -> list[list[int]]:
    module, seen = make_module(), []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["tokens"].sum(dim=1).tolist())

    trainer = make_trainer(CASE, Seen(), max_steps=steps)
    trainer.fit(module, plain_loader(8, 40), ckpt_path=resume)
    trainer.save_checkpoint(directory)
    return seen


def test_resumes_in_the_middle_of_an_epoch(ranks: RankPool, tmp_path: Path) -> None:
    straight = ranks.run(_epochs, 2, tmp_path / "a", 8, None)[0]
    first = ranks.run(_epochs, 2, tmp_path / "b", 3, None)[0]
    then = ranks.run(_epochs, 2, tmp_path / "c", 8, tmp_path / "b")[0]
    assert first + then == straight


def _weights_only(directory: Path) -> str:
    module = make_module()
    checkpoint = ModelCheckpoint(directory, filename="w", save_weights_only=True, every_n_train_steps=2)
    trainer = quiet_trainer(CASE.strategy(), 2, max_steps=2, callbacks=[checkpoint], enable_checkpointing=True)
    trainer.fit(module, SharedLoader(module))
    before = trainer.validate(module, SharedLoader(module), verbose=False)[0]["val_loss"]
    fresh, again = make_module(), quiet_trainer(Case(2).strategy(), 2)
    after = again.validate(fresh, SharedLoader(fresh), ckpt_path=directory / "w.ckpt", verbose=False)[0]["val_loss"]
    assert after == pytest.approx(before, abs=1e-5)
    try:
        make_trainer(Case(2), max_steps=3).fit(
            fresh := make_module(), SharedLoader(fresh), ckpt_path=directory / "w.ckpt"
        )
    except KeyError as error:
        return str(error)
    return ""


def test_weights_only(ranks: RankPool, tmp_path: Path) -> None:
    assert "contains only the model" in ranks.run(_weights_only, 2, tmp_path)[0]
    assert not [key for key in tensors(tmp_path / "w.ckpt") if key.startswith("optimizer.")]


def _start_from(path: Path, to: Path, include: list[str], precision: str) -> str:
    case = Case(2, distributed=True, precision=precision)
    module = make_module(lr=0.0)
    trainer = make_trainer(case, InitialWeights(path, include=include), max_steps=1)
    try:
        trainer.fit(module, SharedLoader(module))
    except CheckpointError as error:
        return str(error)
    trainer.save_checkpoint(to)
    return ""


def test_initial_weights_by_pattern(ranks: RankPool, tmp_path: Path) -> None:
    def train_two(save: Path) -> None:
        train(CASE, 2, save=save)

    ranks.run(_save_two, 2, tmp_path / "from")
    ranks.run(_start_from, 2, tmp_path / "from", tmp_path / "part", ["decoder.*mlp*"], "bf16-mixed")
    one, other = tensors(tmp_path / "from"), tensors(tmp_path / "part")
    mlp, attention = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.self_attention.linear_qkv.weight"
    assert torch.equal(one[mlp], other[f"optimizer.state.fp32_param.{mlp}"])
    assert torch.equal(one[mlp].bfloat16(), other[mlp])
    assert not torch.equal(one[attention].bfloat16(), other[attention])
    error = ranks.run(_start_from, 2, tmp_path / "from", tmp_path / "x", ["nothing.*"], "32-true")[0]
    assert "No weight of the model matches ['nothing.*']" in error


def _save_two(save: Path) -> None:
    train(CASE, 2, save=save)


# ------------------------------------------------------------------------------------------------- in the background


class _Slow(pl.Callback):
    """Holds a background write back until three more steps are done, then says so."""

    def __init__(self, at: Path, when_busy: str) -> None:
        self.at, self.gate, self.saved = at, threading.Event(), []
        self.when_busy = when_busy

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            write = saver_module.Snapshot.write
            gate = self.gate

            def held(snapshot: Any, team: Any) -> None:
                gate.wait(60)
                write(snapshot, team)

            saver_module.Snapshot.write = held
            trainer.save_checkpoint(self.at / "two")
            saver_module.Snapshot.write = write
        if trainer.global_step == 4:
            assert not (self.at / "two").exists()
            if self.when_busy == "skip":
                trainer.save_checkpoint(self.at / "four")
        if trainer.global_step == 5:
            self.gate.set()


def _background(directory: Path, when_busy: str, background: bool) -> None:
    strategy = lm.MegatronStrategy(
        tensor_model_parallel_size=2, seed=7, checkpoint=CheckpointOptions(background, when_busy=when_busy)
    )
    module = make_module()
    callbacks = [_Slow(directory, when_busy)] if background else []
    trainer = quiet_trainer(strategy, 2, max_steps=6 if background else 2, callbacks=callbacks)
    trainer.fit(module, SharedLoader(module, length=160))
    if not background:
        trainer.save_checkpoint(directory / "reference")


def test_background_saves_are_snapshots(ranks: RankPool, tmp_path: Path) -> None:
    """Weights change in place while they are written; what is written are those of the step of the save."""
    ranks.run(_background, 2, tmp_path, "skip", True)
    ranks.run(_background, 2, tmp_path, "skip", False)
    one, other = tensors(tmp_path / "two"), tensors(tmp_path / "reference")
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    assert not (tmp_path / "four").exists()
    assert not list(tmp_path.glob(".*"))


class _Break(pl.Callback):
    """Begins a background save that takes a second, and ends the fit while it is written."""

    def __init__(self, at: Path, how: str) -> None:
        self.at, self.how = at, how

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            write = saver_module.Snapshot.write

            def slowly(snapshot: Any, team: Any) -> None:
                time.sleep(1.0)
                write(snapshot, team)

            saver_module.Snapshot.write = slowly
            trainer.save_checkpoint(self.at, weights_only=False)
            saver_module.Snapshot.write = write
        if trainer.global_step == 3:
            assert not self.at.exists()
            if self.how == "exception":
                raise ArithmeticError("no more")
            os.kill(os.getpid(), signal.SIGTERM)


def _broken_off(path: Path, how: str) -> tuple[str, int]:
    strategy = lm.MegatronStrategy(tensor_model_parallel_size=2, checkpoint=CheckpointOptions(background=True))
    module = make_module()
    trainer = quiet_trainer(strategy, 2, max_steps=20, callbacks=[_Break(path, how)])
    try:
        trainer.fit(module, SharedLoader(module, length=160))
    except (ArithmeticError, SIGTERMException) as error:
        return type(error).__name__, trainer.global_step
    return "", trainer.global_step


@pytest.mark.parametrize(("how", "error"), [("exception", "ArithmeticError"), ("SIGTERM", "SIGTERMException")])
def test_a_background_save_is_finished_when_a_fit_breaks_off(
    ranks: RankPool, tmp_path: Path, how: str, error: str
) -> None:
    results = ranks.run(_broken_off, 2, tmp_path / "two", how)
    assert [name for name, _ in results] == [error, error]
    assert all(step < 6 for _, step in results)
    assert verify(tmp_path / "two") == []
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_urls_are_no_paths() -> None:
    with pytest.raises(CheckpointError, match=r"s3://bucket/last\.ckpt is a URL"):
        local_path("s3://bucket/last.ckpt")
    assert local_path("file:///tmp/last.ckpt") == local_path("/tmp/last.ckpt") == Path("/tmp/last.ckpt")


# ------------------------------------------------------------------------------------------------------- disk full


def _full_disk(directory: Path, on_error: str) -> tuple[str, int]:
    class Full(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(directory / "last.ckpt")
            if trainer.global_step == 2:
                from lightning_megatron.checkpoint import io

                write = io.write_file

                def no_space(path: Path, tensors: Any, **options: Any) -> Any:
                    if trainer.global_rank == 1:
                        raise OSError(28, "No space left on device")
                    return write(path, tensors, **options)

                io.write_file = no_space
                try:
                    trainer.save_checkpoint(directory / "last.ckpt")
                finally:
                    io.write_file = write

    strategy = lm.MegatronStrategy(tensor_model_parallel_size=2, checkpoint=CheckpointOptions(on_error=on_error))
    module = make_module()
    trainer = quiet_trainer(strategy, 2, max_steps=3, callbacks=[Full()])
    try:
        trainer.fit(module, SharedLoader(module))
    except CheckpointError as error:
        return str(error), trainer.global_step
    return "", trainer.global_step


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_full_disk(ranks: RankPool, tmp_path: Path, on_error: str) -> None:
    results = ranks.run(_full_disk, 2, tmp_path, on_error)
    assert results[0] == results[1]
    error, step = results[0]
    if on_error == "raise":
        assert "failed on rank 1: the disk is full" in error
    else:
        assert (error, step) == ("", 3)
    assert verify(tmp_path / "last.ckpt") == []
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


# ------------------------------------------------------------------------------------------------------- preemption


def _preempted(directory: Path, number: int, rank: int) -> int:
    class Signal(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2 and trainer.global_rank == rank:
                os.kill(os.getpid(), number)

    module = make_module()
    trainer = make_trainer(CASE, Signal(), Preemption(directory=directory), max_steps=6)
    try:
        trainer.fit(module, SharedLoader(module, length=160))
    except SystemExit as leaving:
        return leaving.code
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption(ranks: RankPool, tmp_path: Path, number: int) -> None:
    assert ranks.run(_preempted, 2, tmp_path, number, 1) == [75, 75]
    assert verify(tmp_path / "last.ckpt") == []
    losses = ranks.run(_resume, 2, tmp_path / "last.ckpt")[0]
    assert len(losses) == 3
    assert losses == ranks.run(_resume, 2, None)[0][3:]


def _resume(path: Path | None) -> list[float]:
    return train(CASE, 6, resume=path)


def _preempted_by_slurm(root: Path, resume: str | None) -> tuple[int, int]:
    class Job(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2 and resume is None:
                os.environ["SLURM_JOB_ID"] = "123"  # not before, or Lightning would take the world from Slurm
                os.environ["PATH"] = f"{root}{os.pathsep}{os.environ['PATH']}"
                os.kill(os.getpid(), signal.SIGUSR1)

    module = make_module()
    trainer = make_trainer(CASE, Job(), Preemption(), max_steps=5, default_root_dir=root)
    path = os.environ["PATH"]
    try:
        trainer.fit(module, SharedLoader(module, length=160), ckpt_path=resume)
    except SystemExit as leaving:
        return leaving.code, trainer.global_step
    finally:
        os.environ["PATH"] = path
        os.environ.pop("SLURM_JOB_ID", None)
    return 0, trainer.global_step


def test_slurm_requeues_and_lightning_finds_the_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    scontrol.chmod(0o755)
    assert ranks.run(_preempted_by_slurm, 2, tmp_path, None) == [(75, 3), (75, 3)]
    assert (tmp_path / "calls").read_text() == "requeue 123\n"  # once, by one rank
    assert verify(tmp_path / "hpc_ckpt_1.ckpt") == []
    assert ranks.run(_preempted_by_slurm, 2, tmp_path, "hpc") == [(0, 5), (0, 5)]


# ------------------------------------------------------------------------------------------------------------- NaN


def _poisoned(policy: str, layout: dict, world: int, distributed: bool) -> tuple[str, int, bool]:
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            chunk = pl_module.chunks[-1]
            self.weight = (
                dict(chunk.named_parameters())["decoder.final_layernorm.weight"] if trainer.global_rank == 1 else None
            )
            if batch_idx == 1 and self.weight is not None:
                self.clean = self.weight.detach().clone()
                self.weight.data[0] = float("nan")

        def on_before_zero_grad(self, *args: Any) -> None:
            if self.weight is not None and self.weight.isnan().any():
                self.weight.data.copy_(self.clean)

    module, health, record = make_module(), NonFinite(policy), Record()
    trainer = make_trainer(Case(world, layout, distributed), Poison(), health, record, max_steps=3)
    try:
        trainer.fit(module, SharedLoader(module))
    except NonFiniteError as error:
        return str(error), health.skipped, False
    finite = all(torch.isfinite(p).all() for p in module.parameters())
    return "", health.skipped, bool(finite) and record.losses[2] == record.losses[2]


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(("layout", "distributed"), [({"pipeline_model_parallel_size": 2}, False), ({}, True)])
def test_nan(ranks: RankPool, policy: str, layout: dict, distributed: bool) -> None:
    results = ranks.run(_poisoned, 2, policy, layout, 2, distributed)
    assert results[0] == results[1]
    error, skipped, finite = results[0]
    if policy == "raise":
        assert "The loss and the gradient of " in error
        assert "decoder.final_layernorm.weight" + (" of stage 1" if layout else "") in error
        assert f"in samples {list(range(8, 16))}" in error
    else:
        assert (skipped, finite) == (1, True)


class _InfiniteLoss(lm.GPTModule):
    """A loss that is infinite, while its gradients are not."""

    def loss(self, output: torch.Tensor, microbatch: dict[str, Any]) -> lm.Loss:
        loss = super().loss(output, microbatch)
        return lm.Loss(loss.sum + float("inf"), loss.num_tokens)


def _infinite() -> str:
    module = _InfiniteLoss(tiny_config())
    trainer = make_trainer(CASE, NonFinite(), max_steps=1, accumulate_grad_batches=2)
    try:
        trainer.fit(module, SharedLoader(module, length=160))
    except NonFiniteError as error:
        return str(error)
    return ""


def test_infinite_loss(ranks: RankPool) -> None:
    for error in ranks.run(_infinite, 2):
        assert error == f"The loss is not finite in samples {list(range(16))}."
