import json
import math
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_megatron.data import GlobalBatchLoader, PretrainingData
from lightning_megatron.data.blend import Blend, split_bounds
from lightning_megatron.data.gpt import GPTDataset
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.errors import DataError
from tests.data.corpora import write_random_dataset


class Recorder(L.LightningModule):
    """Records the first tokens of each sample with loss, in order, and trains one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[list[tuple[int, ...]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        real = batch["loss_mask"].sum(1) > 0
        self.batches.append([tuple(row) for row in batch["tokens"][real].tolist()])
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validated.append(int(batch["loss_mask"].sum()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=tmp_path, **(quiet | {"enable_checkpointing": False} | options))


def data(prefix: Path, **options: Any) -> PretrainingData:
    defaults = {"seq_length": 16, "global_batch_size": 8, "split": "80,20,0", "num_workers": 0}
    return PretrainingData(prefix, **(defaults | options))


def test_batches_are_global_batches(dataset_prefix: Path) -> None:
    module = data(dataset_prefix)
    module.setup("fit")
    loader = module.train_dataloader()
    assert isinstance(loader, GlobalBatchLoader)
    assert not isinstance(loader, torch.utils.data.DataLoader)
    batch = next(iter(loader))
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "tokens": ((8, 16), torch.int64),
        "labels": ((8, 16), torch.int64),
        "loss_mask": ((8, 16), torch.float32),
        "position_ids": ((8, 16), torch.int64),
        "index": ((8,), torch.int64),
    }
    assert batch["index"].tolist() == [int(number) for number in next(iter(loader.batch_sampler))]
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def test_validation_counts_every_token_once(dataset_prefix: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    module = data(dataset_prefix)
    trainer(tmp_path).validate(recorder, module, verbose=False)
    documents = split_bounds("80,20,0", 200)["valid"]
    tokens = int(IndexedDataset(dataset_prefix).sequence_lengths[documents.start : documents.stop].sum())
    assert sum(recorder.validated) == tokens - 1
    # The last batch is padded to full size, without loss.
    assert len(recorder.validated) == math.ceil(math.ceil((tokens - 1) / 16) / 8)


def test_max_steps_alone_is_one_long_epoch_in_megatrons_order(dataset_prefix: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    one_epoch = len(GPTDataset(IndexedDataset(dataset_prefix), range(160), 16))
    steps = 2 * one_epoch // 8 + 3
    fit = trainer(tmp_path, max_steps=steps, limit_val_batches=0)
    fit.fit(recorder, data(dataset_prefix))
    expected = GPTDataset(IndexedDataset(dataset_prefix), range(160), 16, num_samples=8 * steps)
    assert fit.global_step == steps
    assert fit.current_epoch == 0 or len(recorder.batches) == steps
    flat = [sample for batch in recorder.batches for sample in batch]
    assert flat == [tuple(expected[i]["tokens"].tolist()) for i in range(8 * steps)]


def test_epochs_are_passes_each_in_its_own_order(dataset_prefix: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(recorder, data(dataset_prefix))
    flat = [sample for batch in recorder.batches for sample in batch]
    half = len(flat) // 2
    assert sorted(flat[:half]) == sorted(flat[half:])
    assert flat[:half] != flat[half:]
    assert len(set(flat[:half])) == half


@pytest.mark.parametrize("stop", [3, 20])  # in the first epoch (15 steps) and in the second
def test_resume_repeats_the_exact_order(dataset_prefix: Path, tmp_path: Path, stop: int) -> None:
    whole = Recorder()
    reference = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    reference.fit(whole, data(dataset_prefix))
    assert stop < len(whole.batches)

    first = Recorder()
    keep = ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=stop, save_top_k=-1)
    trainer(
        tmp_path, max_steps=stop, max_epochs=2, callbacks=[keep], enable_checkpointing=True, limit_val_batches=0
    ).fit(first, data(dataset_prefix))
    assert len(first.batches) == stop

    second = Recorder()
    resumed = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    # Another number of workers must not matter.
    before = set(active_children())
    resumed.fit(second, data(dataset_prefix, num_workers=2), ckpt_path=keep.best_model_path or keep.last_model_path)
    assert first.batches + second.batches == whole.batches
    assert resumed.global_step == len(whole.batches)
    assert set(active_children()) <= before  # no worker waits for the garbage collector


def test_resume_at_the_end_of_an_epoch(dataset_prefix: Path, tmp_path: Path) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(whole, data(dataset_prefix))
    keep = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    trainer(tmp_path, max_epochs=1, callbacks=[keep], enable_checkpointing=True, limit_val_batches=0).fit(
        first, data(dataset_prefix)
    )
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(
        second, data(dataset_prefix), ckpt_path=keep.last_model_path
    )
    assert first.batches + second.batches == whole.batches


class TestLoaderState:
    def test_it_counts_batches_handed_out_not_fetched(self, dataset_prefix: Path) -> None:
        module = data(dataset_prefix, num_workers=2)
        module.setup("fit")
        loader = module.train_dataloader()
        iterator = iter(loader)
        assert loader.state_dict()["consumed_samples"] == 0
        for _ in range(3):
            next(iterator)
        assert loader.state_dict()["consumed_samples"] == 24
        assert loader.state_after(2)["consumed_samples"] == 16

    def test_a_closed_loader_goes_on_with_other_workers(self, dataset_prefix: Path) -> None:
        module = data(dataset_prefix, num_workers=1)
        module.setup("fit")
        loader = module.train_dataloader()
        first = torch.cat([batch["index"] for batch in loader])
        module.teardown("fit")
        second = torch.cat([batch["index"] for batch in loader])
        assert torch.equal(first.sort().values, second.sort().values)
        assert not torch.equal(first, second)  # the next epoch
        module.teardown("fit")

    def test_state_after_counts_from_the_beginning_of_the_epoch(self, dataset_prefix: Path) -> None:
        module = data(dataset_prefix)
        module.setup("fit")
        loader = module.train_dataloader()
        loader.load_state_dict({"consumed_samples": 24})
        assert loader.state_after(0)["consumed_samples"] == 0
        assert loader.state_after(3)["consumed_samples"] == 24
        assert loader.state_after(5)["consumed_samples"] == 40
        first = next(iter(loader))["tokens"]
        assert torch.equal(first[0], loader.dataset[24]["tokens"])

    def test_iterating_twice_without_a_trainer_goes_on_to_the_next_epoch(self, dataset_prefix: Path) -> None:
        module = data(dataset_prefix)
        module.setup("fit")
        loader = module.train_dataloader()
        first = torch.cat([batch["tokens"] for batch in loader])
        second = torch.cat([batch["tokens"] for batch in loader])
        assert loader.batch_sampler.epoch == 1
        assert first.shape == second.shape
        assert not torch.equal(first, second)


def test_splits_string_is_split(dataset_prefix: Path) -> None:
    assert data(dataset_prefix, splits_string="50,50,0").split == "50,50,0"


def test_a_path_for_each_split(tmp_path: Path) -> None:
    train, valid = write_random_dataset(tmp_path / "t", 40), write_random_dataset(tmp_path / "v", 9, seed=1)
    module = PretrainingData(train_path=train, valid_path=valid, seq_length=16, global_batch_size=2, num_workers=0)
    module.setup("fit")
    module.setup("test")
    assert module.datasets["train"].dataset.num_documents == 40  # type: ignore[union-attr]
    assert module.datasets["valid"].dataset.num_documents == 9  # type: ignore[union-attr]
    assert module.test_dataloader() == []


def test_without_or_with_contradictory_paths(dataset_prefix: Path) -> None:
    with pytest.raises(DataError, match="Give either data_path"):
        PretrainingData(seq_length=16, global_batch_size=8)
    with pytest.raises(DataError, match="Give either data_path"):
        PretrainingData(dataset_prefix, train_path=dataset_prefix, seq_length=16, global_batch_size=8)


def test_no_training_documents(dataset_prefix: Path) -> None:
    with pytest.raises(DataError, match="split='0,1,0' leaves no training documents"):
        data(dataset_prefix, split="0,1,0").setup("fit")


def test_the_tokenizer_checks_the_vocabulary(dataset_prefix: Path, tokenizer_dir: Path) -> None:
    module = data(dataset_prefix, tokenizer=tokenizer_dir, eod_mask_loss=True)
    module.setup("fit")
    with pytest.raises(DataError, match=r"holds token id \d+, the vocabulary has 512"):
        list(module.train_dataloader())


def test_a_tokenizer_larger_than_the_model(dataset_prefix: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match="The tokenizer has 512 tokens, the model's vocab_size=400"):
        data(dataset_prefix, tokenizer=tokenizer_dir, vocab_size=400).setup("fit")


def test_strategy_coordinates_decide_the_share(dataset_prefix: Path, tmp_path: Path) -> None:
    module = data(dataset_prefix)
    host = trainer(tmp_path)
    host.strategy.data_parallel_rank, host.strategy.data_parallel_size = 1, 4  # type: ignore[attr-defined]
    module.trainer = host
    module.setup("validate")
    sampler = module.val_dataloader().batch_sampler
    assert (sampler.rank, sampler.world) == (1, 4)
    assert next(iter(module.val_dataloader()))["tokens"].shape == (2, 16)


class TestBlend:
    def test_spellings(self, tmp_path: Path) -> None:
        a, b = write_random_dataset(tmp_path / "a", 3), write_random_dataset(tmp_path / "b", 3)
        weighted = Blend((a, b), (30.0, 70.0))
        assert Blend.parse(str(a)) == Blend((a,))
        assert Blend.parse([a, b]) == Blend((a, b))
        assert Blend.parse(["30", str(a), "70", str(b)]) == Blend.parse({a: 30, b: 70}) == weighted
        (tmp_path / "list.txt").write_text("# corpora\n30 a\n70 b  # the larger\n")
        assert Blend.parse(tmp_path / "list.txt") == weighted
        (tmp_path / "plain.txt").write_text(f"{a}\n{b}\n")
        assert Blend.parse([str(tmp_path / "plain.txt")]) == Blend((a, b))

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        a = write_random_dataset(tmp_path / "a", 3)
        with pytest.raises(DataError, match=r"1 of 2 datasets in data_path do not exist: .*shard_17"):
            Blend.parse([a, tmp_path / "shard_17"])

    def test_weights_have_to_be_positive(self, tmp_path: Path) -> None:
        a = write_random_dataset(tmp_path / "a", 3)
        with pytest.raises(DataError, match="have to be positive"):
            Blend.parse({a: 0})

    def test_an_epoch_of_a_weighted_blend_ends_with_the_first_dataset(self, tmp_path: Path) -> None:
        prefixes = [write_random_dataset(tmp_path / name, 90, seed=i) for i, name in enumerate("ab")]
        module = data({prefixes[0]: 0.25, prefixes[1]: 0.75})
        module.setup("fit")
        blend: Any = module.datasets["train"]
        drawn = [blend.locate(index) for index in range(len(blend))]
        assert len(set(drawn)) == len(drawn)
        assert sum(dataset == 1 for dataset, _ in drawn) == len(blend.datasets[1])
        assert len(drawn) == pytest.approx(len(blend.datasets[1]) / 0.75, abs=1)

    @pytest.mark.parametrize("weights", [None, (0.3, 0.7), (5.0, 1.0)])
    def test_order_equals_megatron(self, tmp_path: Path, weights: tuple[float, float] | None) -> None:
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset as Theirs
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        from tests.data.test_gpt import MegatronTokenizer

        prefixes = [write_random_dataset(tmp_path / name, 90, seed=i) for i, name in enumerate("ab")]
        samples = None if weights is None else 104
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=16,
            blend=([str(prefix) for prefix in prefixes], None if weights is None else list(weights)),
            split="80,20,0",
            path_to_cache=str(tmp_path / "cache"),
            tokenizer=MegatronTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        theirs = BlendedMegatronDatasetBuilder(Theirs, [samples, samples, samples], lambda: True, config).build()[0]
        blend = (
            prefixes if weights is None else [entry for pair in zip(weights, prefixes, strict=True) for entry in pair]
        )
        module = data(blend, train_samples=samples)  # type: ignore[arg-type]
        module.setup("fit")
        ours = module.datasets["train"]
        assert len(ours) == len(theirs)  # type: ignore[arg-type]
        for index in range(len(theirs)):
            assert torch.equal(ours[index]["tokens"], theirs[index]["tokens"]), index  # type: ignore[index]


@pytest.mark.parametrize("split", ["969,30,1", "98,2", "1", "0.5,0.25,0.25", "1,1,1"])
@pytest.mark.parametrize("documents", [1, 7, 1000, 12345])
def test_split_bounds_equal_megatron(split: str, documents: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for bounds, expected in zip(split_bounds(split, documents).values(), matrix, strict=True):
        if expected is None:
            assert not bounds
        else:
            beginning, end = (round(edge * float(documents)) for edge in expected)
            assert bounds == range(beginning, end)


def test_a_split_that_is_none() -> None:
    with pytest.raises(DataError, match="split='a,b' is not"):
        split_bounds("a,b", 3)


def test_index_maps_are_described_beside_the_data(dataset_prefix: Path) -> None:
    data(dataset_prefix).setup("validate")
    (entry,) = [path for path in Path(f"{dataset_prefix}.index_maps").iterdir() if path.is_dir()]
    assert json.loads((entry / "description.json").read_text())["seq_length"] == 16
