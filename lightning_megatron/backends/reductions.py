"""megatron-core's DistributedDataParallel for parameters that are frozen during a fit, and batches that break off.

It learns in the first batch which parameters of a bucket get a gradient, and reduces the bucket when all of them have
one. It knows no parameter that is frozen later. What is set and overridden here is not public;
``tests/backends/test_reductions.py`` fails when an upgrade moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends import core


class DistributedDataParallel(core.DistributedDataParallel):
    """megatron-core's, whose forward waits for gathered weights that are frozen now, too, instead of asserting."""

    def _make_forward_pre_hook(self) -> Callable[..., None]:
        asserting = super()._make_forward_pre_hook()

        def hook(module: torch.nn.Module, *unused: Any) -> None:
            frozen = [p for p in module.parameters(recurse=False) if not p.requires_grad]
            for parameter in frozen:
                parameter.requires_grad_(True)
            try:
                asserting(module, *unused)
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)

        return hook


def expect(chunks: Collection[Any], frozen: Collection[Tensor]) -> None:
    """From the next batch on, wait for the gradients of all parameters but those in ``frozen`` (compared by identity).

    Buckets are reduced at the end of that batch's backward, as in the first batch of a fit.
    """
    left_out = {id(parameter) for parameter in frozen}
    for group in _bucket_groups(chunks):
        group.params = {parameter for parameter in group.param_to_bucket if id(parameter) not in left_out}
        _learn_again(group)


def abandon(chunks: Collection[Any]) -> None:
    """Forget what a batch has begun whose backward did not end."""
    for group in _bucket_groups(chunks):
        if group.grad_reduce_handle is not None:
            group.grad_reduce_handle = None
        group.is_last_microbatch = True
        _learn_again(group)


def _learn_again(group: Any) -> None:
    group.is_first_batch = True
    group.golden_per_param_grad_ready_counts = {}
    group.per_param_grad_ready_counts = {}


def _bucket_groups(chunks: Collection[Any]) -> Iterator[Any]:
    for chunk in chunks:
        yield from (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
