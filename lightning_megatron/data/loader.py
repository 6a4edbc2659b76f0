"""The data loader that Lightning sees: optimizer steps as its length, consumed samples as its state."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_megatron.data.sampler import PADDING, GlobalBatchSampler, PredictionSampler

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Any]], Batch]

# Label that torch's cross-entropy leaves out.
IGNORE = -100


class GlobalBatchLoader:
    """Iterates a data set one global batch at a time and resumes at any sample.

    It wraps a `torch.utils.data.DataLoader` without being one: Lightning would exchange the sampler of a
    `DataLoader` for a shuffling `DistributedSampler`. Each batch is a dict of tensors with ``global_batch_size /
    data_parallel_size`` samples in dim 0, and their numbers in the data set as `index` unless there is a `collate`.
    `len()` is the number of optimizer steps of an epoch.

    Args:
        dataset: Map-style data set of dicts of tensors.
        sampler: Decides what this rank reads, and in which order.
        num_workers: Worker processes.
        collate: Makes a batch of samples; stacks each key by default.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: GlobalBatchSampler,
        *,
        num_workers: int = 0,
        collate: Collate | None = None,
    ) -> None:
        self.dataset = dataset
        # Not `sampler`: Lightning would take a loader that has one for a shuffled DataLoader when it evaluates.
        self.batch_sampler = sampler
        self._handed_out = 0
        self._finished_epoch: int | None = None
        self._num_workers = num_workers
        self._collate = collate
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning creates the iterator before it sets the epoch, and nothing is fetched before the
        # first next().
        sampler = self.batch_sampler
        if sampler.start >= sampler.num_samples or self._finished_epoch == sampler.epoch:
            sampler.set_epoch(sampler.epoch + 1)
        self._handed_out = 0
        if self._loader is None:
            self._loader = self._with_workers()
        for batch in self._loader:
            self._handed_out += 1
            yield batch
        self._finished_epoch = sampler.epoch

    def _with_workers(self) -> DataLoader[Any]:
        return DataLoader(
            _Padded(self.dataset, numbered=self._collate is None),
            batch_sampler=self.batch_sampler,
            num_workers=self._num_workers,
            collate_fn=self._collate or default_collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self._num_workers > 0,
            prefetch_factor=4 if self._num_workers > 0 else None,
        )

    def close(self) -> None:
        """End the worker processes, which live from epoch to epoch; the next iteration starts others.

        A garbage collector that ends them, because a Trainer and its loaders refer to each other, waits 5 s for each:
        it closes the queue by which they are told to stop first (torch 2.11).
        """
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """State after the batches that the iterator has handed out so far."""
        return self.state_after(self.batch_sampler.start_batches + self._handed_out)

    def state_after(self, num_batches: int) -> dict[str, Any]:
        """State after the first `num_batches` batches of the current epoch, those before a resume included.

        For a caller that fetches ahead or reads on one rank for several, and so knows better than the iterator what
        was used.
        """
        return self.batch_sampler.state_after(num_batches)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; ``{"consumed_samples": n}`` alone will do."""
        self.batch_sampler.load_state_dict(state)
        self._handed_out = 0
        self._finished_epoch = None


def prediction_loader(
    dataset: Dataset[Any], sampler: GlobalBatchSampler, *, num_workers: int = 0, collate: Collate | None = None
) -> DataLoader[Any]:
    """The batches of a :class:`GlobalBatchLoader` from a loader of torch's own, whose samples Lightning can number."""
    return DataLoader(
        _Padded(dataset, numbered=collate is None),
        batch_size=sampler.global_batch_size // sampler.world,
        sampler=PredictionSampler(sampler),
        num_workers=num_workers,
        collate_fn=collate or default_collate,
        pin_memory=torch.cuda.is_available(),
    )


class _Padded(Dataset[Any]):
    """Answers the index :data:`PADDING` with a sample that has no loss, and tells samples' numbers as ``index``."""

    def __init__(self, dataset: Dataset[Any], *, numbered: bool) -> None:
        self._dataset = dataset
        self._numbered = numbered

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        sample = self._dataset[index] if index != PADDING else without_loss(self._dataset[0])
        return {"index": index, **sample} if self._numbered and isinstance(sample, dict) else sample


def without_loss(sample: dict[str, Any]) -> dict[str, Any]:
    """A copy of a sample whose loss is masked: `loss_mask` 0 if it has one, `labels` ignored otherwise.

    BERT's label of the sentences' order, which has a loss of its own, is ignored too. Labels of a regression are NaN.
    """
    masked = dict(sample)
    for name in ("is_random", "next_sentence_label"):
        if name in sample:
            masked[name] = torch.full_like(torch.as_tensor(sample[name]), IGNORE, dtype=torch.int64)
    if "loss_mask" in sample:
        masked["loss_mask"] = torch.zeros_like(torch.as_tensor(sample["loss_mask"]))
    elif "labels" in sample:
        labels = torch.as_tensor(sample["labels"])
        masked["labels"] = torch.full_like(labels, math.nan if labels.is_floating_point() else IGNORE)
    return masked
