# mypy: disable-error-code="no-untyped-def,override"
"""What a layer with cross attention has between its two attentions, each one autograd node with its own backward."""

from __future__ import annotations

import torch

from lightning_megatron.models.fused import ops
from lightning_megatron.models.fused.blocks import LayerPlan, projection_gradients
from lightning_megatron.models.fused.linear import WeightGradients, column_gradients


class AttentionOutputAndQuery(torch.autograd.Function):
    """Output projection of the self attention, dropout, residual, norm, query projection.

    Args: ``residual`` ``[sequence, batch, hidden]``; the self attention's output ``[sequence, batch, width]``; weights;
    the seed of the dropout or ``None``; the plan.
    Returns: the sum ``[sequence, batch, hidden]``, and queries ``[sequence, batch, heads, width]``.
    """

    @staticmethod
    def forward(
        ctx, residual, attention, proj_weight, proj_bias, norm_weight, norm_bias, weight, bias, seed, plan: LayerPlan
    ):
        parallel, dropout = plan.parallel, plan.hidden(seed, 2)
        attention_rows = attention.reshape(-1, attention.size(-1))
        projected = parallel.leave(torch.nn.functional.linear(attention_rows, proj_weight))
        middle, y, mean, rstd = ops.add_norm_forward(
            residual, projected, proj_bias, dropout, norm_weight, norm_bias, plan.norm
        )
        query = torch.nn.functional.linear(parallel.enter(y), weight, bias)
        ctx.save_for_backward(attention_rows, middle, mean, rstd, y if plan.keep_norm_outputs else None)
        ctx.parameters = (proj_weight, proj_bias, norm_weight, norm_bias, weight, bias)
        ctx.plan, ctx.dropout, ctx.attention_shape = plan, dropout, attention.shape
        return middle, query.view(-1, residual.size(1), plan.groups * plan.queries_per_group, plan.head_width)

    @staticmethod
    def backward(ctx, dmiddle, dquery):
        attention, middle, mean, rstd, y = ctx.saved_tensors
        proj_weight, proj_bias, norm_weight, norm_bias, weight, bias = ctx.parameters
        plan: LayerPlan = ctx.plan
        parallel, weights = plan.parallel, WeightGradients()
        dquery = dquery.reshape(-1, len(weight))
        dy, work = parallel.start_leave(dquery.mm(weight))
        dweight = None if y is None else weights.add(dquery, parallel.enter(y), weight)
        dbias = None if bias is None else column_gradients(dquery.float().sum(0)[None, None], [bias])[0]
        if work is not None:
            work.wait()
        dmiddle = None if dmiddle is None else dmiddle.contiguous().view(dy.shape)
        dmiddle, sums, y_again = ops.norm_backward(
            dy, middle.view(dy.shape), norm_weight, norm_bias, mean, rstd, dmiddle, plan.norm, y is None
        )
        if y_again is not None:
            dweight = weights.add(dquery, parallel.enter(y_again), weight)
        dattention, dproj_weight, dproj_bias, dnorm_weight, dnorm_bias = projection_gradients(
            dmiddle, sums, (norm_weight, norm_bias), attention, (proj_weight, proj_bias), ctx.dropout, parallel
        )
        return (
            dmiddle.view(middle.shape), dattention.view(ctx.attention_shape), dproj_weight, dproj_bias, dnorm_weight,
            dnorm_bias, dweight, dbias, None, None,
        )  # fmt: skip


class KeyValue(torch.autograd.Function):
    """Keys and values of what is attended to: ``[sequence, batch, heads, width]`` each, from ``[..., hidden]``.

    megatron-core projects each head's key and value side by side.
    """

    @staticmethod
    def forward(ctx, context, weight, bias, plan: LayerPlan):
        rows = context.reshape(-1, context.size(-1))
        both = torch.nn.functional.linear(plan.parallel.enter(rows), weight, bias)
        ctx.save_for_backward(rows)
        ctx.parameters, ctx.plan, ctx.shape = (weight, bias), plan, context.shape
        return both.view(-1, context.size(1), plan.groups, 2, plan.head_width).unbind(3)

    @staticmethod
    def backward(ctx, dkey, dvalue):
        (rows,) = ctx.saved_tensors
        weight, bias = ctx.parameters
        parallel, weights = ctx.plan.parallel, WeightGradients()
        dboth = torch.stack((dkey, dvalue), dim=3).view(-1, len(weight))
        drows, work = parallel.start_leave(dboth.mm(weight))
        dweight = weights.add(dboth, parallel.enter(rows), weight)
        dbias = None if bias is None else column_gradients(dboth.float().sum(0)[None, None], [bias])[0]
        if work is not None:
            work.wait()
        return drows.view(ctx.shape), dweight, dbias, None
