"""Data modules through the strategy, on real ranks: who reads, in which order, and what a resumed run reads."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import BasePredictionWriter

import lightning_megatron as lm
from lightning_megatron.checkpoint.metadata import CheckpointMetadata
from lightning_megatron.cli.generate import tokenizer_of
from lightning_megatron.data import FineTuningData, HuggingFaceData, PretrainingData
from lightning_megatron.data.datamodule import GlobalBatchDataModule
from lightning_megatron.data.gpt import GPTDataset
from tests.data.corpora import VOCABULARY, write_random_dataset
from tests.helpers import Tokens, quiet_trainer, tiny_config
from tests.models.runs import strategy
from tests.ranks import RankPool

BATCH = 8


class _CutError(Exception):
    """The machine is gone."""


class Order(pl.Callback):
    """The samples of each step, and the losses; may save and break off."""

    def __init__(self, save: Path | None = None, after: int = 0) -> None:
        self.samples: list[list[int]] = []
        self.losses: list[float] = []
        self.save, self.after = save, after

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append(batch["index"].tolist())
        self.losses.append(float(outputs["loss"]))
        if self.save is not None and trainer.global_step == self.after:
            trainer.save_checkpoint(self.save, weights_only=False)
            raise _CutError


def _fit(
    prefix: Path,
    layout: dict[str, Any],
    trainer_options: dict[str, Any],
    workers: int = 0,
    resume: Path | None = None,
    save: Path | None = None,
    after: int = 0,
    **options: Any,
) -> tuple[int, int, int, list[list[int]], list[float]]:
    """Replica, stage, reads, and samples and losses of each step; runs on every rank."""
    reads = 0
    read = GPTDataset.__getitem__

    def counted(self: GPTDataset, index: int) -> Any:
        nonlocal reads
        reads += 1
        return read(self, index)

    GPTDataset.__getitem__ = counted  # type: ignore[method-assign]
    multiprocessing.current_process()._config["daemon"] = False  # the pool's processes may have no workers otherwise
    try:
        order = Order(save, after)
        module = lm.GPTModule(tiny_config(vocab_size=VOCABULARY, num_layers=4))
        plan = strategy(**layout)
        trainer = quiet_trainer(plan, int(os.environ["WORLD_SIZE"]), callbacks=[order], **trainer_options)
        sizes = {"seq_length": 16, "global_batch_size": BATCH, "num_workers": workers}
        data = PretrainingData(prefix, split="80,20,0", **(sizes | options))
        with contextlib.suppress(_CutError):
            trainer.fit(module, datamodule=data, ckpt_path=resume)
            assert not multiprocessing.active_children()  # the loader's workers have ended
    finally:
        GPTDataset.__getitem__ = read  # type: ignore[method-assign]
    place = plan.layout.coordinates(trainer.global_rank, trainer.world_size)
    return place.data, place.pipeline, reads, order.samples, order.losses


def _global(results: list[Any]) -> list[list[int]]:
    """The samples of each global batch in order, without padding; ranks of a replica must have the same."""
    replicas: dict[int, list[list[int]]] = {}
    for replica, _, _, samples, _ in results:
        assert replicas.setdefault(replica, samples) == samples
    parts = [replicas[number] for number in sorted(replicas)]
    return [[i for group in zip(*step, strict=True) for i in group if i >= 0] for step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_dataset(tmp_path_factory.mktemp("ranks") / "corpus", num_documents=40)


def test_every_layout_reads_the_same_order(ranks: RankPool, prefix: Path) -> None:
    steps = {"max_steps": 5}
    straight = ranks.run(_fit, 1, prefix, {}, steps)
    order, losses = _global(straight), straight[0][4]
    assert [len(batch) for batch in order] == [BATCH] * 5
    for world, layout in (
        (4, {"mbs": 1}),
        (4, {"tp": 2, "pp": 2, "sp": True, "mbs": 2}),
        (4, {"pp": 2, "mbs": 2}),
    ):
        results = ranks.run(_fit, world, prefix, layout, steps)
        assert _global(results) == order, layout
        for *_, found in results:
            assert found == pytest.approx(losses, abs=1e-5)
        readers = [reads for _, _, reads, _, _ in results if reads]
        assert len(readers) == len({replica for replica, *_ in results})  # one rank of each replica reads


def _ramped(prefix: Path, layout: dict[str, Any]) -> Any:
    return _fit(prefix, layout, {"max_steps": 6}, rampup_batch_size=(2, 2, 12))


@pytest.mark.slow
def test_a_growing_global_batch(ranks: RankPool, prefix: Path) -> None:
    straight = ranks.run(_ramped, 1, prefix, {})
    order = _global(straight)
    assert [len(batch) for batch in order] == [2, 2, 4, 6, 8, 8]
    for world, layout in ((2, {}), (4, {"tp": 2, "pp": 2, "mbs": 2})):
        results = ranks.run(_ramped, world, prefix, layout)
        assert _global(results) == order
        assert results[0][4] == pytest.approx(straight[0][4], abs=1e-5)


def test_middle_stages_read_nothing(ranks: RankPool, prefix: Path) -> None:
    results = ranks.run(_fit, 4, prefix, {"pp": 4, "mbs": 2}, {"max_steps": 2})
    assert [reads > 0 for _, _, reads, _, _ in results] == [True, False, False, False]
    # The stages in the middle know shapes alone.
    assert [samples == results[0][3] for _, _, _, samples, _ in results] == [True, False, False, True]


@pytest.mark.slow
def test_no_sample_twice_or_never_when_ranks_change(ranks: RankPool, prefix: Path, tmp_path: Path) -> None:
    """Two epochs with a last partial batch, from four replicas to one, then to two, with other workers."""
    epochs = {"max_epochs": 2}
    straight = _global(ranks.run(_fit, 1, prefix, {}, epochs))
    epoch = [i for batch in straight[: len(straight) // 2] for i in batch]
    assert sorted(epoch) == list(range(len(epoch)))
    assert len(straight) == 2 * math.ceil(len(epoch) / BATCH)
    assert len(epoch) % BATCH  # the last batch is partial
    first, second = tmp_path / "first", tmp_path / "second"
    stops = (4, len(straight) // 2 + 3)
    one = ranks.run(_fit, 4, prefix, {"mbs": 1}, epochs, 0, None, first, stops[0])
    two = ranks.run(_fit, 1, prefix, {"mbs": 4}, epochs, 1, first, second, stops[1])
    three = ranks.run(_fit, 4, prefix, {"tp": 2, "mbs": 2}, epochs, 0, second)
    assert _global(one) + _global(two) + _global(three) == straight


def _other(kind: str, path: Path, tokenizer: Path) -> list[float]:
    loading: dict[str, Any] = {"global_batch_size": 4, "num_workers": 0, "tokenizer": tokenizer}
    data: Any
    if kind == "finetuning":
        data = FineTuningData(path, seq_length=16, cache_dir=path.parent / "cache", **loading)
    else:
        data = HuggingFaceData(path, block_size=16, cache_dir=path.parent / "cache", **loading)
    order = Order()
    module = lm.GPTModule(tiny_config(vocab_size=512))
    trainer = quiet_trainer(strategy(pp=2, mbs=1), 4, max_steps=3, callbacks=[order])
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(path.parent / "last.ckpt", weights_only=False)
    return order.losses


@pytest.mark.parametrize("kind", ["finetuning", pytest.param("huggingface", marks=pytest.mark.slow)])
def test_other_kinds_of_data(ranks: RankPool, tmp_path: Path, tokenizer_dir: Path, texts: list[str], kind: str) -> None:
    import json

    path = tmp_path / "data"
    if kind == "finetuning":
        lines = [{"prompt": text[:12], "completion": text[12:30]} for text in texts]
        path.write_text("\n".join(map(json.dumps, lines)))
    else:
        datasets = pytest.importorskip("datasets")
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(path)
    results = ranks.run(_other, 4, kind, path, tokenizer_dir)
    assert all(losses == results[0] for losses in results)
    assert len(results[0]) == 3
    named = CheckpointMetadata.read(tmp_path / "last.ckpt").tokenizer
    assert (named["source"], named["vocab_size"]) == (str(tokenizer_dir.resolve()), 512)
    assert len(tokenizer_of(tmp_path / "last.ckpt", None)) == 512


class Unnumbered(Tokens):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value for key, value in super().__getitem__(index).items() if key != "index"}


class Predicted(GlobalBatchDataModule):
    def setup(self, stage: str) -> None:
        self.datasets["test"] = Unnumbered(11)


class Writer(BasePredictionWriter):
    """The numbers of the samples of each batch, as Lightning tells them and as the batch has them."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.told: list[Any] = []
        self.epoch: Any = None

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, *_: Any
    ) -> None:
        assert prediction["logits"].size(0) == len(batch_indices)
        assert batch["index"].tolist() == list(batch_indices)
        self.told.append(list(batch_indices))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = [list(indices) for indices in batch_indices[0]]


def _predicted(layout: dict[str, Any]) -> tuple[int, Any, Any]:
    module, writer = lm.GPTModule(tiny_config(num_layers=2), return_logits="every_rank"), Writer()
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]), callbacks=[writer])
    trainer.predict(module, datamodule=Predicted(global_batch_size=8, num_workers=0))
    return trainer.strategy.data_parallel_rank, writer.told, writer.epoch


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, {"tp": 2}), (4, {"pp": 2}), (1, {})))],
)
def test_predictions_know_their_samples(ranks: RankPool, world: int, layout: dict[str, Any]) -> None:
    expected = {
        1: [[[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, -1, -1, -1, -1, -1]]],
        2: [[[0, 2, 4, 6], [8, 10, -1, -1]], [[1, 3, 5, 7], [9, -1, -1, -1]]],
    }
    for replica, told, epoch in ranks.run(_predicted, world, layout):
        assert told == epoch == expected[1 if world == 1 else 2][replica]
