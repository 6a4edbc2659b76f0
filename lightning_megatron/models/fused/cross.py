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
        projected, more = parallel.start_product_leave(attention_rows, proj_weight.t()).addends()
        room, own = parallel.room(projected)
        middle, y, mean, rstd = ops.add_norm_forward(
            residual, projected, proj_bias, dropout, norm_weight, norm_bias, plan.norm, more=more, out=own
        )
        gathered, query = parallel.gather_product(y, weight.t(), bias, room)
        kept = parallel.kept(y, gathered) if plan.keep_norm_outputs else None
        ctx.save_for_backward(attention_rows, middle, mean, rstd, kept)
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
        gathered = None if y is None else parallel.start_gather_kept(y)
        total = parallel.start_product_leave(dquery, weight)
        dweight = None if gathered is None else weights.add(dquery, gathered.wait(), weight)
        dbias = None if bias is None else column_gradients(dquery.float().sum(0)[None, None], [bias])[0]
        dy, more = total.addends()
        room, own = parallel.room(dy)
        dmiddle = None if dmiddle is None else dmiddle.contiguous().view(dy.shape)
        dmiddle, sums, y_again = ops.norm_backward(
            dy,
            middle.view(dy.shape),
            norm_weight,
            norm_bias,
            mean,
            rstd,
            dmiddle,
            plan.norm,
            y is None,
            more=more,
            out=own,
        )
        if y_again is not None:
            dweight = weights.add(dquery, y_again, weight)
        dattention, dproj_weight, dproj_bias, dnorm_weight, dnorm_bias = projection_gradients(
            dmiddle, sums, (norm_weight, norm_bias), attention, (proj_weight, proj_bias), ctx.dropout, parallel, room
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
        # The same order as in other blocks: gather, input gradient, its sum over ranks beside the weight gradient.
        gathered = parallel.start_gather(rows)
        drows, work = parallel.start_leave(dboth.mm(weight))
        dweight = weights.add(dboth, gathered.wait(), weight)
        dbias = None if bias is None else column_gradients(dboth.float().sum(0)[None, None], [bias])[0]
        if work is not None:
            work.wait()
        return drows.view(ctx.shape), dweight, dbias, None
