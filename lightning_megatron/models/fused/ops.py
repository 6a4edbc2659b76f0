"""The operations between matrix products: Triton kernels on CUDA, plain torch elsewhere, with the same signatures."""

from __future__ import annotations

import os

from torch import Tensor

from lightning_megatron.models.fused import reference
from lightning_megatron.models.fused.types import Activation, Dropout, HeadLayout, Norm, Rotary

try:
    from lightning_megatron.models.fused import triton_rows, triton_tiles

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernels_run_on(tensor: Tensor) -> bool:
    """Whether tensors like this one go through the Triton kernels."""
    return HAVE_TRITON and (tensor.is_cuda or INTERPRETED)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.norm_forward`."""
    return (triton_rows if kernels_run_on(x) else reference).norm_forward(x, weight, bias, norm, out=out)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None,
    norm: Norm,
    with_output: bool,
    *,
    more: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`reference.norm_backward`."""
    module = triton_rows if kernels_run_on(x) else reference
    return module.norm_backward(dy, x, weight, bias, mean, rstd, dresidual, norm, with_output, more=more, out=out)


def add_forward(
    residual: Tensor, x: Tensor, bias: Tensor | None, dropout: Dropout, *, more: Tensor | None = None
) -> Tensor:
    """See :func:`reference.add_forward`."""
    return (triton_tiles if kernels_run_on(x) else reference).add_forward(residual, x, bias, dropout, more=more)


def add_norm_forward(
    residual: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    dropout: Dropout,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    *,
    more: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`reference.add_norm_forward`."""
    module = triton_rows if kernels_run_on(x) else reference
    return module.add_norm_forward(residual, x, x_bias, dropout, weight, bias, norm, more=more, out=out)


def add_backward(dy: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """See :func:`reference.add_backward`."""
    return (triton_tiles if kernels_run_on(dy) else reference).add_backward(dy, dropout)


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """``dropout(x)`` of ``[tokens, width]``, which is its own backward."""
    return add_backward(x, dropout)[0] if dropout.probability else x


def activation_forward(x: Tensor, activation: Activation) -> Tensor:
    """See :func:`reference.activation_forward`."""
    return (triton_tiles if kernels_run_on(x) else reference).activation_forward(x, activation)


def activation_backward(dy: Tensor, x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """See :func:`reference.activation_backward`."""
    return (triton_tiles if kernels_run_on(x) else reference).activation_backward(dy, x, activation)


def split_heads(qkv: Tensor, heads: HeadLayout, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.split_heads`. Without rotary embedding there is nothing to compute."""
    if rotary is not None and kernels_run_on(qkv):
        return triton_tiles.split_heads(qkv, heads, rotary)
    return reference.split_heads(qkv, heads, rotary)


def join_heads(dq: Tensor, dk: Tensor, dv: Tensor, heads: HeadLayout, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """See :func:`reference.join_heads`."""
    return (triton_tiles if kernels_run_on(dq) else reference).join_heads(dq, dk, dv, heads, rotary)


def softmax_statistics(logits: Tensor, target: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.softmax_statistics`."""
    return (triton_rows if kernels_run_on(logits) else reference).softmax_statistics(logits, target, columns)


def softmax_gradient_(logits: Tensor, target: Tensor, log_sum: Tensor, scale: Tensor, columns: int) -> Tensor:
    """See :func:`reference.softmax_gradient_`."""
    module = triton_rows if kernels_run_on(logits) else reference
    return module.softmax_gradient_(logits, target, log_sum, scale, columns)


def accumulate_sums(sums: Tensor, destinations: list[Tensor | None]) -> None:
    """See :func:`reference.accumulate_sums`."""
    (triton_tiles if kernels_run_on(sums) else reference).accumulate_sums(sums, destinations)
