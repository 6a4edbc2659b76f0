"""Data loaders that differ between replicas, or that go wrong on one of them, and what Lightning sees of a loader."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, override

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_megatron as lm
from tests.helpers import SEQUENCE, Tokens, quiet_trainer, tiny_config
from tests.models.runs import strategy
from tests.ranks import RankPool

SHORT, LONG = 3, 5


def _module() -> lm.GPTModule:
    config = tiny_config(num_layers=2, hidden_size=16, num_attention_heads=2)
    return lm.GPTModule(config, lm.OptimizerConfig(lr_decay_steps=99), return_logits=True)


class Batches(IterableDataset):
    """``number`` batches of two samples."""

    def __init__(self, number: int) -> None:
        self.number = number

    @override
    def __iter__(self) -> Iterator[Any]:
        for index in range(2 * self.number):
            yield Tokens()[index]


def _of_length(number: int, sized: bool) -> DataLoader:
    return DataLoader(Tokens(2 * number), 2) if sized else DataLoader(Batches(number), 2)


def uneven(cases: list[tuple[bool, str, dict[str, Any]]]) -> list[Any]:
    """For each case, the steps of each epoch, or the error."""
    results: list[Any] = []
    for sized, policy, options in cases:
        trainer = quiet_trainer(strategy(uneven_batches=policy), 2, max_epochs=2, **options)
        length = SHORT if trainer.global_rank == 0 else LONG
        try:
            trainer.fit(_module(), _of_length(length, sized))
            results.append(trainer.global_step)
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


@pytest.mark.slow
def test_replicas_with_different_numbers_of_training_batches(ranks: RankPool) -> None:
    cases: list[tuple[bool, str, dict[str, Any]]] = [
        (True, "error", {}),
        (False, "error", {}),
        (True, "drop", {}),
        (False, "drop", {}),
        (True, "error", {"limit_train_batches": 2}),
        (False, "error", {"limit_train_batches": 2}),
    ]
    first, second = ranks.run(uneven, 2, cases)
    assert first == second
    assert first[0].startswith("DataError: The replicas have different numbers of training batches (by rank: 3, 5)")
    assert "(by replica: 3, more than 3)" in first[1]
    assert "uneven_batches='drop'" in first[1]
    assert first[2:] == [2 * SHORT, 2 * SHORT, 4, 4]


class Bad(Dataset):
    """Samples of which the batch of one replica has something wrong from the third on."""

    def __init__(self, fault: str | None) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        sample = {key: value for key, value in Tokens()[index].items() if key != "index"}
        if self.fault is None or index < 4:
            return sample
        if self.fault == "error":
            raise OSError("shard 7 is gone")
        if self.fault == "float":
            return sample | {"tokens": sample["tokens"].float()}
        if self.fault == "long":
            return sample | {"tokens": torch.cat([sample["tokens"][:1], sample["tokens"]])[: SEQUENCE - 1]}
        if self.fault == "NaN":
            return sample | {"loss_mask": torch.full((SEQUENCE,), torch.nan)}
        return sample


class _Collate:
    def __init__(self, fault: str | None) -> None:
        self.fault, self.batches = fault, 0

    def __call__(self, samples: list[Any]) -> Any:
        self.batches += 1
        batch = torch.utils.data.default_collate(samples)
        if self.batches < 3:
            return batch
        faults = {
            "none": None,
            "empty": {key: value[:0] for key, value in batch.items()},
            "tuple": (batch["tokens"], batch["labels"]),
            "ragged": batch | {"labels": batch["labels"][:1]},
        }
        return faults.get(self.fault or "", batch)


FAULTS = {
    "error": "OSError: shard 7 is gone",
    "float": "'tokens' must hold whole numbers [batch, sequence], but is torch.float32",
    "long": "'labels' must have the shape [batch, sequence] of 'tokens'",
    "NaN": "'loss_mask' holds NaN or infinity",
    "none": "The data loader gave None in place of a batch",
    "empty": "A batch without samples",
    "tuple": "The data loader gave a tuple as a batch",
    "ragged": "'labels' must have the shape [batch, sequence] of 'tokens'",
}


def faulty(fault: str, layout: dict[str, Any]) -> str:
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]), max_epochs=1)
    last = trainer.strategy.layout.coordinates(trainer.global_rank, trainer.world_size).data
    mine = fault if last == trainer.strategy.data_parallel_size - 1 else None
    try:
        trainer.fit(_module(), DataLoader(Bad(mine), 2, collate_fn=_Collate(mine)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=() if fault in ("error", "NaN") else pytest.mark.slow) for fault in FAULTS],
)
@pytest.mark.parametrize(
    ("world", "layout"), [(2, {}), pytest.param(4, {"tp": 2}, marks=pytest.mark.slow), (2, {"pp": 2, "mbs": 1})]
)
def test_a_fault_in_the_data_of_one_replica_is_the_error_of_all_ranks(
    ranks: RankPool, world: int, layout: dict[str, Any], fault: str
) -> None:
    reader = 0 if "pp" in layout else world // 2
    for message in ranks.run(faulty, world, fault, layout):
        assert message.startswith("DataError: ")
        assert FAULTS[fault] in message
        assert f"Rank {reader} " in message


class Predicting(lm.GPTModule):
    """Predicts the number of samples."""

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> int:
        return len(batch["prompts"])


class Written(BasePredictionWriter):
    """Sample numbers of each batch."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epoch: Any = None

    @override
    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *args: Any) -> None:
        self.batches.append(list(indices))

    @override
    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        self.epoch = indices


def predicted(layout: dict[str, Any], streams: bool) -> Any:
    written = Written()
    trainer = quiet_trainer(
        strategy(**layout), int(os.environ["WORLD_SIZE"]), callbacks=[written], use_distributed_sampler=True
    )
    length = 5 if trainer.global_rank == 0 else 3
    loader: Any = DataLoader(Batches(length), 2) if streams else DataLoader(Tokens(5), 2)
    return trainer.predict(Predicting(_module().config), loader), written.batches, written.epoch


def test_prediction_with_other_batches_on_each_replica(ranks: RankPool) -> None:
    first, second = ranks.run(predicted, 2, {}, False)
    assert first[1:] == ([[0, 2], [4]], [[[0, 2], [4]]])
    assert second[1:] == ([[1, 3]], [[[1, 3]]])
    assert (first[0], second[0]) == ([2, 1], [2])
    first, second = ranks.run(predicted, 2, {}, True)
    assert (len(first[0]), len(second[0])) == (5, 3)
    for result in ranks.run(predicted, 2, {"tp": 2}, False):
        assert result[1] == [[0, 1], [2, 3], [4]]
        assert result[2] == [result[1]]


class Draws(Dataset):
    """A sample and a number that its worker draws."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return Tokens()[index] | {"drawn": torch.tensor(random.getrandbits(40))}


class Seen(lm.GPTModule):
    """Notes what is drawn, and attributes of the loader."""

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.drawn.append(batch["drawn"].tolist())

    @override
    def prepare_batch(self, batch: Any) -> Any:
        return super().prepare_batch(batch) | {"drawn": batch["drawn"]}


def seen(layout: dict[str, Any]) -> Any:
    import multiprocessing

    multiprocessing.current_process()._config["daemon"] = False  # the pool's processes may have no workers otherwise
    pl.seed_everything(3, workers=True, verbose=False)
    module: Any = Seen(_module().config, lm.OptimizerConfig(lr_decay_steps=99))
    module.drawn = []
    trainer = quiet_trainer(strategy(**layout), 2, max_epochs=1)
    loader = DataLoader(Draws(), 4, num_workers=1, multiprocessing_context="fork")
    trainer.fit(module, loader)
    found: Any = trainer.train_dataloader
    assert found.dataset is loader.dataset
    assert (found.batch_size, found.num_workers, found.drop_last) == (4, 1, False)
    assert found.batch_sampler is loader.batch_sampler
    assert not hasattr(found, "no_such_attribute")
    os.environ.pop("PL_SEED_WORKERS", None)
    os.environ.pop("PL_GLOBAL_SEED", None)
    return module.drawn


@pytest.mark.slow
def test_workers_of_replicas_draw_numbers_of_their_own(ranks: RankPool) -> None:
    first, second = ranks.run(seen, 2, {})
    assert len(first) == len(second) == 2
    assert not {number for batch in first for number in batch} & {number for batch in second for number in batch}
    first, second = ranks.run(seen, 2, {"tp": 2})
    assert first == second


def timed_validation(rank_options: dict[str, Any]) -> str:
    trainer = quiet_trainer(strategy(**rank_options), 2, max_epochs=1, val_check_interval="00:00:00:01")
    try:
        trainer.fit(_module(), DataLoader(Tokens(), 8), DataLoader(Tokens(), 8))
    except lm.ModuleError as error:
        return str(error)
    return ""


class Validations(pl.Callback):
    count = 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.count += 1


def timed_alone() -> int:
    seen = Validations()
    options = {"val_check_interval": timedelta(milliseconds=1), "limit_val_batches": 1, "callbacks": [seen]}
    trainer = quiet_trainer(strategy(), 1, max_epochs=1, **options)
    trainer.fit(_module(), DataLoader(Tokens(), 8), DataLoader(Tokens(), 8))
    return seen.count


def test_validation_by_each_processes_clock_is_refused(ranks: RankPool) -> None:
    assert ranks.run(timed_alone, 1) == [8]
    for message in ranks.run(timed_validation, 2, {"tp": 2}):
        assert "val_check_interval" in message
        assert "own clock" in message
