"""What the kernels that write FP8 compute, in plain torch, as :mod:`~lightning_megatron.models.fused.reference` does.

Each is an operation of that module in float32 whose result is cast once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_megatron.models.fused import reference
from lightning_megatron.models.fused.types import Activation, Cast, Dropout, HeadLayout, Norm, Quantized, Rotary


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two that keeps ``amax`` within the format, between ``2**-64`` and ``2**64``.

    A power of two changes no mantissa, so a tensor rounds in the same way whoever else's values its scale comes from.
    1 where nothing is known: ``amax`` is zero or not finite.
    """
    _, exponent = torch.frexp(torch.finfo(dtype).max / amax.clamp(min=1e-30))  # of a mantissa in [0.5, 1)
    scale = (((exponent - 1).clamp(-64, 64) + 127) << 23).view(torch.float32)  # the exponent's bits: exact everywhere
    return scale.where((amax > 0) & amax.isfinite(), 1.0)


def next_scales(amax: Tensor, history: Tensor, position: Tensor, activations: int, gradients: torch.dtype) -> Tensor:
    """Delayed scaling (arXiv:2209.05433, section 4): the largest magnitudes of the last calls decide.

    Args:
        amax: ``[slots, pad]`` float32 of which column 0 counts; moved into the history and set to zero.
        history: ``[length, slots]``
        position: int32 ``[]``, the row of the history to overwrite; moved on.
        activations: the first slots, which are E4M3; those after them have the type ``gradients``.

    Returns:
        Scales and their inverses, ``[2, slots, pad]``, of which column 0 counts.
    """
    history[int(position)] = amax[:, 0]
    amax.zero_()
    position.copy_((position + 1) % len(history))
    largest = history.amax(0)
    scale = torch.cat(
        [scale_for(largest[:activations], torch.float8_e4m3fn), scale_for(largest[activations:], gradients)]
    )
    return torch.stack([scale, 1.0 / scale])[..., None].repeat(1, 1, amax.size(1))


def measure(x: Tensor, measured: Tensor) -> None:
    """Raise ``measured`` to the largest magnitude in ``x``."""
    measured.copy_(torch.maximum(measured, x.abs().max().float()))


def _cast(x: Tensor, cast: Cast) -> Tensor:
    measure(x, cast.amax)
    limit = torch.finfo(cast.dtype).max  # torch turns what is larger into infinity, or what is not a number
    return (x.float() * cast.scale).clamp(-limit, limit).to(cast.dtype)


def quantize(x: Tensor, cast: Cast, into: Quantized | None = None) -> Quantized:
    """``x`` in FP8, optionally into tensors that exist; a dynamic cast sets its scale first."""
    if cast.dynamic:
        measured = torch.zeros((), device=x.device)
        measure(x, measured)
        cast.scale.copy_(scale_for(measured, cast.dtype))
        cast.inverse.copy_(1.0 / cast.scale)
    rows = _cast(x, cast)
    if into is not None:
        into.rows.copy_(rows)
        if into.columns is not None:
            into.columns.copy_(rows.t())
        return into
    columns = transpose(rows) if cast.beside == "columns" else None
    return Quantized(rows, columns, x if cast.beside == "values" else None, cast.inverse)


def transpose(x: Tensor) -> Tensor:
    """``[rows, width]`` to ``[width, rows]``, moved."""
    return x.t().contiguous()


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, cast: Cast
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`reference.norm_forward` with an output in FP8."""
    y, mean, rstd = reference.norm_forward(x.float(), weight, bias, norm)
    return _cast(y, cast), mean, rstd


def add_norm_forward(
    residual: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    dropout: Dropout,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    cast: Cast,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`reference.add_norm_forward` with a norm's output in FP8."""
    added = reference.add_forward(residual, x, x_bias, dropout)
    return added, *norm_forward(added.view_as(x), weight, bias, norm, cast)


def activation_forward(x: Tensor, activation: Activation, cast: Cast) -> Quantized:
    """:func:`reference.activation_forward` with an output in FP8."""
    return _with_values(reference.activation_forward(x.float(), activation), x.dtype, cast)


def activation_backward(
    dy: Tensor, x: Tensor, activation: Activation, cast: Cast, with_sums: bool
) -> tuple[Quantized, Tensor | None]:
    """:func:`reference.activation_backward` with a gradient in FP8, and column sums if asked for."""
    dx, sums = reference.activation_backward(dy.float(), x.float(), activation)
    return _with_values(dx, x.dtype, cast), sums if with_sums else None


def join_heads(
    dq: Tensor, dk: Tensor, dv: Tensor, heads: HeadLayout, rotary: Rotary | None, cast: Cast, with_sums: bool
) -> tuple[Quantized, Tensor | None]:
    """:func:`reference.join_heads` with a gradient in FP8, and column sums if asked for."""
    dqkv, sums = reference.join_heads(dq.float(), dk.float(), dv.float(), heads, rotary)
    return _with_values(dqkv, dq.dtype, cast), sums if with_sums else None


def _with_values(x: Tensor, dtype: torch.dtype, cast: Cast) -> Quantized:
    rows = _cast(x, cast)
    columns = transpose(rows) if cast.beside == "columns" else None
    return Quantized(rows, columns, x.to(dtype) if cast.beside == "values" else None, cast.inverse)
