# ruff: noqa: N803  (Triton: constants in capitals, and everything is positional)
# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that work on whole rows: norms, and the statistics and gradient of the softmax.

Signatures and meaning as in :mod:`~lightning_megatron.models.fused.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_megatron.models.fused.triton_float8 import largest_of, scaled
from lightning_megatron.models.fused.types import Cast, Dropout, Norm

_BACKWARD_ROWS = 2
"""Rows that the norm's backward holds at once: enough loads in flight, at few sums to write."""


def _block(width: int) -> tuple[int, int]:
    """Columns a program holds at once, and its warps: 8 elements of 16 bit, 16 bytes, for each thread and load."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 256, 1), 16)


def _backward_warps(block: int) -> int:
    """Warps of the norm's backward, such that a thread holds 16 elements of two rows: others took up to 4 times as long
    (285 instead of 75 us for 16384 rows of 1024 on an H100)."""
    return 4 if block <= 1024 else 8 if block <= 2048 else _block(block)[1]


def _programs(rows: int, block: int, device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return min(rows, 4)
    each = 32 // _backward_warps(block) if block <= 2048 else 4
    return min(rows, each * torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _norm_forward(
    x, weight, bias, y, mean, rstd, scale, amax, width, eps,
    RMS: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    average = 0.0
    if not RMS:
        average = tl.sum(values, 0) / width
    centred = tl.where(inside, values - average, 0.0)
    reciprocal = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    result = centred * reciprocal * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if LIMIT > 0:
        result = scaled(result, scale, amax, LIMIT)
    tl.store(y + row * width + columns, result.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, average)
    tl.store(rstd + row, reciprocal)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, cast: Cast | None = None, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``cast`` makes the output FP8."""
    rows, width = x.shape
    y = torch.empty_like(x, dtype=x.dtype if cast is None else cast.dtype) if out is None else out
    mean, rstd = torch.empty(2, rows, device=x.device).unbind()
    block, warps = _block(width)
    _norm_forward[(rows,)](
        x, weight, weight if bias is None else bias, y, mean, rstd, *((mean, mean) if cast is None else (cast.scale,
        cast.amax)), width, norm.eps, RMS=norm.rms, BIAS=bias is not None, LIMIT=largest_of(cast), BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return y, mean, rstd


@triton.jit
def _add_norm_forward(
    residual, x, more, x_bias, seed, stream, probability, weight, bias, added, y, mean, rstd, scale, amax, width, eps,
    MORE: tl.constexpr, X_BIAS: tl.constexpr, DROPOUT: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    offsets = row * width + columns
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if MORE:
        values += tl.load(more + offsets, mask=inside, other=0.0).to(tl.float32)
    if X_BIAS:
        values += tl.load(x_bias + columns, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = tl.rand(tl.load(seed) + stream, offsets) >= probability
        values = tl.where(keep, values / (1.0 - probability), 0.0)
    values += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    rounded = values.to(added.dtype.element_ty)
    tl.store(added + offsets, rounded, mask=inside)
    values = rounded.to(tl.float32)
    average = 0.0
    if not RMS:
        average = tl.sum(values, 0) / width
    centred = tl.where(inside, values - average, 0.0)
    reciprocal = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    result = centred * reciprocal * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if LIMIT > 0:
        result = scaled(result, scale, amax, LIMIT)
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, average)
    tl.store(rstd + row, reciprocal)


def add_norm_forward(
    residual: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    dropout: Dropout,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    cast: Cast | None = None,
    *,
    more: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``cast`` makes the norm's output FP8."""
    rows, width = x.shape
    added = torch.empty_like(residual)
    y = torch.empty_like(x, dtype=x.dtype if cast is None else cast.dtype) if out is None else out
    mean, rstd = torch.empty(2, rows, device=x.device).unbind()
    block, warps = _block(width)
    _add_norm_forward[(rows,)](
        residual, x, x if more is None else more, x if x_bias is None else x_bias,
        x if dropout.seed is None else dropout.seed, dropout.stream, dropout.probability, weight,
        weight if bias is None else bias, added, y, mean, rstd,
        *((mean, mean) if cast is None else (cast.scale, cast.amax)), width, norm.eps, MORE=more is not None,
        X_BIAS=x_bias is not None, DROPOUT=dropout.probability > 0, RMS=norm.rms, BIAS=bias is not None,
        LIMIT=largest_of(cast), BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return added, y, mean, rstd


@triton.jit
def _norm_backward(
    dy, more, x, weight, bias, mean, rstd, dresidual, dx, y, sums, rows, width, rows_per_program,
    MORE: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OUTPUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gamma = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    beta = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        beta = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    # Sums over rows are kept apart by row where the registers suffice, which they do without a bias.
    dbeta = tl.zeros([BLOCK], tl.float32)
    if RMS:
        dgamma = tl.zeros([ROWS, BLOCK], tl.float32)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
    else:
        dgamma = tl.zeros([BLOCK], tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
    first = program.to(tl.int64) * rows_per_program
    for step in range(0, rows_per_program, ROWS):
        row = first + step + tl.arange(0, ROWS)
        here = (row < rows) & (row < first + rows_per_program)
        live = here[:, None] & inside[None, :]
        offsets = row[:, None] * width + columns[None, :]
        values = tl.load(x + offsets, mask=live, other=0.0).to(tl.float32)
        gradient = tl.load(dy + offsets, mask=live, other=0.0).to(tl.float32)
        if MORE:
            gradient += tl.load(more + offsets, mask=live, other=0.0).to(tl.float32)
        reciprocal = tl.load(rstd + row, mask=here, other=0.0)[:, None]
        if RMS:
            normalised = values * reciprocal
        else:
            average = tl.load(mean + row, mask=here, other=0.0)[:, None]
            normalised = tl.where(inside[None, :], (values - average) * reciprocal, 0.0)
        scaled = gradient * gamma[None, :]
        result = scaled - normalised * (tl.sum(scaled * normalised, 1) / width)[:, None]
        if not RMS:
            result -= (tl.sum(scaled, 1) / width)[:, None]
        result *= reciprocal
        if RESIDUAL:
            result += tl.load(dresidual + offsets, mask=live, other=0.0).to(tl.float32)
        rounded = tl.where(live, result, 0.0).to(dx.dtype.element_ty)
        tl.store(dx + offsets, rounded, mask=live)
        if OUTPUT:
            again = normalised * gamma[None, :] + beta[None, :]
            tl.store(y + offsets, again.to(y.dtype.element_ty), mask=live)
        if RMS:
            dgamma += gradient * normalised
            total += rounded.to(tl.float32)
        else:
            dgamma += tl.sum(gradient * normalised, 0)
            dbeta += tl.sum(gradient, 0)
            total += tl.sum(rounded.to(tl.float32), 0)
    if RMS:
        dgamma = tl.sum(dgamma, 0)
        total = tl.sum(total, 0)
    stride = tl.num_programs(0) * width
    where = sums + program * width + columns
    tl.store(where, dgamma, mask=inside)
    tl.store(where + stride, dbeta, mask=inside)
    tl.store(where + 2 * stride, total, mask=inside)


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
    rows, width = x.shape
    dx = torch.empty_like(x) if out is None else out
    y = torch.empty_like(x) if with_output else None
    block, _ = _block(width)
    programs = _programs(rows, block, x.device)
    sums = torch.empty(3, programs, width, device=x.device)
    at_once = _BACKWARD_ROWS if block <= 2048 else 1
    _norm_backward[(programs,)](
        dy, dy if more is None else more, x, weight, weight if bias is None else bias, mean, rstd,
        dy if dresidual is None else dresidual, dx, dx if y is None else y, sums, rows, width,
        triton.cdiv(rows, programs), MORE=more is not None, RMS=norm.rms, BIAS=bias is not None,
        RESIDUAL=dresidual is not None, OUTPUT=with_output, ROWS=at_once, BLOCK=block, num_warps=_backward_warps(block),
    )  # fmt: skip
    return dx, sums, y


@triton.jit
def _softmax_statistics(logits, target, maximum, total, chosen, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    offsets = tl.arange(0, BLOCK)
    # Online softmax (arXiv:1805.02867), per lane; the lanes are joined at the end.
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        values = tl.load(start + first + offsets, mask=first + offsets < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, values)
        # A lane that has seen nothing yet holds -inf, whose difference to itself is not a number.
        known = tl.where(higher == float("-inf"), 0.0, higher)
        summed = summed * tl.exp(highest - known) + tl.exp(values - known)
        highest = higher
    top = tl.max(highest, 0)
    tl.store(maximum + row, top)
    tl.store(total + row, tl.sum(summed * tl.exp(highest - top), 0))
    wanted = tl.load(target + row)
    here = (wanted >= 0) & (wanted < columns)
    tl.store(chosen + row, tl.load(start + wanted, mask=here, other=0.0).to(tl.float32))


def softmax_statistics(logits: Tensor, target: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(logits)
    maximum, total, chosen = torch.empty(3, rows, device=logits.device).unbind()
    _softmax_statistics[(rows,)](
        logits, target, maximum, total, chosen, columns, logits.stride(0), BLOCK=4096, num_warps=8
    )
    return maximum, total, chosen


@triton.jit
def _softmax_gradient(logits, target, log_sum, scale, columns, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    where = logits + row * stride + offsets
    values = tl.load(where, mask=offsets < columns, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(values - tl.load(log_sum + row))
    gradient = tl.where(offsets == tl.load(target + row), gradient - 1.0, gradient) * tl.load(scale + row)
    gradient = tl.where(offsets < columns, gradient, 0.0)
    tl.store(where, gradient.to(logits.dtype.element_ty), mask=offsets < width)


def softmax_gradient_(logits: Tensor, target: Tensor, log_sum: Tensor, scale: Tensor, columns: int) -> Tensor:
    rows, width = logits.shape
    block = 4096
    _softmax_gradient[(rows, triton.cdiv(width, block))](
        logits, target, log_sum, scale, columns, width, logits.stride(0), BLOCK=block, num_warps=8
    )
    return logits
