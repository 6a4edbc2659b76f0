# mypy: disable-error-code="no-untyped-def,override"
"""The two halves of a Transformer layer around its core attention, each one autograd node with its own backward.

Between matrix products runs exactly one kernel. Kept for the backward, per token and hidden unit of a GPT-2 layer, are
28 bytes in 16 bit: the two inputs of the norms, query, key, value, the attention's output, and the MLP before and after
its activation. The outputs of the norms are computed again by the kernel of their backward, which reads the inputs
anyway; with tensor parallelism they are kept, so that the weight gradient can run beside the collective, and those of
two ranks gathered.

All activations are ``[tokens, width]`` with ``tokens = sequence * batch``, sequence outermost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_megatron.models.fused import ops
from lightning_megatron.models.fused.linear import TensorParallel, WeightGradients, column_gradients
from lightning_megatron.models.fused.types import Activation, Dropout, HeadLayout, Norm, Rotary


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What does not change from call to call."""

    norm: Norm
    activation: Activation
    groups: int
    """Query groups of this rank."""
    queries_per_group: int
    head_width: int
    parallel: TensorParallel
    rotary_interleaved: bool
    hidden_dropout: float
    inner_dropout: float
    """Of the MLP between its activation and its output, which T5 has."""
    keep_norm_outputs: bool

    def heads(self, tokens: int, batch: int) -> HeadLayout:
        """The layout of the projection's output for this many tokens."""
        return HeadLayout(tokens // batch, batch, self.groups, self.queries_per_group, self.head_width)

    def hidden(self, seed: Tensor | None, stream: int) -> Dropout:
        """A dropout of hidden states; ``seed=None`` drops nothing."""
        return Dropout(0.0 if seed is None else self.hidden_dropout, seed, stream)

    def inner(self, seed: Tensor | None) -> Dropout:
        """The dropout inside the MLP, whose width is split over ranks: each drops other units."""
        rank = 0 if self.parallel.group is None else self.parallel.group.rank()
        return Dropout(0.0 if seed is None else self.inner_dropout, seed, 3 + rank)


def projection_gradients(
    dmiddle: Tensor,
    sums: Tensor,
    norm: tuple[Tensor, Tensor | None],
    attention: Tensor,
    projection: tuple[Tensor, Tensor | None],
    dropout: Dropout,
    parallel: TensorParallel,
    room: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The backward of an attention's output projection, dropout and residual, before the norm that follows them.

    Args:
        dmiddle: gradient of the sum, ``[tokens, hidden]``
        sums: the column sums that the norm's backward added up
        norm: its weight and bias
        attention: what was projected, ``[tokens, width]``
        projection: its weight and bias
        room: for the tokens of all ranks, where ``dmiddle`` is already

    Returns:
        The gradients of the attention's output, and of the projection's and the norm's weight and bias.
    """
    weight, bias = projection
    # Without dropout, the column sums that the norm's backward added up are the projection's bias gradient.
    direct_bias = None if dropout.probability else bias
    dnorm_weight, dnorm_bias, dbias = column_gradients(sums, [*norm, direct_bias])
    dprojected = dmiddle
    if dropout.probability:
        dprojected, sums = ops.add_backward(dmiddle, dropout)
        dbias = column_gradients(sums, [bias])[0]
        room = None
    dprojected, dattention = parallel.gather_product(dprojected, weight, gathered=room)
    return dattention, WeightGradients().add(dprojected, attention, weight), dbias, dnorm_weight, dnorm_bias


class AttentionInput(torch.autograd.Function):
    """Norm, query-key-value projection, rotary embedding.

    Args: ``x`` ``[sequence, batch, hidden]``; weights; the angles or ``None``; the plan.
    Returns: ``x`` again, for the residual path, whose gradient the norm's backward then adds; and queries, keys and
    values ``[sequence, batch, heads, width]``.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, angles, plan: LayerPlan):
        rows = x.view(-1, x.size(-1))
        room, own = plan.parallel.room(rows)
        y, mean, rstd = ops.norm_forward(rows, norm_weight, norm_bias, plan.norm, out=own)
        gathered, qkv = plan.parallel.gather_product(y, weight.t(), bias, room)
        heads = plan.heads(len(qkv), x.size(1))
        rotary = None if angles is None else Rotary.of(angles, plan.rotary_interleaved)
        ctx.save_for_backward(x, mean, rstd, plan.parallel.kept(y, gathered) if plan.keep_norm_outputs else None)
        # Not through save_for_backward: parameters need their attributes, and no check against changes in place.
        ctx.parameters = (norm_weight, norm_bias, weight, bias)
        ctx.plan, ctx.heads, ctx.rotary = plan, heads, rotary
        return x, *ops.split_heads(qkv, heads, rotary)

    @staticmethod
    def backward(ctx, dresidual, dq, dk, dv):
        x, mean, rstd, y = ctx.saved_tensors
        norm_weight, norm_bias, weight, bias = ctx.parameters
        plan: LayerPlan = ctx.plan
        parallel = plan.parallel
        dqkv, bias_sums = ops.join_heads(dq, dk, dv, ctx.heads, ctx.rotary)
        # The gather goes on beside the input gradient, whose sum over ranks goes on beside the weight gradient.
        gathered = None if y is None else parallel.start_gather_kept(y)
        total = parallel.start_product_leave(dqkv, weight)
        weights = WeightGradients()
        dweight = None if gathered is None else weights.add(dqkv, gathered.wait(), weight)
        dy, more = total.addends()
        dx, sums, y_again = ops.norm_backward(
            dy,
            x.view(dy.shape),
            norm_weight,
            norm_bias,
            mean,
            rstd,
            None if dresidual is None else dresidual.contiguous().view(dy.shape),
            plan.norm,
            y is None,
            more=more,
        )
        if y_again is not None:
            dweight = weights.add(dqkv, y_again, weight)
        dnorm_weight, dnorm_bias, _ = column_gradients(sums, [norm_weight, norm_bias, None])
        dbias = None if bias is None else column_gradients(bias_sums, [bias])[0]
        weights.join()
        return dx.view(x.shape), dnorm_weight, dnorm_bias, dweight, dbias, None, None


class AttentionOutputAndMLP(torch.autograd.Function):
    """Output projection, dropout, residual, norm, MLP, dropout, residual.

    Args: ``residual`` ``[sequence, batch, hidden]``; the core attention's output ``[sequence, batch, width]``; weights;
    the seed of the dropouts or ``None``; the plan.
    Returns: ``[sequence, batch, hidden]``
    """

    @staticmethod
    def forward(
        ctx, residual, attention, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
        fc2_bias, seed, plan: LayerPlan,
    ):  # fmt: skip
        parallel = plan.parallel
        first, second, within = plan.hidden(seed, 0), plan.hidden(seed, 1), plan.inner(seed)
        attention_rows = attention.reshape(-1, attention.size(-1))
        projected, more = parallel.start_product_leave(attention_rows, proj_weight.t()).addends()
        room, own = parallel.room(projected)
        middle, y, mean, rstd = ops.add_norm_forward(
            residual, projected, proj_bias, first, norm_weight, norm_bias, plan.norm, more=more, out=own
        )
        gathered, inner = parallel.gather_product(y, fc1_weight.t(), fc1_bias, room)
        active = ops.drop(ops.activation_forward(inner, plan.activation), within)
        added, more = parallel.start_product_leave(active, fc2_weight.t()).addends()
        out = ops.add_forward(middle, added, fc2_bias, second, more=more)
        kept = parallel.kept(y, gathered) if plan.keep_norm_outputs else None
        ctx.save_for_backward(attention_rows, middle, mean, rstd, kept, inner, active)
        ctx.parameters = (
            proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
        )  # fmt: skip
        ctx.plan, ctx.dropouts, ctx.attention_shape = plan, (first, second, within), attention.shape
        return out

    @staticmethod
    def backward(ctx, dout):
        attention, middle, mean, rstd, y, inner, active = ctx.saved_tensors
        proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = ctx.parameters
        plan: LayerPlan = ctx.plan
        parallel = plan.parallel
        first, second, within = ctx.dropouts
        dout = dout.contiguous().view(-1, dout.size(-1))

        weights = WeightGradients()
        dbias2 = None
        dmlp = dout
        if fc2_bias is not None or second.probability:
            dmlp, sums = ops.add_backward(dout, second)
            dbias2 = column_gradients(sums, [fc2_bias])[0]
        dmlp, dactive = parallel.gather_product(dmlp, fc2_weight)
        dactive = ops.drop(dactive, within)
        dweight2 = weights.add(dmlp, active, fc2_weight)
        dinner, sums = ops.activation_backward(dactive, inner, plan.activation)
        dbias1 = None if fc1_bias is None else column_gradients(sums, [fc1_bias])[0]
        gathered = None if y is None else parallel.start_gather_kept(y)
        total = parallel.start_product_leave(dinner, fc1_weight)
        dweight1 = None if gathered is None else weights.add(dinner, gathered.wait(), fc1_weight)
        dy, more = total.addends()
        room, own = parallel.room(dy)
        dmiddle, sums, y_again = ops.norm_backward(
            dy,
            middle.view(dy.shape),
            norm_weight,
            norm_bias,
            mean,
            rstd,
            dout,
            plan.norm,
            y is None,
            more=more,
            out=own,
        )
        if y_again is not None:
            dweight1 = weights.add(dinner, y_again, fc1_weight)
        dattention, dproj_weight, dproj_bias, dnorm_weight, dnorm_bias = projection_gradients(
            dmiddle, sums, (norm_weight, norm_bias), attention, (proj_weight, proj_bias), first, parallel, room
        )
        return (
            dmiddle.view(middle.shape), dattention.view(ctx.attention_shape), dproj_weight, dproj_bias, dnorm_weight,
            dnorm_bias, dweight1, dbias1, dweight2, dbias2, None, None,
        )  # fmt: skip
