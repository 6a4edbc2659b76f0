"""GPT samples: documents packed end to end into sequences of one length, in megatron-core's order for the same seed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_megatron.data.cache import cached_maps, default_cache_dir, digest, fingerprint
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.errors import DataError

# Megatron shuffles a last epoch apart when less than this part of it is needed, so that its few samples do not stand
# for documents that the others have seen less often.
_FINAL_EPOCH_THRESHOLD = 0.80


@dataclass(frozen=True)
class GPTSamples:
    """How GPT samples are cut and masked."""

    reset_position_ids: bool = False
    """Count positions from 0 after each end-of-document token."""

    reset_attention_mask: bool = False
    """Add `document_ids`, so that attention stays inside a document."""

    eod_mask_loss: bool = False
    """No loss for what is predicted from an end-of-document token: the first token of an unrelated document."""


@dataclass(frozen=True)
class TokenLimits:
    """Ids that datasets compare with or check against."""

    vocab_size: int | None = None
    """Ids have to be below it; None checks nothing."""

    eod_id: int | None = None
    """The end-of-document token; needed by the three options of :class:`GPTSamples`."""


class GPTDataset(Dataset[dict[str, Tensor]]):
    """Samples of `seq_length` tokens, each predicted from those before it.

    Samples run on over document ends, and consecutive samples share no label. A sample is a dict of `tokens`, `labels`
    (int64), `loss_mask` (float32), `position_ids` (int64), each `[seq_length]`; with `reset_attention_mask` also
    `document_ids` (int64), the number of documents that ended before each position.

    The order of samples equals `megatron.core.datasets.gpt_dataset.GPTDataset` for the same seed and sizes.

    Args:
        dataset: The tokens.
        sequences: Which sequences of it, a split.
        seq_length: Tokens of a sample.
        num_samples: Samples wanted, from as many epochs as it takes; None for exactly one epoch.
        seed: Shuffles documents and samples.
        samples: Masks and positions.
        limits: Vocabulary size and the end-of-document id.
        keep_partial: Keep the last, shorter sequence, padded with token 0 and without loss there.
        cache_dir: Where the index maps are cached; beside the data by default.

    Raises:
        DataError: No whole sample in the split; later, a token id beyond the vocabulary.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        sequences: range,
        seq_length: int,
        *,
        num_samples: int | None = None,
        seed: int = 1234,
        samples: GPTSamples | None = None,
        limits: TokenLimits | None = None,
        keep_partial: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        dataset.require_token_ids()
        self.dataset = dataset
        self.seq_length = seq_length
        self.samples = samples or GPTSamples()
        self.limits = limits or TokenLimits()
        self._check_eod()
        plan = EpochPlan.of(dataset, sequences, seq_length, num_samples, keep_partial=keep_partial)
        description = {
            "gpt": fingerprint(dataset),
            "prefix": str(dataset.prefix.resolve()),
            "sequences": [sequences.start, sequences.stop],
            "seq_length": seq_length,
            "seed": seed,
            "epochs": plan.num_epochs,
            "separate_final_epoch": plan.separate_final_epoch,
            "keep_partial": keep_partial,
        }
        maps = cached_maps(
            cache_dir or default_cache_dir(dataset.prefix),
            description,
            lambda: build_maps(dataset.sequence_lengths, sequences, plan, seed),
        )
        self._documents, self._starts, self._shuffle = maps["document"], maps["sample"], maps["shuffle"]
        # The location of the data is no part of the order: a resumed run may find it elsewhere.
        self.order_id = digest({key: value for key, value in description.items() if key not in ("gpt", "prefix")})

    def _check_eod(self) -> None:
        needing = [name for name, value in vars(self.samples).items() if value]
        if needing and self.limits.eod_id is None:
            raise DataError(
                f"{', '.join(needing)} needs the id of the end-of-document token: give a tokenizer that has an eos "
                "token."
            )

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = self.text(index)
        vocabulary = self.limits.vocab_size
        if len(text) and (text.min() < 0 or (vocabulary is not None and text.max() >= vocabulary)):
            wrong = text.min() if text.min() < 0 else text.max()
            raise DataError(
                f"{self.dataset.prefix}.bin holds token id {wrong}, the vocabulary has {vocabulary}: the data "
                "was made with another tokenizer. Preprocess it again, or set the model's vocab_size to fit."
            )
        num_predictions = len(text) - 1
        padded = np.zeros(self.seq_length + 1, dtype=np.int64)
        padded[: len(text)] = text
        tokens, labels = torch.from_numpy(padded[:-1].copy()), torch.from_numpy(padded[1:])
        loss_mask = torch.ones(self.seq_length, dtype=torch.float32)
        loss_mask[num_predictions:] = 0.0
        sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
        ends: Tensor | None = tokens.eq(self.limits.eod_id) if self.limits.eod_id is not None else None
        if ends is not None and self.samples.eod_mask_loss:
            loss_mask[ends] = 0.0
        sample["position_ids"] = _positions(ends if self.samples.reset_position_ids else None, self.seq_length)
        if ends is not None and self.samples.reset_attention_mask:
            sample["document_ids"] = torch.cumsum(ends, 0) - ends.long()
        return sample

    def text(self, index: int) -> NDArray[Any]:
        """The `seq_length + 1` token ids of a sample (fewer for a last, partial one): tokens and the last label."""
        number = int(self._shuffle[index])
        (first, start), (last, stop) = self._starts[number], self._starts[number + 1]
        if first == last:
            return self.dataset.get(int(self._documents[first]), int(start), int(stop) - int(start) + 1)
        parts = [self.dataset.get(int(self._documents[first]), int(start))]
        parts += [self.dataset[int(document)] for document in self._documents[first + 1 : last]]
        parts.append(self.dataset.get(int(self._documents[last]), 0, int(stop) + 1))
        return np.concatenate(parts)


def _positions(ends: Tensor | None, seq_length: int) -> Tensor:
    positions = torch.arange(seq_length, dtype=torch.int64)
    if ends is None:
        return positions
    # The position after each end, carried forward, is where the current document began.
    began = torch.zeros(seq_length, dtype=torch.int64)
    began[1:] = torch.where(ends[:-1], positions[1:], 0)
    return positions - torch.cummax(began, 0).values


@dataclass(frozen=True)
class EpochPlan:
    """How many passes over a split give the samples wanted."""

    seq_length: int
    num_epochs: int
    tokens_per_epoch: int
    num_samples: int
    separate_final_epoch: bool

    @classmethod
    def of(
        cls,
        dataset: IndexedDataset,
        sequences: range,
        seq_length: int,
        num_samples: int | None,
        *,
        keep_partial: bool,
    ) -> "EpochPlan":
        """Plan `num_samples` samples (None: one epoch) of these sequences.

        Raises:
            DataError: The sequences hold too few tokens for one sample.
        """
        tokens = int(dataset.sequence_lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
        needed = 2 if keep_partial else seq_length + 1
        if tokens < needed and (num_samples is None or tokens < 1):
            raise DataError(
                f"{len(sequences)} documents of {dataset.prefix} hold {tokens} tokens, a sample of "
                f"seq_length={seq_length} needs {needed}: add data, change the split, or lower seq_length."
            )
        epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // tokens))
        available = -(-(epochs * tokens - 1) // seq_length) if keep_partial else (epochs * tokens - 1) // seq_length
        separate = False
        if num_samples is not None and epochs > 1:
            in_final = num_samples - ((epochs - 1) * tokens - 1) // seq_length
            separate = in_final < int(_FINAL_EPOCH_THRESHOLD * ((tokens - 1) // seq_length))
        return cls(seq_length, epochs, tokens, available, separate)


def build_maps(lengths: NDArray[np.int32], sequences: range, plan: EpochPlan, seed: int) -> dict[str, NDArray[Any]]:
    """Index maps of a GPT dataset.

    Returns:
        `document` `[epochs * documents]`, sequence numbers in the order in which they are laid end to end; `sample`
        `[num_samples + 1, 2]`, position in `document` and token offset where each sample begins; `shuffle`
        `[num_samples]`.
    """
    random = np.random.RandomState(seed)
    documents = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    apart = 1 if plan.separate_final_epoch else 0
    order = np.tile(documents, plan.num_epochs - apart)
    random.shuffle(order)
    if apart:
        last = documents.copy()
        random.shuffle(last)
        order = np.concatenate((order, last))

    ends = np.cumsum(lengths[order], dtype=np.int64)
    tokens = np.arange(plan.num_samples + 1, dtype=np.int64) * plan.seq_length
    # The end of a partial last sample is the last token of all.
    tokens[-1] = min(tokens[-1], ends[-1] - 1)
    # The document that holds a token is the first that ends behind it, which passes over empty documents.
    holder = np.searchsorted(ends, tokens, side="right")
    offset = tokens - (ends[holder] - lengths[order][holder])
    largest = max(len(order), int(lengths.max()))
    sample = np.stack((holder, offset), axis=1).astype(np.int32 if largest <= np.iinfo(np.int32).max else np.int64)

    dtype = np.uint32 if plan.num_samples < np.iinfo(np.uint32).max - 1 else np.int64
    whole = ((plan.num_epochs - 1) * plan.tokens_per_epoch - 1) // plan.seq_length if apart else plan.num_samples
    shuffle = np.arange(plan.num_samples, dtype=dtype)
    random.shuffle(shuffle[:whole])
    if whole < plan.num_samples:
        random.shuffle(shuffle[whole:])
    return {"document": order, "sample": sample, "shuffle": shuffle}
