"""Attention with a position bias that many layers share, and whose gradient is summed over them in one buffer.

T5 adds one learned bias to the scores of all layers of a stack. Through autograd each layer would make a gradient of
all pairs of tokens. Here each layer's backward adds to one buffer, summed over the samples by the kernel that computes
it, and the first layer's input turns the buffer into the gradient of the table, once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_megatron.models.fused import bias_gradient

_HALF = (torch.bfloat16, torch.float16)


class BiasTable(Protocol):
    """What learns: a table of biases by distance."""

    weight: torch.nn.Parameter

    def rows(self, length: int) -> Tensor:
        """``[heads, 2 * length - 1]``, of the weight as it is now."""

    def weight_gradient(self, rows: Tensor) -> Tensor:
        """The gradient of the weight from that of :meth:`rows`."""


class SharedBias:
    """A bias of scores for sequences of one length, at a fixed address, and the sum of its gradient.

    Args:
        heads: of this rank.
        length: tokens of the sequences.
    """

    def __init__(self, heads: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = length
        # Kernels read rows of scores in pieces of 16 bytes.
        padded = -(-length // 8) * 8
        self.scores = torch.zeros(1, heads, length, padded, dtype=dtype, device=device)[..., :length]
        """``[1, heads, length, length]``"""
        self.gradient = torch.zeros(heads, length, 2 * length - 1, dtype=torch.float32, device=device)
        """Summed over samples and layers: of query ``q`` and key ``k`` in column ``k - q + length - 1``, so that the
        columns' sums are the gradient by distance."""
        place = torch.arange(length, device=device)
        self._columns = place[None, :] - place[:, None] + length - 1

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """What a recorded layer reads and writes."""
        return self.scores, self.gradient

    def fill(self, rows: Tensor) -> None:
        """Set the bias by distance, ``[heads, 2 * length - 1]``."""
        self.scores.copy_(rows.detach()[:, self._columns][None])

    def take_gradient(self) -> Tensor:
        """The gradient by distance ``[heads, 2 * length - 1]`` of all that was added since the last call."""
        rows = self.gradient.sum(1)
        self.gradient.zero_()
        return rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, table: BiasTable, bias: SharedBias) -> Tensor:
        ctx.table, ctx.bias = table, bias
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, ctx.table.weight_gradient(ctx.bias.take_gradient()), None, None


def gather_gradient(states: Tensor, table: BiasTable, bias: SharedBias) -> Tensor:
    """The input of the first layer that adds ``bias``, unchanged; its backward hands the gradient to the table."""
    return _Gather.apply(states, table.weight, table, bias)


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.leaf.grad is None:
            raise RuntimeError("The backward of the layers that add a position bias left no gradient for it.")
        return gradient, ctx.leaf.grad, None


def hand_on_gradient(states: Tensor, rows: Tensor, leaf: Tensor) -> Tensor:
    """The input of the first layer that adds ``leaf``, unchanged; its backward gives ``leaf.grad`` to ``rows``.

    The backward of the first layer's input runs after the attention of every layer has added its gradient to the leaf.
    """
    return _HandOn.apply(states, rows, leaf)


def usable(states: Tensor, head_size: int) -> bool:
    """Whether layers with hidden states like these can share a bias: on CUDA in cuDNN's kernels, on a CPU in torch."""
    if not states.is_cuda:
        return True
    able = torch.cuda.get_device_capability(states.device) >= (8, 0) and torch.backends.cuda.cudnn_sdp_enabled()
    return able and states.dtype in _HALF and head_size % 8 == 0 and head_size <= 128


def attend(query: Tensor, key: Tensor, value: Tensor, bias: SharedBias, rule: Rule) -> Tensor:
    """Attend ``[batch, heads, length, head_size]`` to keys and values of the same shape.

    Returns:
        The same shape; its memory is ``[sequence, batch, heads, head_size]`` on CUDA.
    """
    return _BiasedAttention.apply(query, key, value, bias, rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What attention does besides adding the bias."""

    causal: bool
    scale: float
    """Of the scores before the bias."""
    hidden: Tensor | None = None
    """``[batch, 1, 1, keys]``, ``True`` where a key is hidden."""


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: SharedBias, rule: Rule) -> Tensor:
        scores = _with_hidden(bias.scores, rule.hidden)
        out, *kept = (_cudnn_forward if query.is_cuda else _plain_forward)(query, key, value, scores, rule)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.bias, ctx.rule = bias, rule
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum, *kept = ctx.saved_tensors
        bias, rule = ctx.bias, ctx.rule
        scores = _with_hidden(bias.scores, rule.hidden)
        if not query.is_cuda:
            return (*_plain_backward(gradient, (query, key, value), scores, bias, rule), None, None)
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            gradient, query, key, value, out, log_sum, *kept[:2], scores.expand(len(query), -1, -1, -1), None, None,
            query.size(2), key.size(2), 0.0, rule.causal, scale=rule.scale,
        )  # fmt: skip
        attention = (query, key, value, out, gradient)
        bias_gradient.add(bias.gradient, bias.scores, attention, log_sum, rule.hidden, rule.scale, rule.causal)
        return (*gradients, None, None)


def _with_hidden(scores: Tensor, hidden: Tensor | None) -> Tensor:
    """``[1 or batch, heads, queries, keys]``, the lowest finite number where a key is hidden."""
    return scores if hidden is None else scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, rule: Rule) -> tuple[Tensor, ...]:
    out, log_sum, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, scores.expand(len(query), -1, -1, -1), True, 0.0, rule.causal, False, scale=rule.scale
    )
    return out, log_sum, seed, offset


def _probabilities(query: Tensor, key: Tensor, scores: Tensor, rule: Rule) -> Tensor:
    total = query.float() @ key.float().transpose(-1, -2) * rule.scale + scores.float()
    if rule.causal:
        total = total.masked_fill(torch.ones_like(total[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return total.softmax(-1)


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, rule: Rule) -> tuple[Tensor, ...]:
    out = (_probabilities(query, key, scores, rule) @ value.float()).to(query.dtype)
    return out, out.new_empty(0)


def _plain_backward(
    gradient: Tensor, inputs: tuple[Tensor, Tensor, Tensor], scores: Tensor, bias: SharedBias, rule: Rule
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value; adds that of the bias."""
    query, key, value = inputs
    weights, gradient = _probabilities(query, key, scores, rule), gradient.float()
    dweights = gradient @ value.float().transpose(-1, -2)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    bias.gradient.scatter_add_(2, bias._columns.expand(dscores.size(1), -1, -1), dscores.sum(0))
    dquery = dscores @ key.float() * rule.scale
    dkey = dscores.transpose(-1, -2) @ query.float() * rule.scale
    dvalue = weights.transpose(-1, -2) @ gradient
    return tuple(d.to(t.dtype) for d, t in zip((dquery, dkey, dvalue), inputs, strict=True))
