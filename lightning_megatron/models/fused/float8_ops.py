"""The operations that write FP8: Triton kernels on CUDA, plain torch elsewhere.

With a dynamic cast, which has to know a tensor before it can scale it, the 16-bit operation and then a cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_megatron.models.fused import float8_reference as reference
from lightning_megatron.models.fused import ops
from lightning_megatron.models.fused.ops import kernels_run_on
from lightning_megatron.models.fused.types import Activation, Cast, Dropout, HeadLayout, Norm, Quantized, Rotary

if ops.HAVE_TRITON:
    from lightning_megatron.models.fused import triton_float8, triton_rows


def next_scales(amax: Tensor, history: Tensor, position: Tensor, activations: int, gradients: torch.dtype) -> Tensor:
    """See :func:`float8_reference.next_scales`."""
    module = triton_float8 if kernels_run_on(amax) else reference
    return module.next_scales(amax, history, position, activations, gradients)


def quantize(x: Tensor, cast: Cast, into: Quantized | None = None) -> Quantized:
    """See :func:`float8_reference.quantize`."""
    return (triton_float8 if kernels_run_on(x) else reference).quantize(x.contiguous(), cast, into)


def transpose(x: Tensor) -> Tensor:
    """See :func:`float8_reference.transpose`."""
    return (triton_float8 if kernels_run_on(x) else reference).transpose(x)


def _of_rows(rows: Tensor, cast: Cast) -> Quantized:
    """A norm's output, which is never kept in 16 bits: the norm's backward computes it again."""
    return Quantized(rows, transpose(rows) if cast.beside == "columns" else None, None, cast.inverse)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, cast: Cast
) -> tuple[Quantized, Tensor, Tensor]:
    """See :func:`float8_reference.norm_forward`."""
    if cast.dynamic:
        y, mean, rstd = ops.norm_forward(x, weight, bias, norm)
        return quantize(y, cast), mean, rstd
    rows, mean, rstd = (triton_rows if kernels_run_on(x) else reference).norm_forward(x, weight, bias, norm, cast)
    return _of_rows(rows, cast), mean, rstd


def add_norm_forward(
    residual: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    dropout: Dropout,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    cast: Cast,
) -> tuple[Tensor, Quantized, Tensor, Tensor]:
    """See :func:`float8_reference.add_norm_forward`."""
    if cast.dynamic:
        added, y, mean, rstd = ops.add_norm_forward(residual, x, x_bias, dropout, weight, bias, norm)
        return added, quantize(y, cast), mean, rstd
    module = triton_rows if kernels_run_on(x) else reference
    added, rows, mean, rstd = module.add_norm_forward(residual, x, x_bias, dropout, weight, bias, norm, cast)
    return added, _of_rows(rows, cast), mean, rstd


def activation_forward(x: Tensor, activation: Activation, cast: Cast) -> Quantized:
    """See :func:`float8_reference.activation_forward`."""
    if cast.dynamic:
        return quantize(ops.activation_forward(x, activation), cast)
    return (triton_float8 if kernels_run_on(x) else reference).activation_forward(x, activation, cast)


def activation_backward(
    dy: Tensor, x: Tensor, activation: Activation, cast: Cast, with_sums: bool
) -> tuple[Quantized, Tensor | None]:
    """See :func:`float8_reference.activation_backward`."""
    if cast.dynamic:
        dx, sums = ops.activation_backward(dy, x, activation)
        return quantize(dx, cast), sums
    module = triton_float8 if kernels_run_on(x) else reference
    return module.activation_backward(dy, x, activation, cast, with_sums)


def join_heads(
    dq: Tensor, dk: Tensor, dv: Tensor, heads: HeadLayout, rotary: Rotary | None, cast: Cast, with_sums: bool
) -> tuple[Quantized, Tensor | None]:
    """See :func:`float8_reference.join_heads`."""
    if cast.dynamic:
        dqkv, sums = ops.join_heads(dq, dk, dv, heads, rotary)
        return quantize(dqkv, cast), sums
    module = triton_float8 if kernels_run_on(dq) else reference
    return module.join_heads(dq, dk, dv, heads, rotary, cast, with_sums)
