"""Gradients of a fit: the buffers around its chunks, their reduction, and the tokens they are divided by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends import core
from lightning_megatron.optim.optimizer import MegatronOptimizer


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
        # Of the accumulation window's schedules so far, None before its first.
        self._tokens: Tensor | None = None
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
        config.finalize_model_grads_func = self._finalize
        config.no_sync_func = None
        if self._config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            # megatron-core takes one function for one chunk, and a list for several.
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the schedule of one batch, which adds to the buffers and, as the last of its window, ends them."""
        if self._tokens is None:
            self._zero()
        with self._without_reduction() if self._more_to_accumulate else nullcontext():
            yield

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
        """Reduce gradients and divide them by the tokens of the whole accumulation window, at its end."""
        if num_tokens is not None:
            num_tokens = num_tokens if self._tokens is None else num_tokens + self._tokens
        if self._more_to_accumulate:
            self._tokens = num_tokens
            return
        self._tokens = None
        if num_tokens is None or self._are_looked_at():
            core.finalize_model_grads(chunks, num_tokens, **kwargs)
            return
        core.finalize_model_grads(chunks, None, **kwargs)
        scale = 1.0 / self._over_all_ranks(num_tokens).clamp(min=1)
        assert self._optimizer is not None
        if not self._optimizer.scale_gradients(scale):
            for chunk in chunks:
                chunk.scale_gradients(scale)

    def _over_all_ranks(self, num_tokens: Tensor) -> Tensor:
        """Tokens of all replicas, on every rank, from those that the last pipeline stage has counted."""
        pp, dp_cp = self._groups.pp, self._groups.dp_cp
        if pp.size() > 1:
            dist.broadcast(num_tokens, group_src=pp.size() - 1, group=pp)
        if dp_cp.size() > 1:
            dist.all_reduce(num_tokens, group=dp_cp)
        return num_tokens


def unwrap(chunk: Any) -> Any:
    """The chunk inside of megatron-core's wrappers."""
    while isinstance(chunk, (core.DistributedDataParallel, core.Float16Module)):
        chunk = chunk.module
    return chunk
