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

from lightning_megatron.backends.core import ProcessGroupCollection, get_forward_backward_func
from lightning_megatron.errors import DataError, ModuleError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.shared_experts import Filler, SharedExperts
from lightning_megatron.totals import MAIN_TERM, METRIC, TERM, Totals, TotalsReducer, on_device

Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Loss:
    """What a module's ``loss`` returns for one micro-batch, on the last pipeline stage.

    The step's loss is the sum of ``sum`` over micro-batches, context- and data-parallel ranks, divided by the sum of
    ``num_tokens``; so it does not depend on how a batch was cut. A loss of several means adds ``extra_terms``, each of
    which is divided by a count of its own in the same way, over all micro-batches of an accumulation window.
    """

    sum: torch.Tensor
    """Scalar, with gradient: the *sum* (not the mean) over this micro-batch's tokens or samples."""
    num_tokens: torch.Tensor | float
    """How many of them, or the sum of their weights: any real number. A micro-batch may have none."""
    metrics: Mapping[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=dict)
    """Scalars to log: a pair ``(sum, weight)`` is averaged by weight, a single value over micro-batches. ``None`` is as
    a name that is not there: this micro-batch does not count."""
    extra_terms: Mapping[str, tuple[torch.Tensor, torch.Tensor | float]] = field(default_factory=dict)
    """More terms of the loss by name: ``(sum, count)``, the sum with gradient. One backward runs through all terms, so
    their counts must be known before it, which :meth:`~lightning_megatron.MegatronModule.loss_counts` tells."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a schedule gives back: of a training step the same on every rank of the world, of an evaluation step the
    same on every rank of the replica that ran it."""

    totals: Totals
    """Sums and weights of the terms of the loss, and of metrics."""

    @property
    def loss(self) -> torch.Tensor:
        """The loss, in fp32; 0 if the batch has no loss tokens."""
        return self.totals.loss()

    @property
    def num_tokens(self) -> torch.Tensor:
        """The sum of ``Loss.num_tokens``."""
        return self.totals.weight(MAIN_TERM)

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """Means of ``Loss.metrics``."""
        return self.totals.metrics()


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
    if not all(sizes.values()):
        raise DataError(f"A batch without samples: the sizes of its tensors in dimension 0 are {sizes}.")
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
        count_tokens: called with the count of each term of each micro-batch of a training step, in fp64.
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
        count_tokens: Callable[[Mapping[str, torch.Tensor]], None] | None = None,
    ) -> None:
        self._module = module
        self._chunks = list(chunks)
        self._layout = layout
        self._micro_batch_size = micro_batch_size
        self._has_data = has_data
        self._device = device
        self._is_last = groups.pp.rank() == groups.pp.size() - 1
        self._over_replicas = TotalsReducer(groups.dp_cp, groups.pp, device)
        self._in_replica = TotalsReducer(groups.cp, groups.pp, device)
        self._count_tokens = count_tokens
        self._experts = SharedExperts(groups.ep, device) if groups.ep.size() > 1 else None
        self._term_weights: Mapping[str, torch.Tensor] | None = None
        # What megatron-core adds up: its counter takes whole numbers alone.
        self._no_tokens = torch.zeros((), dtype=torch.int, device=device)
        self._run = get_forward_backward_func(
            layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
        )

    def __call__(
        self, batch: Batch, *, forward_only: bool, term_weights: Mapping[str, torch.Tensor] | None = None
    ) -> StepResult:
        """Forward, and unless ``forward_only`` backward, of every micro-batch.

        Args:
            term_weights: what each term of the loss is multiplied by before the backward; ``None`` runs the backward
                of ``Loss.sum`` as it is, for a loss of one term.

        Raises:
            DataError: a batch that cannot be cut.
            LayoutError: a sequence that cannot be split.
            ModuleError: a loss whose terms are not those of ``term_weights``.
        """
        self._term_weights, self._training = term_weights, not forward_only
        samples, sequence, count = self.sizes(batch)
        microbatches = split_batch(self._module.local_batch(batch), count, has_data=self._has_data)
        if forward_only and self._experts is not None:
            microbatches = self._experts.fill(microbatches, samples // count, sequence)
        records = self._run_all(microbatches, sequence, samples // count, forward_only=forward_only)
        totals = Totals.of(records, self._device) if self._is_last else None
        return StepResult((self._in_replica if forward_only else self._over_replicas)(totals))

    def finish_evaluation(self) -> None:
        """After the last batch of this replica: run what other replicas need that share experts with it."""
        while self._experts is not None and (fillers := self._experts.fillers()):
            self._training = False
            samples, sequence = self._experts.shape
            self._run_all(fillers, sequence, samples, forward_only=True)

    def _run_all(
        self, microbatches: Sequence[dict[str, Any]], sequence: int, samples: int, *, forward_only: bool
    ) -> list[dict[str, Any]]:
        """Records of the micro-batches, of ``samples`` samples each, on the last stage."""
        iterators = [iter(microbatches) for _ in self._chunks]
        with ExitStack() as stack:
            if forward_only:
                # Not inference mode, in which Lightning evaluates: tensors that megatron-core caches, such as rotary
                # embeddings, would then be unusable in the training steps that follow.
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            records: list[dict[str, Any]] = self._run(
                forward_step_func=self._forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
                num_microbatches=len(microbatches),
                seq_length=sequence,
                micro_batch_size=samples,
                forward_only=forward_only,
            )
            return records

    def late_metrics(self) -> dict[str, torch.Tensor]:
        """Means of metrics that the last training step has had for the first time and could not report yet."""
        return self._over_replicas.late().metrics()

    def sizes(self, batch: Batch) -> tuple[int, int, int]:
        """Samples, sequence length and micro-batches of a batch.

        Raises:
            DataError: a batch that cannot be cut.
            LayoutError: a sequence that cannot be split.
        """
        samples = batch_size(batch)
        stages = self._layout.pipeline_model_parallel_size
        sequence = self._module.pipeline_sequence_length(batch)
        self._layout.check_sequence(sequence)
        most = self._micro_batch_size or (samples if stages == 1 else 1)
        return samples, sequence, num_microbatches(samples, most, stages if self._layout.num_chunks > 1 else 1)

    def _forward_step(
        self, microbatches: Iterator[dict[str, Any]], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]]:
        microbatch = next(microbatches)
        output = self._module.forward_step(chunk, microbatch)
        return output, self._no_loss if isinstance(microbatch, Filler) else partial(self._loss, microbatch)

    def _no_loss(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return torch.zeros((), device=self._device), self._no_tokens, {}

    def _loss(
        self, microbatch: dict[str, Any], output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        loss = self._module.loss(output, microbatch)
        terms = {MAIN_TERM: (loss.sum, loss.num_tokens), **loss.extra_terms}
        record: dict[str, Any] = {METRIC + name: value for name, value in loss.metrics.items() if value is not None}
        for name, (total, count) in terms.items():
            # The schedule scales the sum in place for fp16, so what is recorded is a copy.
            record[TERM + name] = total.detach().clone(), on_device(count, self._device).detach()
        if self._training and self._count_tokens is not None:
            self._count_tokens({name: record[TERM + name][1].double().reshape(()) for name in terms})
        return self._to_backward(terms), self._no_tokens, record

    def _to_backward(self, terms: Mapping[str, tuple[torch.Tensor, Any]]) -> torch.Tensor:
        if not self._training or (self._term_weights is None and len(terms) == 1):
            return terms[MAIN_TERM][0]
        weights = self._term_weights or {}
        missing = sorted(terms.keys() - weights.keys())
        if missing:
            raise ModuleError(
                f"{type(self._module).__name__}.loss returned the terms {sorted(terms)}, but loss_counts counts "
                f"{sorted(weights)}. Override loss_counts to count {missing} of a batch too: each term is divided by "
                "its count over the whole accumulation window, which must be known before the first backward."
            )
        weighted = [total.reshape(()) * weights[name].to(total.dtype) for name, (total, _) in terms.items()]
        return torch.stack(weighted).sum()
