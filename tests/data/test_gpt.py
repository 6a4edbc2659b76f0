from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_megatron.data.gpt import GPTDataset, GPTSamples, TokenLimits
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.errors import DataError
from tests.data.corpora import EOD, VOCABULARY, write_random_dataset

LIMITS = TokenLimits(VOCABULARY, EOD)


class MegatronTokenizer:
    """The attributes of a tokenizer that megatron-core's datasets read."""

    vocab_size = VOCABULARY
    eod = EOD
    pad = -1

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": "test"}


def megatron_dataset(prefix: Path, sequences: range, num_samples: int | None, split: str = "train", **options: bool):
    from megatron.core.datasets.gpt_dataset import GPTDataset as Theirs
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirIndexed
    from megatron.core.datasets.utils import Split

    masks = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=32,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(prefix.parent / "their_cache"),
        tokenizer=MegatronTokenizer(),
        drop_last_partial_validation_sequence=False,
        **(masks | options),
    )
    indices = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    return Theirs(TheirIndexed(str(prefix)), str(prefix), indices, num_samples, Split[split], config)


# Under one epoch, one epoch, and several, with the last epoch shuffled apart (2.1, 3.0) and together with the others
# (2.9).
@pytest.mark.parametrize("epochs", [None, 0.5, 1.0, 2.1, 2.9, 3.0])
@pytest.mark.parametrize("empty_documents", [False, True])
def test_samples_equal_megatron(tmp_path: Path, epochs: float | None, empty_documents: bool) -> None:
    prefix = write_random_dataset(tmp_path / "corpus", 80, empty=empty_documents)
    indexed = IndexedDataset(prefix)
    sequences = range(5, 70)
    tokens = int(indexed.sequence_lengths[5:70].sum())
    num_samples = None if epochs is None else int(tokens * epochs / 32)
    ours = GPTDataset(indexed, sequences, 32, num_samples=num_samples, seed=7, limits=LIMITS)
    theirs = megatron_dataset(prefix, sequences, num_samples)
    assert len(ours) == len(theirs) >= (num_samples or 1)
    for index in range(len(ours)):
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(ours[index][key], theirs[index][key]), (index, key)
            assert ours[index][key].dtype == (torch.float32 if key == "loss_mask" else torch.int64)


def test_masks_at_document_ends_equal_megatron(dataset_prefix: Path) -> None:
    ours = GPTDataset(
        IndexedDataset(dataset_prefix), range(200), 32, seed=7, samples=GPTSamples(True, True, True), limits=LIMITS
    )
    theirs = megatron_dataset(
        dataset_prefix, range(200), None, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True
    )
    for index in range(len(ours)):
        sample, expected = ours[index], theirs[index]
        assert torch.equal(sample["loss_mask"], expected["loss_mask"])
        assert torch.equal(sample["position_ids"], expected["position_ids"])
        # Megatron's [1, s, s] mask is True where attention is forbidden.
        same_document = sample["document_ids"][:, None] == sample["document_ids"][None, :]
        causal = torch.ones(32, 32, dtype=torch.bool).tril()
        assert torch.equal(~(same_document & causal), expected["attention_mask"][0])


def test_partial_last_sample_equals_megatron(dataset_prefix: Path) -> None:
    ours = GPTDataset(IndexedDataset(dataset_prefix), range(200), 32, seed=7, limits=LIMITS, keep_partial=True)
    theirs = megatron_dataset(dataset_prefix, range(200), None, split="valid")
    assert len(ours) == len(theirs)
    for index in range(len(ours)):
        for key in ("tokens", "labels", "loss_mask"):
            assert torch.equal(ours[index][key], theirs[index][key]), (index, key)
    tokens = int(ours.dataset.sequence_lengths.sum())
    assert sum(int(ours[i]["loss_mask"].sum()) for i in range(len(ours))) == tokens - 1


def test_one_epoch_covers_every_token_once(dataset_prefix: Path) -> None:
    dataset = GPTDataset(IndexedDataset(dataset_prefix), range(200), 16, keep_partial=True)
    seen = np.concatenate([dataset.text(i)[1:] for i in range(len(dataset))])
    everything = np.concatenate([dataset.dataset[int(i)] for i in dataset._documents])
    assert np.array_equal(np.sort(seen), np.sort(everything[1:]))


def test_token_beyond_the_vocabulary(dataset_prefix: Path) -> None:
    dataset = GPTDataset(IndexedDataset(dataset_prefix), range(200), 32, limits=TokenLimits(vocab_size=500))
    with pytest.raises(DataError, match=r"holds token id \d+, the vocabulary has 500"):
        [dataset[index] for index in range(len(dataset))]


def test_too_little_data_names_the_numbers(dataset_prefix: Path) -> None:
    tokens = int(IndexedDataset(dataset_prefix).sequence_lengths[:2].sum())
    with pytest.raises(
        DataError, match=rf"2 documents .* hold {tokens} tokens, a sample of seq_length=4096 needs 4097"
    ):
        GPTDataset(IndexedDataset(dataset_prefix), range(2), 4096)


def test_document_ends_need_a_token(dataset_prefix: Path) -> None:
    with pytest.raises(DataError, match="eod_mask_loss needs the id of the end-of-document token"):
        GPTDataset(IndexedDataset(dataset_prefix), range(200), 32, samples=GPTSamples(eod_mask_loss=True))


def test_order_id_names_the_order_alone(tmp_path: Path) -> None:
    import shutil

    prefix = write_random_dataset(tmp_path / "a" / "corpus", 50)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    original = GPTDataset(IndexedDataset(prefix), range(50), 32)
    assert GPTDataset(IndexedDataset(tmp_path / "b" / "corpus"), range(50), 32).order_id == original.order_id
    assert GPTDataset(IndexedDataset(prefix), range(50), 32, num_samples=3).order_id == original.order_id
    assert GPTDataset(IndexedDataset(prefix), range(50), 32, seed=5).order_id != original.order_id
    assert GPTDataset(IndexedDataset(prefix), range(50), 32, num_samples=500).order_id != original.order_id
