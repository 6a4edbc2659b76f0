"""BERT samples: masked words and sentence order."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from lightning_megatron.data.blend import Sample
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.data.masked import Masking, SentenceDataset, Vocabulary, choose_spans, padded


@dataclass(frozen=True)
class BertSamples:
    """How BERT samples are made."""

    masking: Masking = field(default_factory=Masking)
    """Which words are masked."""

    short_sequence_probability: float = 0.1
    """Part of the samples that are cut short at random."""

    sentence_order: bool = True
    """Two segments, swapped half of the time."""


class BertDataset(SentenceDataset):
    """Masked-language samples with sentence order.

    A sample is a dict of `text`, `types` (segment 0 or 1), `labels` (-1 where nothing is masked), `padding_mask` (1 for
    text), `loss_mask` (1 where masked), each int64 `[seq_length]`, and `is_random`, an int64 scalar: 1 if the segments
    were swapped. Masks and order equal `megatron.core.datasets.bert_dataset` for the same seed, but for one thing:
    padding is told by place and not by id, so that a tokenizer may use any id for it.

    Args:
        dataset: Sentences as sequences.
        documents: Which documents of it.
        seq_length: Tokens of a sample.
        vocabulary: Of a tokenizer with cls, sep and mask tokens.
        samples: Masking and sentence order.
        num_samples, seed, cache_dir: See :class:`SentenceDataset`.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: range,
        seq_length: int,
        vocabulary: Vocabulary,
        samples: BertSamples | None = None,
        *,
        num_samples: int | None = None,
        seed: int = 1234,
        cache_dir: Path | None = None,
    ) -> None:
        vocabulary.require("cls_id", "sep_id", "mask_id")
        self.samples = samples or BertSamples()
        super().__init__(
            dataset,
            documents,
            seq_length,
            vocabulary,
            special_tokens=3,
            min_sentences=2 if self.samples.sentence_order else 1,
            short_sequence_probability=self.samples.short_sequence_probability,
            num_samples=num_samples,
            seed=seed,
            cache_dir=cache_dir,
        )

    def __getitem__(self, index: int) -> Sample:
        sentences, target, random = self.sentences(index)
        first, second, swapped = self._segments(sentences, random)
        _shorten(first, second, target, random)
        cls_id, sep_id = int(self.vocabulary.cls_id or 0), int(self.vocabulary.sep_id or 0)
        tokens = [cls_id, *first, sep_id]
        types = [0] * len(tokens)
        if second:
            tokens += [*second, sep_id]
            types += [1] * (len(second) + 1)
        spans = choose_spans(tokens, target, self.samples.masking, self.vocabulary, random, replace=self._replacement)
        labels = np.full(self.seq_length, -1, dtype=np.int64)
        for span in spans:
            labels[list(span.positions)] = span.tokens
        return {
            "text": torch.from_numpy(padded(tokens, self.seq_length, 0)),
            "types": torch.from_numpy(padded(types, self.seq_length, 0)),
            "labels": torch.from_numpy(labels),
            "is_random": torch.tensor(int(swapped)),
            "padding_mask": torch.from_numpy(padded([1] * len(tokens), self.seq_length, 0)),
            "loss_mask": torch.from_numpy((labels >= 0).astype(np.int64)),
        }

    def _segments(self, sentences: list[list[int]], random: np.random.RandomState) -> tuple[list[int], list[int], bool]:
        pivot, swapped = len(sentences), False
        if self.samples.sentence_order:
            pivot = int(random.randint(1, len(sentences))) if len(sentences) >= 3 else 1
            swapped = bool(random.random_sample() < 0.5)
        first, second = (list(chain.from_iterable(part)) for part in (sentences[:pivot], sentences[pivot:]))
        return (second, first, swapped) if swapped else (first, second, swapped)

    def _replacement(self, random: np.random.RandomState) -> int | None:
        """The mask token in 80% of cases, any token in 10%, the token itself in 10%."""
        if random.random_sample() < 0.8:
            return self.vocabulary.mask_id
        if random.random_sample() >= 0.5:
            return int(random.randint(0, self.vocabulary.size))
        return None


def _shorten(first: list[int], second: list[int], target: int, random: np.random.RandomState) -> None:
    """Drop tokens at either end of the longer segment until both together have the length."""
    while len(first) + len(second) > target:
        longer = first if len(first) > len(second) else second
        del longer[0 if random.random_sample() < 0.5 else -1]
