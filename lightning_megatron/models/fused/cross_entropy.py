# mypy: disable-error-code="no-untyped-def,override"
"""Output layer and cross entropy in one autograd node, which never holds float32 logits.

The statistics of the softmax need one read of the 16-bit logits. The backward overwrites the logits by their gradient.
A batch whose logits would be large is processed in chunks of tokens that compute their logits again in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.models.fused import ops
from lightning_megatron.models.fused.linear import (
    Pending,
    TensorParallel,
    before_forward,
    column_gradients,
    main_grad_of,
    weight_gradient,
)

_CHUNK_BYTES = 2**29


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """This rank's part of the vocabulary."""

    first: int
    """Id of the token of this rank's first row."""
    real: int
    """Rows that are tokens; those after them are padding and take no part in the softmax."""
    parallel: TensorParallel
    keep_bytes: int
    """Logits up to this size are kept for the backward, which saves computing them twice."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, shard: VocabularyShard):
        parallel = shard.parallel
        rows = hidden.reshape(-1, hidden.size(-1))
        x = parallel.enter(rows)
        target = labels.reshape(-1) - shard.first
        keep = len(x) * len(weight) * x.element_size() <= shard.keep_bytes and weight.requires_grad
        chunk = len(x) if keep else max(1, _CHUNK_BYTES // (len(weight) * x.element_size()))
        kept, parts = [], []
        for first in range(0, len(x), chunk):
            logits = torch.nn.functional.linear(x[first : first + chunk], weight, bias)
            parts.append(torch.stack(ops.softmax_statistics(logits, target[first : first + chunk], shard.real)))
            if keep:
                kept.append(logits)
        maximum, total, chosen = torch.cat(parts, dim=1)
        if parallel.size > 1:
            highest = maximum.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=parallel.group)
            # A rank that holds nothing but padding has a maximum of -inf and a sum of 0.
            total = torch.where(total > 0, total * (maximum - highest).exp(), 0.0)
            both = torch.stack([total, chosen])
            dist.all_reduce(both, group=parallel.group)
            maximum, (total, chosen) = highest, both
        log_sum = maximum + total.log()
        ctx.save_for_backward(rows, target, log_sum, *kept)
        ctx.weight, ctx.bias, ctx.shard, ctx.chunk, ctx.shape = weight, bias, shard, chunk, hidden.shape
        return log_sum - chosen

    @staticmethod
    def backward(ctx, dloss):
        rows, target, log_sum, *kept = ctx.saved_tensors
        weight, bias, shard, chunk = ctx.weight, ctx.bias, ctx.shard, ctx.chunk
        # Kept logits need no tokens: the gather goes on beside the input gradient, and its sum beside the weight's.
        gathered = shard.parallel.start_gather(rows)
        if not kept:
            gathered.wait()
        x = gathered.result
        dx = torch.empty_like(x)
        leaving = Pending(dx, None)
        scale = dloss.float().contiguous()
        dweight = None
        bias_sum = None if bias is None else torch.zeros(len(weight), device=x.device)
        for index, first in enumerate(range(0, len(x), chunk)):
            part = slice(first, first + chunk)
            logits = kept[index] if kept else torch.nn.functional.linear(x[part], weight, bias)
            dlogits = ops.softmax_gradient_(logits, target[part], log_sum[part], scale[part], shard.real)
            torch.mm(dlogits, weight, out=dx[part])
            if first + chunk >= len(x):
                leaving = Pending(*shard.parallel.start_leave(dx))
            if bias_sum is not None:
                bias_sum += dlogits.sum(0, dtype=torch.float32)
            gathered.wait()
            update = weight_gradient(dlogits, x[part], weight)
            # With main_grad each call hands over the same kind of placeholder; without, the gradients add up.
            if dweight is None or update is None or main_grad_of(weight) is not None:
                dweight = update
            else:
                dweight = dweight + update
        dx = leaving.wait()
        dbias = None if bias_sum is None else column_gradients(bias_sum[None, None], [bias])[0]
        return dx.view(ctx.shape), dweight, dbias, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard, bias: Tensor | None = None
) -> Tensor:
    """Cross entropy of each token.

    Args:
        hidden: ``[sequence, batch, hidden]``, of this rank's part of the sequence under sequence parallelism
        weight: ``[vocabulary / ranks, hidden]``
        labels: ``[batch, sequence]`` token ids
        bias: ``[vocabulary / ranks]``

    Returns:
        ``[batch, sequence]``, float32
    """
    batch, sequence = labels.shape
    losses = _LinearCrossEntropy.apply(hidden, weight, bias, labels.t(), shard)
    return losses.view(sequence, batch).t().contiguous()


class FusedLoss:
    """An ``output_processor`` for megatron-core's ``GPTModel.forward``: the loss without the logits.

    Args:
        vocab_size: tokens, without the padding of the embedding.
        padded_vocab_size: rows of the embedding over all ranks.
        parallel: the tensor-parallel ranks.
        keep_bytes: see :class:`VocabularyShard`.
    """

    def __init__(
        self, vocab_size: int, padded_vocab_size: int, parallel: TensorParallel, keep_bytes: int = 4 * 2**30
    ) -> None:
        rows = padded_vocab_size // parallel.size
        first = rows * (parallel.group.rank() if parallel.group is not None else 0)
        self._shard = VocabularyShard(first, min(max(vocab_size - first, 0), rows), parallel, keep_bytes)

    def __call__(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, labels: Tensor, **_: Any
    ) -> Tensor:
        """Losses ``[batch, sequence]``; the arguments are megatron-core's."""
        before_forward([output_layer])
        weight = output_layer.weight if output_weight is None else output_weight
        return linear_cross_entropy(hidden_states, weight, labels, self._shard, output_layer.bias)
