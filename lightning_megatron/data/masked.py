"""What BERT and T5 samples share: runs of sentences, and the choice of words to mask, in megatron-core's order."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_megatron.data.blend import Sample
from lightning_megatron.data.cache import cached_maps, default_cache_dir, digest, fingerprint
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.data.native import helpers
from lightning_megatron.errors import DataError

_SENTINEL = re.compile(r"<extra_id_(\d+)>")
# "Without end" in the terms of the compiled builder.
_ALL_EPOCHS = np.iinfo(np.int32).max - 1
_ALL_SAMPLES = np.iinfo(np.int64).max
# SpanBERT's (https://arxiv.org/abs/1907.10529, section 3.1) distribution of span lengths.
_GEOMETRIC_P = 0.2


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids and word pieces that masking needs."""

    size: int
    continues: NDArray[np.bool_]
    """`[size]`, whether a token goes on with the word of the token before it."""
    cls_id: int | None = None
    sep_id: int | None = None
    mask_id: int | None = None
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    sentinels: tuple[int, ...] = ()
    """T5's `<extra_id_0>`, `<extra_id_1>` ..."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """Read it off a Hugging Face tokenizer. Words are found for WordPiece (##) and for pieces that mark a space."""
        pieces: dict[str, int] = tokenizer.get_vocab()
        size = max(pieces.values()) + 1
        continues = np.zeros(size, dtype=bool)
        if any(piece.startswith("##") for piece in pieces):
            continues[[number for piece, number in pieces.items() if piece.startswith("##")]] = True
        elif any(piece.startswith(("\u2581", "\u0120")) for piece in pieces):  # sentencepiece, byte-level BPE
            special = set(tokenizer.all_special_tokens)
            inner = [
                n for piece, n in pieces.items() if not piece.startswith(("\u2581", "\u0120")) and piece not in special
            ]
            continues[inner] = True
        numbered = {int(match[1]): number for piece, number in pieces.items() if (match := _SENTINEL.fullmatch(piece))}
        pad = tokenizer.pad_token_id
        return cls(
            size=size,
            continues=continues,
            cls_id=tokenizer.cls_token_id,
            sep_id=tokenizer.sep_token_id,
            mask_id=tokenizer.mask_token_id,
            pad_id=0 if pad is None else pad,
            # T5 has no token to begin with and uses its padding.
            bos_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad,
            eos_id=tokenizer.eos_token_id,
            sentinels=tuple(number for _, number in sorted(numbered.items())),
        )

    def require(self, *names: str) -> None:
        """Raise DataError unless the tokenizer has these ids."""
        missing = [name.removesuffix("_id") for name in names if getattr(self, name) in (None, ())]
        if missing:
            raise DataError(f"The tokenizer has no {' and no '.join(missing)} token, which this objective needs.")


@dataclass(frozen=True)
class Masking:
    """Which words are masked."""

    probability: float = 0.15
    """Part of the tokens."""
    max_ngram: int = 3
    """Longest run of words masked together."""
    whole_words: bool = True
    """Mask all pieces of a word or none."""
    geometric: bool = False
    """Draw the length of a run from a geometric distribution, else in proportion to 1/length."""


@dataclass(frozen=True)
class MaskedSpan:
    """Tokens masked together."""

    positions: tuple[int, ...]
    tokens: tuple[int, ...]


def choose_spans(
    tokens: list[int],
    target_length: int,
    masking: Masking,
    vocabulary: Vocabulary,
    random: np.random.RandomState,
    *,
    replace: Callable[[np.random.RandomState], int | None] | None = None,
) -> list[MaskedSpan]:
    """Choose what to mask, in place if `replace` is given.

    Args:
        tokens: `[n]` ids; changed where `replace` returns an id.
        target_length: Wanted length of the sample, which bounds the number of maskings.
        masking: How much and what.
        vocabulary: Finds words; separators are never masked.
        random: Its draws are those of megatron-core.
        replace: Called for each masked token.

    Returns:
        The spans in order of position.
    """
    original = list(tokens)
    words: list[list[int]] = []
    for position, token in enumerate(original):
        if token in (vocabulary.cls_id, vocabulary.sep_id):
            continue
        if masking.whole_words and words and vocabulary.continues[token]:
            words[-1].append(position)
        else:
            words.append([position])
    budget = min(masking.probability * target_length, max(1, round(len(original) * masking.probability)))
    # The distribution as numpy's `choice` uses it, without its cost for each call.
    cumulative = (weights := 1.0 / np.arange(1, masking.max_ngram + 1)) / weights.sum()
    cumulative = cumulative.cumsum()
    cumulative /= cumulative[-1]

    order = list(range(len(words)))
    random.shuffle(order)
    spans: list[MaskedSpan] = []
    masked: set[int] = set()
    for first in order:
        if len(masked) >= budget:
            break
        if masking.geometric:
            length = min(int(random.geometric(_GEOMETRIC_P)), masking.max_ngram)
        else:
            length = int(cumulative.searchsorted(random.random_sample(), side="right")) + 1
        positions = list(chain.from_iterable(words[first : first + length]))
        while length > 1 and len(masked) + len(positions) > budget:
            length -= 1
            positions = list(chain.from_iterable(words[first : first + length]))
        if len(masked) + len(positions) > budget or not masked.isdisjoint(positions):
            continue
        for position in positions:
            masked.add(position)
            replacement = replace(random) if replace is not None else None
            if replacement is not None:
                tokens[position] = replacement
        spans.append(MaskedSpan(tuple(positions), tuple(original[position] for position in positions)))
    return sorted(spans, key=lambda span: span.positions)


class SentenceDataset(Dataset[Sample]):
    """Base of samples made of consecutive sentences of one document, in megatron-core's order.

    Args:
        dataset: Sentences as sequences (`lightning-megatron preprocess --split-sentences`).
        documents: Which documents of it, a split.
        seq_length: Tokens of a sample, padded.
        vocabulary: Of the tokenizer that made the data.
        special_tokens: How many of `seq_length` are not text.
        min_sentences: Fewest sentences of a sample.
        short_sequence_probability: Part of the samples that are cut short at random.
        num_samples: Samples wanted, from as many epochs as it takes; None for exactly one epoch.
        seed: Of the order and of each sample's masking.
        cache_dir: Where the index is cached; beside the data by default.

    Raises:
        DataError: No document has enough sentences.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: range,
        seq_length: int,
        vocabulary: Vocabulary,
        *,
        special_tokens: int,
        min_sentences: int,
        short_sequence_probability: float,
        num_samples: int | None,
        seed: int,
        cache_dir: Path | None,
    ) -> None:
        dataset.require_token_ids()
        self.dataset = dataset
        self.seq_length = seq_length
        self.vocabulary = vocabulary
        self.seed = seed
        description = {
            "prefix": str(dataset.prefix.resolve()),
            "data": fingerprint(dataset),
            "documents": [documents.start, documents.stop],
            "length": seq_length - special_tokens,
            "min_sentences": min_sentences,
            "short": short_sequence_probability,
            "seed": seed,
        }

        def build(epochs: int, samples: int) -> NDArray[Any]:
            mapping: NDArray[Any] = helpers().build_mapping(
                dataset.document_indices[documents.start : documents.stop + 1],
                dataset.sequence_lengths,
                epochs,
                samples,
                seq_length - special_tokens,
                short_sequence_probability,
                seed,
                False,
                min_sentences,
            )
            return mapping

        def build_all() -> dict[str, NDArray[Any]]:
            # First one epoch: without a single sample the builder would go on for two thousand million epochs.
            mapping = build(1, _ALL_SAMPLES)
            if not len(mapping):
                raise DataError(
                    f"None of {len(documents)} documents of {dataset.prefix} gives a sample of at least "
                    f"{min_sentences} sentences: preprocess with split_sentences (--split-sentences), or use more data."
                )
            if num_samples is not None and num_samples > len(mapping):
                mapping = build(_ALL_EPOCHS, num_samples)
            return {"sample": mapping}

        directory = cache_dir or default_cache_dir(dataset.prefix)
        self._mapping = cached_maps(directory, {**description, "num_samples": num_samples}, build_all)["sample"]
        order = {key: value for key, value in description.items() if key not in ("prefix", "data")}
        self.order_id = digest({**order, "samples": len(self._mapping)})

    def __len__(self) -> int:
        return len(self._mapping)

    def sentences(self, index: int) -> tuple[list[list[int]], int, np.random.RandomState]:
        """The sentences of a sample, the length wanted, and the random numbers of this sample.

        Raises:
            DataError: A token id beyond the vocabulary.
        """
        first, end, target = (int(value) for value in self._mapping[index])
        found = [self.dataset[sentence].tolist() for sentence in range(first, end)]
        largest = max(map(max, filter(None, found)), default=0)
        smallest = min(map(min, filter(None, found)), default=0)
        if largest >= self.vocabulary.size or smallest < 0:
            raise DataError(
                f"{self.dataset.prefix}.bin holds token ids {smallest} to {largest}, the vocabulary has "
                f"{self.vocabulary.size}: the data was made with another tokenizer. Preprocess it again."
            )
        return found, target, np.random.RandomState((self.seed + index) % 2**32)


def padded(values: list[int], length: int, filling: int) -> NDArray[np.int64]:
    """`[length]` int64 with `values` first."""
    result = np.full(length, filling, dtype=np.int64)
    result[: len(values)] = values
    return result
