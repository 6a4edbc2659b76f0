"""A stock Trainer: every flag counts optimizer steps, and does what Lightning's documentation says."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

import lightning_megatron as lm
from tests.helpers import VOCAB, Record, SharedLoader, Tokens, plain_loader, quiet_trainer, tiny_config

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


def gpt(lr: float = 5e-3, **changes: Any) -> lm.GPTModule:
    return lm.GPTModule(tiny_config(**changes), lm.OptimizerConfig(lr=lr, lr_decay_style="constant", clip_grad=0.0))


def strategy(**sizes: Any) -> lm.MegatronStrategy:
    return lm.MegatronStrategy(micro_batch_size=2, **sizes)


# --------------------------------------------------------------------------------------------------- counting steps


class Count(pl.Callback):
    """How often each thing happened, and at which step."""

    def __init__(self) -> None:
        self.validated_at: list[int] = []
        self.validation_batches = 0
        self.sanity_batches = 0
        self.steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.sanity_checking:
            self.sanity_batches += 1
        else:
            self.validation_batches += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated_at.append(trainer.global_step)


def count_steps() -> dict[str, Any]:
    count = Count()
    module = gpt()
    trainer = quiet_trainer(
        strategy(**TP2_PP2),
        4,
        max_epochs=2,
        limit_train_batches=5,
        limit_val_batches=3,
        val_check_interval=2,
        num_sanity_val_steps=2,
        callbacks=[count],
    )
    trainer.fit(module, SharedLoader(module), SharedLoader(module))
    counts = ("steps", "validated_at", "validation_batches", "sanity_batches")
    return {
        **{name: getattr(count, name) for name in counts},
        "global_step": trainer.global_step,
        "batches": trainer.num_training_batches,
    }


def test_all_limits_count_optimizer_steps(ranks: Any) -> None:
    for result in ranks.run(count_steps, 4):
        assert result["batches"] == 5
        assert result["global_step"] == result["steps"] == 10
        assert result["validated_at"] == [2, 4, 7, 9]
        assert result["validation_batches"] == 4 * 3
        assert result["sanity_batches"] == 2


def few_batches() -> int:
    module = gpt()
    trainer = quiet_trainer(strategy(**PP2), 2, max_epochs=1, limit_train_batches=1)
    trainer.fit(module, SharedLoader(module))
    return trainer.global_step


def test_fewer_batches_than_micro_batches_end(ranks: Any) -> None:
    """A batch is a global batch, so one batch of four micro-batches is one step, and nothing waits for more."""
    assert ranks.run(few_batches, 2) == [1, 1]


def last_partial_batch(samples: int, virtual: int | None) -> tuple[int, list[int]]:
    seen: list[int] = []

    class Sizes(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["tokens"].size(0))

    trainer = quiet_trainer(
        strategy(**PP2, virtual_pipeline_model_parallel_size=virtual), 2, max_epochs=1, callbacks=[Sizes()]
    )
    trainer.fit(gpt(), plain_loader(8, samples))
    return trainer.global_step, seen


@pytest.mark.parametrize(("samples", "virtual", "sizes"), [(21, None, [8, 8, 5]), (22, 2, [8, 8, 6])])
def test_the_last_partial_batch_is_trained_on(samples: int, virtual: int | None, sizes: list[int], ranks: Any) -> None:
    assert ranks.run(last_partial_batch, 2, samples, virtual) == [(3, sizes)] * 2


# -------------------------------------------------------------------------------------------------- gradient flags


def losses_of(global_batch: int, sizes: dict[str, Any], world_size: int, steps: int, **flags: Any) -> Any:
    record = Record()
    module = gpt()
    trainer = quiet_trainer(strategy(**sizes), world_size, callbacks=[record], **flags)
    trainer.fit(module, SharedLoader(module, global_batch))
    return record.losses, record.norms, trainer.global_step


def accumulated(sizes: dict[str, Any], world_size: int) -> Any:
    return losses_of(4, sizes, world_size, 3, max_steps=3, accumulate_grad_batches=2)


def at_once() -> Any:
    return losses_of(8, {}, 1, 3, max_steps=3)


OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        ({}, 1),
        ({}, 2),
        (OVERLAP, 2),
        pytest.param(PP2, 2, marks=pytest.mark.slow),
        pytest.param({**PP2, **OVERLAP}, 4, marks=pytest.mark.slow),
        (TP2_PP2, 4),
    ],
)
def test_accumulating_equals_a_larger_batch(sizes: dict[str, Any], world_size: int, ranks: Any) -> None:
    expected, norms, _ = ranks.run(at_once, 1)[0]
    got, got_norms, steps = ranks.run(accumulated, world_size, sizes, world_size)[0]
    assert steps == 3
    # Lightning divides the loss that it hands to callbacks by the number of accumulated batches.
    assert [a + b for a, b in zip(got[::2], got[1::2], strict=True)] == pytest.approx(expected, abs=1e-5)
    assert got_norms[1::2] == pytest.approx(norms, abs=1e-4)


def uneven_mask(accumulate: int) -> float:
    """The gradient's norm when the two halves of a batch hold very different numbers of tokens."""

    class Loader(SharedLoader):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                mask = (batch["index"] % 8 < 4)[:, None] | (torch.arange(batch["tokens"].size(1)) < 3)
                yield {"tokens": batch["tokens"], "labels": batch["labels"], "loss_mask": mask.float()}

    record = Record()
    module = gpt()
    trainer = quiet_trainer(strategy(), 1, callbacks=[record], max_steps=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, Loader(module, 8 // accumulate))
    return record.norms[-1]


def test_an_accumulated_gradient_is_weighted_by_tokens(ranks: Any) -> None:
    assert ranks.run(uneven_mask, 1, 2) == pytest.approx(ranks.run(uneven_mask, 1, 1), abs=1e-5)


def clipped(clip: float | None, algorithm: str | None = None) -> tuple[list[float], float]:
    module = gpt(lr=1e-1)
    module.optimizer_config = module.optimizer_config.replace(optimizer="sgd", sgd_momentum=0.0, weight_decay=0.0)
    trainer = quiet_trainer(strategy(**PP2), 2, max_steps=1, gradient_clip_val=clip, gradient_clip_algorithm=algorithm)
    before: dict[str, torch.Tensor] = {}

    class Before(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    trainer.callbacks.append(Before())
    trainer.fit(module, SharedLoader(module))
    moved = {name: (p - before[name]).norm().item() ** 2 for name, p in module.named_parameters()}
    return [moved[name] for name in sorted(moved) if "layers" in name], float(trainer.optimizers[0].grad_norm)


def test_gradient_clip_val_is_the_global_norm(ranks: Any) -> None:
    free, norm = ranks.run(clipped, 2, None)[0]
    small, same_norm = ranks.run(clipped, 2, norm / 10)[0]
    assert same_norm == pytest.approx(norm, rel=1e-5)
    assert [s / f for s, f in zip(small, free, strict=True) if f > 1e-12] == pytest.approx(
        [0.01] * sum(f > 1e-12 for f in free), rel=1e-2
    )


def test_clipping_by_value_is_refused(ranks: Any) -> None:
    _, errors = ranks.attempt(clipped, 2, 1.0, "value")
    assert len(errors) == 2
    assert all("Remove it, or set it to 'norm'" in text for text in errors.values())


# ------------------------------------------------------------------------------------------------------- callbacks


def with_callbacks(directory: str) -> dict[str, Any]:
    checkpoint = ModelCheckpoint(directory, filename="{step}", monitor="val_loss", save_top_k=2, save_last=True)
    logger = CSVLogger(directory, name="log")
    stop = EarlyStopping("val_loss", patience=1, mode="max")  # the loss falls, so this stops
    module = gpt(lr=1e-3)
    trainer = quiet_trainer(
        strategy(**TP2_PP2),
        4,
        max_steps=20,
        val_check_interval=2,
        limit_val_batches=1,
        log_every_n_steps=1,
        logger=logger,
        enable_checkpointing=True,
        callbacks=[checkpoint, LearningRateMonitor("step"), stop, lm.callbacks.Throughput()],
    )
    trainer.fit(module, SharedLoader(module, length=320), SharedLoader(module))
    return {
        "stopped": trainer.global_step,
        "best": checkpoint.best_model_path,
        "best_score": float(checkpoint.best_model_score),
        "kept": sorted(path.name for path in Path(directory).glob("*.ckpt")),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def test_callbacks_and_loggers(ranks: Any, tmp_path: Path) -> None:
    results = ranks.run(with_callbacks, 4, str(tmp_path))
    for result in results:
        assert result["stopped"] == 4
        assert result["kept"] == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
        assert result["best"].endswith("step=4.ckpt")
        assert result["best_score"] == pytest.approx(result["metrics"]["val_loss"], abs=1e-6)
        # Ranks time themselves; all else is the same everywhere.
        timed = {name for name in result["metrics"] if name.endswith(("_time", "_per_s", "_per_device"))}
        assert {k: v for k, v in result["metrics"].items() if k not in timed} == {
            k: v for k, v in results[0]["metrics"].items() if k not in timed
        }
    with (tmp_path / "log/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == [0, 1, 2, 3]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [1, 3]
    assert {float(row["lr-MegatronOptimizer/pg1"]) for row in rows if row.get("lr-MegatronOptimizer/pg1")} == {1e-3}


def timed() -> int:
    module = gpt()
    trainer = quiet_trainer(strategy(**PP2), 2, max_time="00:00:00:02", max_steps=-1, max_epochs=-1)
    trainer.fit(module, SharedLoader(module))
    return trainer.global_step


def test_max_time_stops_every_rank_at_the_same_step(ranks: Any) -> None:
    steps = ranks.run(timed, 2)
    assert steps[0] == steps[1] > 0


# ---------------------------------------------------------------------------------------------------------- resume


def part_of_an_epoch(path: str, phase: str, loader: str) -> list[float]:
    record = Record()
    module = gpt(hidden_dropout=0.1, attention_dropout=0.1)
    steps = {"all": 6, "first": 3, "rest": 6}[phase]
    trainer = quiet_trainer(
        strategy(**TP2_PP2), 4, max_steps=steps, callbacks=[record], use_distributed_sampler=loader == "plain"
    )
    loaders = {  # five steps an epoch each
        "shared": lambda: SharedLoader(module, length=40),
        "plain": lambda: plain_loader(8, 40),
        "random": lambda: plain_loader(8, 40, shuffle=True),
    }
    data: Any = loaders[loader]()
    trainer.fit(module, data, ckpt_path=path if phase == "rest" else None)
    if phase == "first":
        trainer.save_checkpoint(path)
    return record.losses


@pytest.mark.parametrize(
    "loader", ["shared", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "random"))]
)
def test_resuming_in_the_middle_of_an_epoch_is_bit_identical(loader: str, ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "three.ckpt")
    whole, first, rest = (ranks.run(part_of_an_epoch, 4, path, phase, loader)[0] for phase in ("all", "first", "rest"))
    assert first + rest == whole


def with_dropout(loader: str) -> list[float]:
    record = Record()
    module = gpt(hidden_dropout=0.2)
    trainer = quiet_trainer(strategy(tensor_model_parallel_size=2), 2, max_steps=3, callbacks=[record])
    trainer.fit(module, plain_loader(8) if loader == "plain" else SharedLoader(module))
    return record.losses


def test_a_data_loader_does_not_disturb_dropout(ranks: Any) -> None:
    """Only one rank reads. If reading drew from its generator, tensor-parallel ranks would drop different units."""
    assert ranks.run(with_dropout, 2, "plain") == ranks.run(with_dropout, 2, "shared")


# ------------------------------------------------------------------------------------------- evaluate; other loaders


def evaluate() -> dict[str, float]:
    module = gpt()
    trainer = quiet_trainer(strategy(**TP2_PP2), 4)
    validated = trainer.validate(module, SharedLoader(module, length=16), verbose=False)[0]
    tested = trainer.test(module, SharedLoader(module, length=16), verbose=False)[0]
    return {**validated, **tested}


def test_validate_and_test_give_every_rank_the_loss(ranks: Any) -> None:
    for result in ranks.run(evaluate, 4):
        assert result["val_loss"] == pytest.approx(4.86, abs=0.03)
        assert result["test_loss"] == result["val_loss"]


class Stream(IterableDataset):
    """Samples whose number nobody knows."""

    def __init__(self, read: list[int]) -> None:
        self.read = read

    def __iter__(self) -> Any:
        for index in range(20):
            self.read.append(index)
            yield Tokens()[index]


def stream() -> tuple[int, list[int], list[float]]:
    read: list[int] = []
    record = Record()
    trainer = quiet_trainer(strategy(**TP2_PP2), 4, max_epochs=2, callbacks=[record])
    trainer.fit(gpt(), DataLoader(Stream(read), batch_size=8))
    return trainer.global_step, read, record.losses


def test_a_stream_is_read_by_one_rank_and_ends_on_all(ranks: Any) -> None:
    results = ranks.run(stream, 4)
    assert [result[0] for result in results] == [6] * 4
    assert [len(result[1]) for result in results] == [40, 0, 0, 0]
    assert all(result[2] == results[0][2] for result in results)


def hugging_face_batches() -> list[float]:
    record = Record()

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        text = torch.stack([torch.cat([s["tokens"], s["labels"][-1:]]) for s in samples])[:, :16]
        return {"input_ids": text, "labels": text, "attention_mask": torch.ones_like(text)}

    trainer = quiet_trainer(strategy(**PP2), 4, max_steps=2, callbacks=[record], use_distributed_sampler=True)
    trainer.fit(gpt(), plain_loader(4, collate_fn=collate))
    return record.losses


def test_an_ordinary_loader_with_hugging_face_keys(ranks: Any) -> None:
    results = ranks.run(hugging_face_batches, 4)
    assert all(losses == results[0] for losses in results)
    assert results[0][0] == pytest.approx(math.log(VOCAB), abs=0.05)


# ------------------------------------------------------------------------------------------- living with other code


class PlainModel(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def one_after_the_other() -> dict[str, Any]:
    module = gpt()
    first, second, third = Record(), Record(), Record()
    options: dict[str, Any] = {"max_steps": 2}
    quiet_trainer(strategy(**PP2), 2, callbacks=[first], **options).fit(module, SharedLoader(module))
    quiet_trainer(strategy(**PP2), 2, callbacks=[second], **options).fit(module, SharedLoader(module))
    other = gpt()
    quiet_trainer(strategy(tensor_model_parallel_size=2), 2, callbacks=[third], **options).fit(
        other, SharedLoader(other)
    )
    plain = PlainModel()
    before = plain.layer.weight.detach().clone()
    quiet_trainer("ddp", 2, max_steps=3).fit(plain, DataLoader(torch.randn(16, 2), batch_size=2))
    moved = (plain.layer.weight - before).abs().max().item()
    return {"first": first.losses, "second": second.losses, "third": third.losses, "moved": moved}


def test_two_fits_another_layout_and_a_plain_model_in_one_process(ranks: Any) -> None:
    for result in ranks.run(one_after_the_other, 2):
        assert result["second"][0] < result["first"][0], "the second fit did not start from the first's weights"
        assert result["third"] == pytest.approx(result["first"], abs=1e-5)
        assert result["moved"] > 0


def fit_validate_fit() -> list[float]:
    module = gpt()
    record = Record()
    trainer = quiet_trainer(strategy(**PP2), 2, max_steps=2, callbacks=[record])
    trainer.fit(module, SharedLoader(module))
    trainer.validate(module, SharedLoader(module), verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, SharedLoader(module))
    return record.losses


def four_steps() -> list[float]:
    return losses_of(8, PP2, 2, 4, max_steps=4)[0]


def test_a_trainer_fits_validates_and_goes_on(ranks: Any) -> None:
    """A second fit of one Trainer wraps nothing twice, else gradients would double."""
    got, expected = ranks.run(fit_validate_fit, 2)[0], ranks.run(four_steps, 2)[0]
    assert got[:2] == expected[:2]
    assert got[2] < expected[1]
