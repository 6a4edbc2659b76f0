from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_megatron.data import PretrainingData
from lightning_megatron.data.bert import BertDataset, BertSamples
from lightning_megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from lightning_megatron.data.masked import Masking, Vocabulary, choose_spans
from lightning_megatron.data.t5 import T5Dataset, T5Samples
from lightning_megatron.errors import DataError

SIZE, PAD, CLS, SEP, MASK, BOS, EOS = 300, 0, 1, 2, 3, 4, 5
SENTINELS = tuple(range(6, 46))
# A third of the ordinary tokens continue a word.
CONTINUES = np.array([token >= 50 and token % 3 == 0 for token in range(SIZE)])
VOCABULARY = Vocabulary(SIZE, CONTINUES, CLS, SEP, MASK, PAD, BOS, EOS, SENTINELS)


class MegatronTokenizer:
    vocab_size = SIZE
    pad, cls, sep, mask, bos, eos, eod = PAD, CLS, SEP, MASK, BOS, EOS, EOS
    inv_vocab = {token: ("##x" if CONTINUES[token] else "x") for token in range(SIZE)}  # noqa: RUF012
    additional_special_tokens_ids = list(SENTINELS)  # noqa: RUF012

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": "test"}


@pytest.fixture
def sentences(tmp_path: Path) -> IndexedDataset:
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(60):
            lengths = random.integers(3, 25, random.integers(1, 9))
            writer.add_document(random.integers(50, SIZE, lengths.sum()), lengths.tolist())
    return IndexedDataset(tmp_path / "corpus")


@pytest.fixture(scope="module")
def one_process_group() -> Iterator[None]:
    """megatron-core's masked datasets ask for the rank even where there is one process."""
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def megatron_dataset(kind: str, dataset: IndexedDataset, num_samples: int, **options: Any) -> Any:
    from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirIndexed
    from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig
    from megatron.core.datasets.utils import Split

    prefix = str(dataset.prefix)
    config_class, dataset_class = {
        "bert": (BERTMaskedWordPieceDatasetConfig, BERTMaskedWordPieceDataset),
        "t5": (T5MaskedWordPieceDatasetConfig, T5MaskedWordPieceDataset),
    }[kind]
    config = config_class(
        random_seed=11,
        sequence_length=64,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(dataset.prefix.parent / "their_cache"),
        tokenizer=MegatronTokenizer(),
        masking_probability=0.15,
        short_sequence_probability=0.1,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        **options,
    )
    indices = np.arange(5, 55, dtype=np.int32)
    return dataset_class(TheirIndexed(prefix), prefix, indices, num_samples, Split.train, config)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("whole_words", [True, False])
@pytest.mark.parametrize("sentence_order", [True, False])
@pytest.mark.parametrize("num_samples", [50, 1000])  # one epoch and several
def test_bert_samples_equal_megatron(
    sentences: IndexedDataset, whole_words: bool, sentence_order: bool, num_samples: int
) -> None:
    theirs = megatron_dataset(
        "bert",
        sentences,
        num_samples,
        masking_max_ngram=3,
        masking_do_full_word=whole_words,
        masking_use_geometric_distribution=False,
        classification_head=sentence_order,
    )
    samples = BertSamples(Masking(whole_words=whole_words), sentence_order=sentence_order)
    ours = BertDataset(sentences, range(5, 55), 64, VOCABULARY, samples, num_samples=num_samples, seed=11)
    assert len(ours) == len(theirs) >= num_samples
    for index in range(0, len(ours), 1 if num_samples == 50 else 37):
        expected = theirs[index]
        for key, value in ours[index].items():
            assert value.tolist() == np.asarray(expected[key]).tolist(), (index, key)
            assert value.dtype == torch.int64


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("num_samples", [50, 1000])
def test_t5_samples_equal_megatron(sentences: IndexedDataset, num_samples: int) -> None:
    theirs = megatron_dataset(
        "t5",
        sentences,
        num_samples,
        masking_max_ngram=10,
        masking_do_full_word=True,
        masking_use_geometric_distribution=True,
        sequence_length_decoder=40,
    )
    ours = T5Dataset(
        sentences, range(5, 55), 64, VOCABULARY, T5Samples(decoder_seq_length=40), num_samples=num_samples, seed=11
    )
    assert len(ours) == len(theirs) >= num_samples
    for index in range(0, len(ours), 1 if num_samples == 50 else 37):
        expected = theirs[index]
        for key, value in ours[index].items():
            assert value.tolist() == np.asarray(expected[key]).tolist(), (index, key)


def test_t5_sides_make_the_text_again(sentences: IndexedDataset) -> None:
    dataset = T5Dataset(sentences, range(60), 64, VOCABULARY, T5Samples(decoder_seq_length=40))
    sample = dataset[3]
    found, target, _ = dataset.sentences(3)
    spans: dict[int, list[int]] = {}
    for token in sample["labels"].tolist():
        if token in SENTINELS:
            spans[token] = []
        elif token >= 50:
            spans[list(spans)[-1]].append(token)
    text = []
    for token in sample["text_enc"][: int(sample["enc_mask"].sum())].tolist():
        text += spans[token] if token in SENTINELS else [token]
    assert text == [token for sentence in found for token in sentence][:target]


def test_masking_takes_its_share_and_whole_words() -> None:
    random = np.random.RandomState(0)
    tokens = random.randint(50, SIZE, 400).tolist()
    changed = list(tokens)
    spans = choose_spans(changed, 400, Masking(), VOCABULARY, random, replace=lambda _: MASK)
    positions = [position for span in spans for position in span.positions]
    assert 55 <= len(positions) <= 60
    assert [i for i in range(400) if changed[i] != tokens[i]] == positions
    for span in spans:
        assert not CONTINUES[tokens[span.positions[0]]] or span.positions[0] == 0
        after = span.positions[-1] + 1
        assert after == 400 or not CONTINUES[tokens[after]]


def test_words_of_byte_level_pieces(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer(" the function")["input_ids"]
    assert not vocabulary.continues[ids[0]]
    assert vocabulary.continues[ids[2:]].all()
    assert not vocabulary.continues[tokenizer.eos_token_id]


def test_documents_of_one_sentence_are_no_bert_data(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus") as writer:
        for _ in range(5):
            writer.add_document([60, 61, 62])
    with pytest.raises(DataError, match=r"None of 5 documents .* \(--split-sentences\)"):
        BertDataset(IndexedDataset(tmp_path / "corpus"), range(5), 64, VOCABULARY, num_samples=10)


def test_missing_special_tokens() -> None:
    with pytest.raises(DataError, match="no cls and no mask token"):
        Vocabulary(SIZE, CONTINUES, sep_id=2).require("cls_id", "sep_id", "mask_id")


def test_a_decoder_that_is_too_short(sentences: IndexedDataset) -> None:
    dataset = T5Dataset(sentences, range(60), 64, VOCABULARY, T5Samples(decoder_seq_length=6))
    with pytest.raises(DataError, match=r"needs \d+ tokens of the decoder, decoder_seq_length=6"):
        [dataset[index] for index in range(len(dataset))]


def test_pretraining_data_for_bert(sentences: IndexedDataset) -> None:
    class Tokenizer:
        cls_token_id, sep_token_id, mask_token_id, pad_token_id, bos_token_id, eos_token_id = (
            CLS,
            SEP,
            MASK,
            PAD,
            BOS,
            EOS,
        )

        def get_vocab(self) -> dict[str, int]:
            return {f"{'##' if CONTINUES[token] else ''}{token}": token for token in range(SIZE)}

        def __len__(self) -> int:
            return SIZE

    module = PretrainingData(
        sentences.prefix,
        tokenizer=Tokenizer(),  # type: ignore[arg-type]
        objective="bert",
        split="60,40,0",
        seq_length=64,
        global_batch_size=4,
        num_workers=0,
    )
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "text": (4, 64),
        "types": (4, 64),
        "labels": (4, 64),
        "is_random": (4,),
        "padding_mask": (4, 64),
        "loss_mask": (4, 64),
        "index": (4,),
    }
