# mypy: disable-error-code="no-untyped-def,override"
"""The two halves of a layer as in :mod:`~lightning_megatron.models.fused.blocks`, with FP8 matrix products.

They are nodes of their own because they keep other things for the backward: inputs of products in FP8, by columns,
instead of the norms' outputs computed again and the activation's output in 16 bits. The residual stream, the inputs of
the norms, and what crosses ranks stay in 16 bits; with tensor parallelism an input is gathered and then cast.
"""

from __future__ import annotations

import torch

from lightning_megatron.models.fused import float8_ops, ops
from lightning_megatron.models.fused.blocks import LayerPlan
from lightning_megatron.models.fused.float8 import LayerCall, Slot, Weight
from lightning_megatron.models.fused.linear import column_gradients
from lightning_megatron.models.fused.types import Rotary


class Float8AttentionInput(torch.autograd.Function):
    """:class:`~lightning_megatron.models.fused.blocks.AttentionInput`; ``call`` holds the scales."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, angles, plan: LayerPlan, call: LayerCall):
        rows = x.view(-1, x.size(-1))
        cast = call.cast(Slot.ATTENTION_INPUT)
        if plan.keep_norm_outputs:  # tensor parallel
            kept, mean, rstd = ops.norm_forward(rows, norm_weight, norm_bias, plan.norm)
            y = float8_ops.quantize(plan.parallel.enter(kept), cast)
        else:
            kept = None
            y, mean, rstd = float8_ops.norm_forward(rows, norm_weight, norm_bias, plan.norm, cast)
        qkv = call.linear(y, Weight.QKV, bias)
        heads = plan.heads(len(qkv), x.size(1))
        rotary = None if angles is None else Rotary.of(angles, plan.rotary_interleaved)
        ctx.save_for_backward(x, mean, rstd, y.columns if call.keeps_columns else kept)
        ctx.parameters = (norm_weight, norm_bias, weight, bias)
        ctx.plan, ctx.heads, ctx.rotary, ctx.call = plan, heads, rotary, call
        return x, *ops.split_heads(qkv, heads, rotary)

    @staticmethod
    def backward(ctx, dresidual, dq, dk, dv):
        x, mean, rstd, y = ctx.saved_tensors
        norm_weight, norm_bias, weight, bias = ctx.parameters
        plan: LayerPlan = ctx.plan
        call: LayerCall = ctx.call
        parallel, slot = plan.parallel, Slot.ATTENTION_INPUT
        dqkv, bias_sums = float8_ops.join_heads(
            dq, dk, dv, ctx.heads, ctx.rotary, call.cast(Slot.QKV_GRADIENT), bias is not None
        )
        dy, work = parallel.start_leave(call.input_gradient(dqkv, Weight.QKV))
        dweight = None
        if y is not None:
            dweight = call.weight_gradient(dqkv, y if call.keeps_columns else parallel.enter(y), slot, weight)
        if work is not None:
            work.wait()
        residual = None if dresidual is None else dresidual.contiguous().view(dy.shape)
        dx, sums, again = ops.norm_backward(
            dy, x.view(dy.shape), norm_weight, norm_bias, mean, rstd, residual, plan.norm, y is None
        )
        if again is not None:
            dweight = call.weight_gradient(dqkv, again, slot, weight)
        dnorm_weight, dnorm_bias, _ = column_gradients(sums, [norm_weight, norm_bias, None])
        dbias = None if bias_sums is None or bias is None else column_gradients(bias_sums, [bias])[0]
        call.join()
        return dx.view(x.shape), dnorm_weight, dnorm_bias, dweight, dbias, None, None, None


class Float8AttentionOutputAndMLP(torch.autograd.Function):
    """:class:`~lightning_megatron.models.fused.blocks.AttentionOutputAndMLP`; ``call`` holds the scales."""

    @staticmethod
    def forward(
        ctx, residual, attention, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
        fc2_bias, seed, plan: LayerPlan, call: LayerCall,
    ):  # fmt: skip
        parallel = plan.parallel
        first, second = plan.hidden(seed, 0), plan.hidden(seed, 1)
        attended = float8_ops.quantize(attention.reshape(-1, attention.size(-1)), call.cast(Slot.ATTENTION))
        projected = parallel.leave(call.linear(attended, Weight.PROJECTION, None))
        arguments = (residual, projected, proj_bias, first, norm_weight, norm_bias, plan.norm)
        cast = call.cast(Slot.MLP_INPUT)
        if plan.keep_norm_outputs:
            middle, kept, mean, rstd = ops.add_norm_forward(*arguments)
            y = float8_ops.quantize(parallel.enter(kept), cast)
        else:
            kept = None
            middle, y, mean, rstd = float8_ops.add_norm_forward(*arguments, cast)
        inner = call.linear(y, Weight.FC1, fc1_bias)
        active = float8_ops.activation_forward(inner, plan.activation, call.cast(Slot.ACTIVE))
        out = ops.add_forward(middle, parallel.leave(call.linear(active, Weight.FC2, None)), fc2_bias, second)
        if call.keeps_columns:
            inputs = attended.columns, y.columns, active.columns
        else:
            inputs = attended.values, kept, active.values
        ctx.save_for_backward(middle, mean, rstd, inner, *inputs)
        ctx.parameters = (
            proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
        )  # fmt: skip
        ctx.plan, ctx.call, ctx.dropouts, ctx.attention_shape = plan, call, (first, second), attention.shape
        return out

    @staticmethod
    def backward(ctx, dout):
        middle, mean, rstd, inner, attention, y, active = ctx.saved_tensors
        proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = ctx.parameters
        plan: LayerPlan = ctx.plan
        call: LayerCall = ctx.call
        parallel = plan.parallel
        first, second = ctx.dropouts
        dout = dout.contiguous().view(-1, dout.size(-1))

        dbias2 = None
        dadded = dout
        if fc2_bias is not None or second.probability:
            dadded, sums = ops.add_backward(dout, second)
            dbias2 = column_gradients(sums, [fc2_bias])[0]
        dmlp = float8_ops.quantize(parallel.enter(dadded), call.cast(Slot.MLP_GRADIENT))
        dactive = call.input_gradient(dmlp, Weight.FC2)
        dweight2 = call.weight_gradient(dmlp, active, Slot.ACTIVE, fc2_weight)
        dinner, bias_sums = float8_ops.activation_backward(
            dactive, inner, plan.activation, call.cast(Slot.INNER_GRADIENT), fc1_bias is not None
        )
        dbias1 = None if bias_sums is None or fc1_bias is None else column_gradients(bias_sums, [fc1_bias])[0]
        dy, work = parallel.start_leave(call.input_gradient(dinner, Weight.FC1))
        dweight1 = None
        if y is not None:
            columns = y if call.keeps_columns else parallel.enter(y)
            dweight1 = call.weight_gradient(dinner, columns, Slot.MLP_INPUT, fc1_weight)
        if work is not None:
            work.wait()
        dmiddle, sums, again = ops.norm_backward(
            dy, middle.view(dy.shape), norm_weight, norm_bias, mean, rstd, dout, plan.norm, y is None
        )
        if again is not None:
            dweight1 = call.weight_gradient(dinner, again, Slot.MLP_INPUT, fc1_weight)

        # Without dropout, the column sums that the norm's backward added up are the projection's bias gradient.
        direct_bias = None if first.probability else proj_bias
        dnorm_weight, dnorm_bias, dproj_bias = column_gradients(sums, [norm_weight, norm_bias, direct_bias])
        dadded = dmiddle
        if first.probability:
            dadded, sums = ops.add_backward(dmiddle, first)
            dproj_bias = column_gradients(sums, [proj_bias])[0]
        dprojected = float8_ops.quantize(parallel.enter(dadded), call.cast(Slot.PROJECTION_GRADIENT))
        dattention = call.input_gradient(dprojected, Weight.PROJECTION)
        dproj_weight = call.weight_gradient(dprojected, attention, Slot.ATTENTION, proj_weight)
        return (
            dmiddle.view(middle.shape), dattention.view(ctx.attention_shape), dproj_weight, dproj_bias, dnorm_weight,
            dnorm_bias, dweight1, dbias1, dweight2, dbias2, None, None, None,
        )  # fmt: skip
