"""T5 samples: spans replaced by sentinels, to be written out by the decoder."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lightning_megatron.data.blend import Sample
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.data.masked import Masking, SentenceDataset, Vocabulary, choose_spans, padded
from lightning_megatron.errors import DataError


@dataclass(frozen=True)
class T5Samples:
    """How T5 samples are made."""

    decoder_seq_length: int = 128
    """Tokens of the decoder's side, padded."""

    masking: Masking = field(default_factory=lambda: Masking(max_ngram=10, geometric=True))
    """Which words are masked."""

    short_sequence_probability: float = 0.1
    """Part of the samples that are cut short at random."""


class T5Dataset(SentenceDataset):
    """Span-corruption samples.

    A sample is a dict of `text_enc`, `enc_mask` `[seq_length]` and `text_dec`, `labels`, `loss_mask`, `dec_mask`
    `[decoder_seq_length]`, all int64; masks are 1 for text, labels -1 for padding. Order and spans equal
    `megatron.core.datasets.t5_dataset` for the same seed, but padding is told by place and not by id.

    Args:
        dataset: Sentences or documents as sequences.
        documents: Which documents of it.
        seq_length: Tokens of the encoder's side.
        vocabulary: Of a tokenizer with an eos token and sentinels.
        samples: Masking and the decoder's length.
        num_samples, seed, cache_dir: See :class:`SentenceDataset`.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: range,
        seq_length: int,
        vocabulary: Vocabulary,
        samples: T5Samples | None = None,
        *,
        num_samples: int | None = None,
        seed: int = 1234,
        cache_dir: Path | None = None,
    ) -> None:
        vocabulary.require("bos_id", "eos_id", "sentinels")
        self.samples = samples or T5Samples()
        super().__init__(
            dataset,
            documents,
            seq_length,
            vocabulary,
            special_tokens=2,
            min_sentences=1,
            short_sequence_probability=self.samples.short_sequence_probability,
            num_samples=num_samples,
            seed=seed,
            cache_dir=cache_dir,
        )

    def __getitem__(self, index: int) -> Sample:
        sentences, target, random = self.sentences(index)
        tokens = [token for sentence in sentences for token in sentence][:target]
        spans = choose_spans(tokens, target, self.samples.masking, self.vocabulary, random)
        if len(spans) > len(self.vocabulary.sentinels):
            raise DataError(
                f"{len(spans)} spans were masked, the tokenizer has {len(self.vocabulary.sentinels)} sentinels: lower "
                "seq_length or the masking probability, or add <extra_id_N> tokens."
            )
        encoder: list[int] = []
        output: list[int] = []
        begin = 0
        for span, sentinel in zip(spans, self.vocabulary.sentinels, strict=False):
            encoder += [*tokens[begin : span.positions[0]], sentinel]
            output += [sentinel, *span.tokens]
            begin = span.positions[-1] + 1
        encoder += tokens[begin:]
        bos_id, eos_id = int(self.vocabulary.bos_id or 0), int(self.vocabulary.eos_id or 0)
        decoder, labels = [bos_id, *output], [*output, eos_id]
        length = self.samples.decoder_seq_length
        if len(decoder) > length:
            raise DataError(
                f"A sample needs {len(decoder)} tokens of the decoder, decoder_seq_length={length}: raise it, or "
                f"lower the masking probability ({self.samples.masking.probability})."
            )
        present = padded([1] * len(decoder), length, 0)
        return {
            "text_enc": torch.from_numpy(padded(encoder, self.seq_length, 0)),
            "text_dec": torch.from_numpy(padded(decoder, length, 0)),
            "labels": torch.from_numpy(padded(labels, length, -1)),
            "loss_mask": torch.from_numpy(present),
            "enc_mask": torch.from_numpy(padded([1] * len(encoder), self.seq_length, 0)),
            "dec_mask": torch.from_numpy(np.copy(present)),
        }
