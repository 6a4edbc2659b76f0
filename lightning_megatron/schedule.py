"""One optimizer step: a batch into micro-batches, through megatron-core's pipeline schedule, to one loss on all ranks.

The only place where a micro-batch meets a model. Nothing here knows Lightning or which model it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lightning_megatron.backends.core import ProcessGroupCollection, get_forward_backward_func
from lightning_megatron.errors import DataError
from lightning_megatron.layout import ParallelLayout

Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Loss:
    """What a module's ``loss`` returns for one micro-batch, on the last pipeline stage.

    The step's loss is the sum of ``sum`` over micro-batches, context- and data-parallel ranks, divided by the sum of
    ``num_tokens``; so it does not depend on how a batch was cut.
    """

    sum: torch.Tensor
    """Scalar, with gradient: the *sum* (not the mean) over this micro-batch's tokens or samples."""
    num_tokens: torch.Tensor | int
    """How many of them, a whole number."""
    metrics: Mapping[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Scalars to log: a pair ``(sum, weight)`` is averaged by weight, a single value over micro-batches."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a schedule gives back, the same on every rank of the world."""

    loss: torch.Tensor
    num_tokens: torch.Tensor
    metrics: dict[str, torch.Tensor]


class ScheduledModule(Protocol):
    """What the schedule asks of a module; :class:`~lightning_megatron.MegatronModule` provides it."""

    def forward_step(self, chunk: torch.nn.Module, microbatch: dict[str, Any]) -> torch.Tensor:
        """Run one chunk on one micro-batch. Tensors of the micro-batch are ``None`` on stages that get no data."""
        ...

    def loss(self, output: torch.Tensor, microbatch: dict[str, Any]) -> Loss:
        """The loss of one micro-batch from the last stage's output."""
        ...

    def pipeline_sequence_length(self, batch: Batch) -> int:
        """Length of the hidden states that travel between stages, before any split over ranks."""
        ...

    def local_batch(self, batch: Batch) -> Batch:
        """This rank's part of a batch that all ranks of a replica have."""
        ...


# --------------------------------------------------------------------------------------------------- micro-batches


def batch_size(batch: Batch) -> int:
    """Samples in a batch.

    Raises:
        DataError: no tensors, or tensors that disagree about the number of samples.
    """
    sizes = {key: value.size(0) for key, value in batch.items() if torch.is_tensor(value) and value.dim()}
    if not sizes:
        raise DataError(f"A batch needs tensors with the samples in dimension 0, but it has the keys {sorted(batch)}.")
    if len(set(sizes.values())) > 1:
        raise DataError(f"The tensors of a batch disagree about the number of samples in dimension 0: {sizes}.")
    return next(iter(sizes.values()))


def num_microbatches(samples: int, micro_batch_size: int, multiple: int = 1) -> int:
    """How many equal micro-batches to cut ``samples`` into: the fewest that are no larger than ``micro_batch_size``.

    A schedule needs micro-batches of one size. The last batch of an epoch may not be a multiple of
    ``micro_batch_size``; it is cut into smaller equal ones instead of being dropped.

    Args:
        samples: samples of this data-parallel rank.
        micro_batch_size: the most samples of a micro-batch.
        multiple: the interleaved schedule needs a multiple of the pipeline size.

    Raises:
        DataError: no such number exists.
    """
    for count in range(max(1, -(-samples // micro_batch_size)), samples + 1):
        if samples % count == 0 and count % multiple == 0:
            return count
    raise DataError(
        f"{samples} samples cannot be cut into equal micro-batches whose number is a multiple of {multiple}, as the "
        f"interleaved schedule over {multiple} pipeline stages needs. Make the batch of a data-parallel rank a "
        f"multiple of {multiple} (drop_last=True, or another global_batch_size), or leave out "
        "virtual_pipeline_model_parallel_size."
    )


def split_batch(batch: Batch, count: int, *, has_data: bool = True) -> list[dict[str, Any]]:
    """Cut a batch into ``count`` micro-batches along dimension 0; what is not a tensor of samples goes to each.

    On a stage without data the tensors of a batch only tell its shape, and each micro-batch holds ``None`` for them.
    """
    size = batch_size(batch) // count

    def part(value: Any, index: int) -> Any:
        if torch.is_tensor(value) and value.dim():
            return value.narrow(0, index * size, size) if has_data else None
        return value[index * size : (index + 1) * size] if isinstance(value, list) else value

    return [{key: part(value, index) for key, value in batch.items()} for index in range(count)]


# -------------------------------------------------------------------------------------------------------- schedule


class Schedule:
    """Runs batches of one model through the pipeline.

    Args:
        module: the forward and loss.
        chunks: this rank's chunks, wrapped in megatron-core's DistributedDataParallel when training.
        layout: sizes.
        groups: process groups.
        micro_batch_size: samples per micro-batch; ``None`` is the whole batch without a pipeline, and 1 with one.
        has_data: whether this stage gets the batch's tensors; other stages see ``None`` for each.
    """

    def __init__(
        self,
        module: ScheduledModule,
        chunks: Sequence[torch.nn.Module],
        layout: ParallelLayout,
        groups: ProcessGroupCollection,
        *,
        micro_batch_size: int | None,
        has_data: bool,
        device: torch.device,
    ) -> None:
        self._module = module
        self._chunks = list(chunks)
        self._layout = layout
        self._micro_batch_size = micro_batch_size
        self._has_data = has_data
        self._reducer = _LossReducer(layout, groups, device)
        self._run = get_forward_backward_func(
            layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
        )

    def __call__(self, batch: Batch, *, forward_only: bool) -> StepResult:
        """Forward, and unless ``forward_only`` backward, of every micro-batch.

        Raises:
            DataError: a batch that cannot be cut.
            LayoutError: a sequence that cannot be split.
        """
        samples = batch_size(batch)
        stages = self._layout.pipeline_model_parallel_size
        sequence = self._module.pipeline_sequence_length(batch)
        self._layout.check_sequence(sequence)
        most = self._micro_batch_size or (samples if stages == 1 else 1)
        count = num_microbatches(samples, most, stages if self._layout.num_chunks > 1 else 1)
        microbatches = split_batch(self._module.local_batch(batch), count, has_data=self._has_data)
        iterators = [iter(microbatches) for _ in self._chunks]
        with ExitStack() as stack:
            if forward_only:
                # Not inference mode, in which Lightning evaluates: tensors that megatron-core caches, such as rotary
                # embeddings, would then be unusable in the training steps that follow.
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            records = self._run(
                forward_step_func=self._forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
                num_microbatches=count,
                seq_length=sequence,
                micro_batch_size=samples // count,
                forward_only=forward_only,
            )
            return self._reducer(records)

    def _forward_step(
        self, microbatches: Iterator[dict[str, Any]], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]]:
        microbatch = next(microbatches)
        return self._module.forward_step(chunk, microbatch), partial(self._loss, microbatch)

    def _loss(
        self, microbatch: dict[str, Any], output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        loss = self._module.loss(output, microbatch)
        num_tokens = _on_device(loss.num_tokens, loss.sum.device)
        # The schedule scales the sum in place for fp16, so what is recorded is a copy.
        record = {"loss": (loss.sum.detach().clone(), num_tokens), **loss.metrics}
        return loss.sum, num_tokens.to(torch.int), record


def _on_device(number: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A number as a tensor. A fill, since a copy from the host would wait for all that the device has still to do."""
    return number.to(device) if torch.is_tensor(number) else torch.full((), number, device=device)


class _LossReducer:
    """Sums losses over micro-batches, context and data parallel ranks, then tells every pipeline stage."""

    def __init__(self, layout: ParallelLayout, groups: ProcessGroupCollection, device: torch.device) -> None:
        self._stages = layout.pipeline_model_parallel_size
        self._groups = groups
        self._device = device
        self._names: tuple[str, ...] = ()

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> StepResult:
        """``records`` hold one entry per micro-batch on the last stage, and are empty elsewhere."""
        names = tuple(records[0])[1:] if records else ()
        totals = self._local_totals(records, ("loss", *names)) if records else None
        if totals is not None:
            dist.all_reduce(totals, group=self._groups.dp_cp)
        if self._stages > 1:
            totals, names = self._from_last_stage(totals, names)
        assert totals is not None
        sums, weights = totals.unbind(dim=1)
        loss, *metrics = torch.where(weights > 0, sums / weights.clamp(min=1e-12), sums).float().unbind()
        return StepResult(loss, weights[0], dict(zip(names, metrics, strict=True)))

    def _local_totals(self, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> torch.Tensor:
        """Sums and weights over micro-batches, ``[len(names), 2]``, in fp64 so that their order hardly matters."""
        rows = []
        for name in names:
            pairs = [record[name] if isinstance(record[name], tuple) else (record[name], 1.0) for record in records]
            for column in zip(*pairs, strict=True):
                numbers = [_on_device(n, self._device).detach().double().reshape(()) for n in column]
                rows.append(torch.stack(numbers).sum())
        return torch.stack(rows).view(-1, 2)

    def _from_last_stage(
        self, totals: torch.Tensor | None, names: tuple[str, ...]
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Broadcast along the pipeline. The metrics' names go along once, and again when they change."""
        group, last = self._groups.pp, self._stages - 1
        new_names = totals is not None and names != self._names
        header = torch.tensor([len(names) + 1, new_names], dtype=torch.int64, device=self._device)
        dist.broadcast(header, group_src=last, group=group)
        rows, new_names = header.tolist()
        if new_names:
            announced = [names]
            dist.broadcast_object_list(announced, group_src=last, group=group, device=self._device)
            self._names = announced[0]
        if totals is None:
            totals = torch.empty(rows, 2, dtype=torch.float64, device=self._device)
        dist.broadcast(totals, group_src=last, group=group)
        return totals, self._names
