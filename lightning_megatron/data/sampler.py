"""Which samples make up each optimizer step of each data-parallel rank; state that any other layout can resume."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from typing import Any, override

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler, Sampler

from lightning_megatron.errors import DataError

PADDING = -1
"""Index of a padding sample, which fills the last global batch of an epoch and has no loss."""


@dataclass(frozen=True)
class BatchRamp:
    """Global batch size that grows linearly with the samples seen, as Megatron's `--rampup-batch-size`."""

    start: int
    """Global batch size of the first step."""

    increment: int
    """Size of each growth; the final size minus `start` has to be a multiple of it."""

    samples: int
    """Samples over which it reaches the final size."""

    def check(self, final: int) -> None:
        """Raise DataError unless the ramp reaches exactly `final`."""
        if (
            self.start < 1
            or self.increment < 1
            or self.samples < 0
            or self.start > final
            or (final - self.start) % self.increment
        ):
            raise DataError(
                f"rampup_batch_size={self.start},{self.increment},{self.samples} does not lead to "
                f"global_batch_size={final}: the difference has to be a multiple of the increment, all of them "
                "positive."
            )

    def size_at(self, consumed: int, final: int) -> int:
        """Global batch size after `consumed` samples."""
        steps = (final - self.start) // self.increment
        if not steps or not self.samples or consumed > self.samples:
            return final
        return min(final, self.start + int(consumed / (self.samples / steps)) * self.increment)


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields this rank's sample indices of each global batch; iterating begins at the sample that :meth:`seek` named.

    Sample `i` of a global batch goes to rank ``i % data_parallel_size``. The samples of a global batch, and so the
    training, are the same for any number of ranks. The last batch of an epoch is kept: it is filled with
    :data:`PADDING` to full size, because pipelines and compiled kernels want one shape.

    Args:
        num_samples: Samples of one epoch.
        global_batch_size: Samples of one optimizer step over all ranks.
        data_parallel_rank: This rank's number.
        data_parallel_size: Number of data-parallel ranks.
        seed: Seeds the permutation of an epoch, together with the epoch.
        first_shuffled_epoch: Epochs from this one on are permuted: 0 for raw data, 1 for data sets that are shuffled
            already, None for evaluation.
        ramp: Growth of the global batch size.
        order_id: Names the order of the samples; resuming another order is an error.

    Raises:
        DataError: Ranks do not divide a global batch.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        *,
        seed: int = 1234,
        first_shuffled_epoch: int | None = 0,
        ramp: BatchRamp | None = None,
        order_id: str | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.rank, self.world = data_parallel_rank, data_parallel_size
        self.seed = seed
        self.first_shuffled_epoch = first_shuffled_epoch
        self.ramp = ramp
        self.order_id = order_id
        self.epoch = 0
        self.start = 0
        """Samples of the epoch that are consumed before the next iteration begins."""
        self.start_batches = 0
        """Batches that these samples were."""
        if ramp is not None:
            ramp.check(global_batch_size)
        sizes = {global_batch_size} if ramp is None else {ramp.start, ramp.start + ramp.increment, global_batch_size}
        for size in sorted(sizes):
            if size < 1 or size % data_parallel_size:
                raise DataError(
                    f"A global batch of {size} samples cannot be shared by {data_parallel_size} data-parallel ranks: "
                    f"make it a multiple, such as {max(1, -(-size // data_parallel_size)) * data_parallel_size}."
                )

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Itself: Lightning calls `set_epoch` of a loader's `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch at its first sample; the current epoch keeps its place. Lightning calls it each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start, self.start_batches = epoch, 0, 0

    def seek(self, consumed_samples: int, epoch: int = 0, batches: int | None = None) -> None:
        """Begin after the first `consumed_samples` samples of `epoch`; `batches` is how many batches they were."""
        if not 0 <= consumed_samples <= self.num_samples:
            raise DataError(
                f"The checkpoint has consumed {consumed_samples} samples of an epoch, the data has {self.num_samples}: "
                "resume with the data and split of the first run."
            )
        self.epoch, self.start = epoch, consumed_samples
        if batches is None:
            batches = sum(1 for _ in takewhile(lambda batch: batch[0] < consumed_samples, self.sizes(0)))
        self.start_batches = batches

    def sizes(self, start: int) -> Iterator[tuple[int, int]]:
        """`(first sample, real samples)` of each global batch from sample `start` of this epoch on."""
        position = start
        while position < self.num_samples:
            count = min(self.size_at(position), self.num_samples - position)
            yield position, count
            position += count

    def size_at(self, position: int) -> int:
        """Global batch size of the batch that begins at sample `position` of this epoch."""
        if self.ramp is None:
            return self.global_batch_size
        return self.ramp.size_at(self.epoch * self.num_samples + position, self.global_batch_size)

    def consumed_after(self, num_batches: int) -> int:
        """Samples of this epoch consumed after its first `num_batches` batches."""
        if num_batches >= self.start_batches:
            first, count = self.start, num_batches - self.start_batches
        else:
            first, count = 0, num_batches
        if self.ramp is None:
            return min(first + count * self.global_batch_size, self.num_samples)
        for position, size in islice(self.sizes(first), count):
            first = position + size
        return first

    def state_after(self, num_batches: int) -> dict[str, Any]:
        """State from which a run continues behind the first `num_batches` batches of this epoch."""
        return {
            "consumed_samples": self.consumed_after(num_batches),
            "batches": num_batches,
            "epoch": self.epoch,
            "global_batch_size": self.global_batch_size,
            "order_id": self.order_id,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_after`, made at any layout.

        Raises:
            DataError: The state belongs to another order of samples.
        """
        order = state.get("order_id")
        if order is not None and self.order_id is not None and order != self.order_id:
            raise DataError(
                f"The checkpoint was made with another order of samples ({order}, this run has {self.order_id}): "
                "resuming would repeat some samples and skip others. Use the same data, split, seed, seq_length and "
                "train_samples (a run with max_steps draws train_samples = max_steps * global_batch_size)."
            )
        if state.get("global_batch_size", self.global_batch_size) != self.global_batch_size:
            rank_zero_warn(
                f"The checkpoint was made with global_batch_size={state['global_batch_size']}, this run has "
                f"{self.global_batch_size}: no sample is repeated, but this epoch ends by the old count of steps."
            )
        self.seek(int(state["consumed_samples"]), int(state.get("epoch", 0)), state.get("batches"))

    def __len__(self) -> int:
        """Optimizer steps of the whole epoch, wherever it resumes."""
        if self.ramp is None:
            return math.ceil(self.num_samples / self.global_batch_size)
        return sum(1 for _ in self.sizes(0))

    def __iter__(self) -> Iterator[list[int]]:
        order = self._permutation()
        for first, count in self.sizes(self.start):
            mine = range(first + self.rank, first + count, self.world)
            indices = list(mine) if order is None else order[mine.start : mine.stop : self.world].tolist()
            yield indices + [PADDING] * (self.size_at(first) // self.world - len(indices))

    def _permutation(self) -> np.ndarray[Any, Any] | None:
        if self.first_shuffled_epoch is None or self.epoch < self.first_shuffled_epoch:
            return None
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)


class PredictionSampler(DistributedSampler[Any]):
    """The samples of a :class:`GlobalBatchSampler` one by one, for a ``DataLoader`` of as large batches.

    From such a loader Lightning can tell a ``BasePredictionWriter`` the numbers of the samples of each batch. It leaves
    the sampler as it is, since it is a ``DistributedSampler``.
    """

    def __init__(self, batches: GlobalBatchSampler) -> None:
        super().__init__(
            range(batches.num_samples),  # type: ignore[arg-type]
            num_replicas=batches.world,
            rank=batches.rank,
            shuffle=False,
        )
        self._batches = batches

    @override
    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self._batches)

    @override
    def __len__(self) -> int:
        return len(self._batches) * self._batches.global_batch_size // self._batches.world
