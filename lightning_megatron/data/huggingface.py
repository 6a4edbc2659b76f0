"""Any text dataset of the `datasets` library as blocks of equal length."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_megatron.data.blend import SPLITS, Sample, SplitName
from lightning_megatron.data.cache import cached_maps, digest
from lightning_megatron.data.datamodule import GlobalBatchDataModule
from lightning_megatron.data.indexed import PathLike
from lightning_megatron.data.preprocessing.encoding import bulk_encoder
from lightning_megatron.data.sampler import BatchRamp
from lightning_megatron.data.tokenizer import Tokenizer, end_of_document_id, tokenizer_identity
from lightning_megatron.errors import DataError

_ROWS = 1000
_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev"),
    "test": ("test",),
}


class BlockDataset(Dataset[Sample]):
    """Token ids end to end, cut into blocks; what is left over at the end is dropped, as in Hugging Face's examples.

    A sample is a dict of `tokens`, `labels` (the next token), `position_ids` (int64) and `loss_mask` (float32; 0 at
    the last position, whose next token is in another block), each `[block_size]`. Its loss equals that of a
    `transformers` model given the block as `input_ids` and `labels`.
    """

    def __init__(self, tokens: NDArray[Any], block_size: int, order_id: str | None = None) -> None:
        self._blocks = tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)
        self.order_id = order_id

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Sample:
        tokens = torch.from_numpy(self._blocks[index].astype(np.int64))
        loss_mask = torch.ones(len(tokens), dtype=torch.float32)
        loss_mask[-1] = 0.0
        labels = torch.roll(tokens, -1)
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": torch.arange(len(tokens))}


class HuggingFaceData(GlobalBatchDataModule):
    """A text dataset, tokenized and grouped into blocks.

    Args:
        dataset: A `datasets.DatasetDict`, a mapping from split to dataset, one dataset (for training), or the
            directory of `save_to_disk`.
        tokenizer: Directory, JSON file or object.
        block_size: Tokens of a sample.
        text_column: Where the text is; the only text column by default.
        append_eod: End each row with the eos token.
        cache_dir: Where token ids are cached, `~/.cache/lightning_megatron` by default.
        global_batch_size, num_workers, seed, rampup_batch_size: See :class:`GlobalBatchDataModule`.

    Raises:
        DataError: On setup: no such dataset, split or column, or fewer tokens than a block.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        tokenizer: PathLike | Tokenizer,
        block_size: int,
        text_column: str | None = None,
        append_eod: bool = False,
        cache_dir: PathLike | None = None,
        global_batch_size: int,
        num_workers: int = 2,
        seed: int = 1234,
        rampup_batch_size: tuple[int, int, int] | BatchRamp | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            seed=seed,
            rampup_batch_size=rampup_batch_size,
            tokenizer=tokenizer,
        )
        self.dataset = dataset
        self.block_size = block_size
        self.text_column = text_column
        self.append_eod = append_eod
        default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "lightning_megatron")
        self.cache_dir = Path(cache_dir) if cache_dir is not None else default

    def setup(self, stage: str) -> None:
        """Tokenize the splits that `stage` needs, or load what is cached."""
        splits = self._splits()
        for name in self.splits_of(stage):
            found = next((splits[key] for key in _NAMES[name] if key in splits), None)
            if found is not None:
                self.datasets[name] = self._blocks(found, name)
            elif name == "train":
                raise DataError(f"The dataset has no split train; it has {', '.join(splits)}.")

    def _splits(self) -> Mapping[str, Any]:
        dataset = self.dataset
        if isinstance(dataset, (str, os.PathLike)):
            try:
                import datasets
            except ImportError as error:
                raise DataError("HuggingFaceData needs datasets: pip install 'lightning-megatron[data]'.") from error
            try:
                dataset = datasets.load_from_disk(os.fspath(dataset))
            except FileNotFoundError as error:
                raise DataError(
                    f"{dataset} is no directory that save_to_disk wrote: save the dataset there, or pass the object "
                    "that datasets.load_dataset returns."
                ) from error
        return dataset if isinstance(dataset, Mapping) else {SPLITS[0]: dataset}

    def _blocks(self, rows: Any, name: SplitName) -> BlockDataset:
        column = self._column(rows)
        description = {
            "rows": getattr(rows, "_fingerprint", None) or _content(rows[column]),
            "column": column,
            "tokenizer": tokenizer_identity(self.tokenizer),
            "append_eod": self.append_eod,
        }
        tokens = cached_maps(self.cache_dir, description, lambda: self._tokenize(rows, column))["tokens"]
        if len(tokens) < self.block_size:
            raise DataError(
                f"The split {name} has {len(tokens)} tokens, fewer than one block of block_size={self.block_size}: "
                "lower it."
            )
        return BlockDataset(tokens, self.block_size, digest({**description, "block_size": self.block_size}))

    def _column(self, rows: Any) -> str:
        names = list(rows.column_names)
        text = [name for name in names if isinstance(rows[0][name], str)]
        if self.text_column in names or (self.text_column is None and len(text) == 1):
            return self.text_column or text[0]
        raise DataError(
            f"text_column={self.text_column!r}: the dataset has the columns {', '.join(names)}, of which "
            f"{', '.join(text) or 'none'} hold text. Name one."
        )

    def _tokenize(self, rows: Any, column: str) -> dict[str, NDArray[Any]]:
        encode = bulk_encoder(self.tokenizer)
        end = end_of_document_id(self.tokenizer) if self.append_eod else None
        parts = []
        for start in range(0, len(rows), _ROWS):
            tokens, lengths = encode(rows[start : start + _ROWS][column])
            if end is not None:
                tokens = np.insert(tokens, np.cumsum(lengths), end)
            parts.append(tokens.astype(np.int32))
        return {"tokens": np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)}


def _content(texts: Any) -> str:
    return digest({"texts": list(texts)})
