"""Gradients of a fit: the buffers around its chunks, their reduction, and the tokens they are divided by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends import core
from lightning_megatron.count_check import CountCheck
from lightning_megatron.optim.optimizer import MegatronOptimizer
from lightning_megatron.totals import MAIN_TERM, ROUTER_TERM


class Gradients:
    """megatron-core's gradient buffers, from the first micro-batch to what the optimizer reads.

    With ``accumulate_grad_batches`` several schedules fill them before they are reduced, once, and divided by the
    tokens of all.

    Args:
        chunks: this rank's, which are wrapped here.
        groups: the process groups to reduce over.
        config: whether to reduce while the backward goes on, shard the optimizer, and more of megatron-core's.
    """

    def __init__(
        self,
        chunks: list[Any],
        groups: core.ProcessGroupCollection,
        config: core.DistributedDataParallelConfig,
    ) -> None:
        self.chunks = [
            core.DistributedDataParallel(
                core.get_model_config(chunk),
                config,
                chunk,
                disable_bucketing=index > 0,  # as Megatron-LM does: only the first chunk's backward ends the step
                pg_collection=groups,
            )
            for index, chunk in enumerate(chunks)
        ]
        self._groups, self._config = groups, config
        self._optimizer: MegatronOptimizer | None = None
        self._are_looked_at: Callable[[], bool] = lambda: True
        # Of the accumulation window's schedules so far, in fp64, None before its first.
        self._tokens: Tensor | None = None
        self._term_weights: dict[str, Tensor] | None = None
        self._check = CountCheck(groups.cp)
        self._more_to_accumulate = False

    def belong_to(self, chunks: list[Any]) -> bool:
        """Whether these are the chunks of ``chunks``."""
        return [unwrap(chunk) for chunk in self.chunks] == chunks

    def connect(self, optimizer: MegatronOptimizer, are_looked_at: Callable[[], bool]) -> None:
        """Tell megatron-core's schedule how losses are scaled and gradients reduced.

        Args:
            are_looked_at: whether anyone may read gradients before the optimizer does, which else divides them while it
                reads them.
        """
        self._optimizer, self._are_looked_at = optimizer, are_looked_at
        config = core.get_model_config(self.chunks[0])
        config.grad_scale_func = optimizer.core.scale_loss
        config.moe_grad_scale_func = self._router_scale
        config.finalize_model_grads_func = self._finalize
        config.no_sync_func = None
        if self._config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            # megatron-core takes one function for one chunk, and a list for several.
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @contextmanager
    def step(self, counts: Callable[[], Mapping[str, Tensor] | None]) -> Iterator[Mapping[str, Tensor] | None]:
        """Around the schedule of one batch, which adds to the buffers and, as the last of its window, ends them.

        Args:
            counts: called at the beginning of a window for the counts of each term of the loss over all of the window's
                batches on this replica, shape ``[]``; ``None`` for a loss of one term, which :meth:`count_tokens`
                counts while the backward goes on.

        Yields:
            What to multiply each term by before the backward.
        """
        if self._tokens is None:
            device = next(self.chunks[0].parameters()).device
            self._zero()
            self._tokens = torch.zeros((), dtype=torch.float64, device=device)
            told = counts()
            self._term_weights = self._weights(told)
            self._check.begin(told)
        with self._without_reduction() if self._more_to_accumulate else nullcontext():
            yield self._term_weights

    def count_tokens(self, counts: Mapping[str, Tensor]) -> None:
        """Add the counts of a micro-batch's terms, on the last pipeline stage: numbers in fp64, shape ``[]``."""
        assert self._tokens is not None
        self._tokens = self._tokens + counts[MAIN_TERM]
        self._check.add(counts)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around all schedules of a window but the last."""
        self._more_to_accumulate = True
        try:
            yield
        finally:
            self._more_to_accumulate = False

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Names in this rank's chunks, and gradients."""
        for chunk in self.chunks:
            for name, parameter in unwrap(chunk).named_parameters():
                if parameter.requires_grad:
                    yield name, parameter.main_grad

    def buffers(self) -> list[Tensor]:
        """All of them in a few flat pieces."""
        buffers = (b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers))
        return [buffer.grad_data for buffer in buffers]

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """For whoever reads or replaces weights: what a forward would have gathered lazily is gathered before."""
        lazily = self.chunks if self._config.overlap_param_gather else ()
        for chunk in lazily:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in lazily:
                chunk.enable_forward_pre_hook()

    def _zero(self) -> None:
        assert self._optimizer is not None
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        # Without master weights param.grad is the buffer itself after a step, and the first micro-batch would be
        # added to it twice.
        self._optimizer.core.zero_grad()

    @contextmanager
    def _without_reduction(self) -> Iterator[None]:
        config = core.get_model_config(self.chunks[0])
        no_sync, config.no_sync_func = config.no_sync_func, nullcontext
        try:
            with ExitStack() as stack:
                for chunk in self.chunks:
                    stack.enter_context(chunk.no_sync())
                yield
        finally:
            config.no_sync_func = no_sync

    def _finalize(self, chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Reduce gradients and divide them by the tokens of the whole accumulation window, at its end.

        megatron-core's own count of tokens is not used: it holds whole numbers, and divides by 1 at least.
        """
        if self._more_to_accumulate:
            return
        tokens, self._tokens = self._tokens, None
        core.finalize_model_grads(chunks, None, **kwargs)
        if self._term_weights is not None:
            self._check.end()
            return  # each term has been divided by its own count before the backward
        assert self._optimizer is not None
        assert tokens is not None
        scale = _inverse(self._over_all_ranks(tokens, self._groups.dp_cp))
        if self._are_looked_at() or not self._optimizer.scale_gradients(scale):
            for chunk in chunks:
                chunk.scale_gradients(scale)

    def _router_scale(self) -> Tensor:
        """What the auxiliary losses of routers, each times the tokens that it is a mean over, are multiplied by."""
        assert self._optimizer is not None
        scale = self._optimizer.core.scale_loss(torch.ones(1, device=next(self.chunks[0].parameters()).device))
        weight = (self._term_weights or {}).get(ROUTER_TERM)
        return scale if weight is None else scale * weight

    def _weights(self, counts: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        if counts is None:
            return None
        names = sorted(counts)
        # Batches are not yet cut for context parallelism, so each of its ranks has counted all tokens of its replica.
        total = self._over_all_ranks(torch.stack([counts[name].double() for name in names]), self._groups.dp)
        return dict(zip(names, _inverse(total).unbind(), strict=True))

    def _over_all_ranks(self, counts: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Sums over ``group`` on every rank, of what the last pipeline stage has counted."""
        pp = self._groups.pp
        if pp.size() > 1:
            dist.broadcast(counts, group_src=pp.size() - 1, group=pp)
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
        return counts


def _inverse(counts: Tensor) -> Tensor:
    """1 / count in fp32, and 0 where nothing counts."""
    return torch.where(counts != 0, 1.0 / torch.where(counts != 0, counts, 1.0), 0.0).float()


def unwrap(chunk: Any) -> Any:
    """The chunk inside of megatron-core's wrappers."""
    while isinstance(chunk, (core.DistributedDataParallel, core.Float16Module)):
        chunk = chunk.module
    return chunk
