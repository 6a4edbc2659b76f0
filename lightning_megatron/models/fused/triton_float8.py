# ruff: noqa: N803  (Triton: constants in capitals, and everything is positional)
# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that write FP8: casts beside what is computed anyway, and the scales they use.

Each raises the largest magnitude it saw by an atomic maximum, from which later scales come, so that no tensor is read
only to be measured. Signatures and meaning as in :mod:`~lightning_megatron.models.fused.float8_reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_megatron.models.fused.triton_tiles import _NAMES, _activate, _derivative, _joined
from lightning_megatron.models.fused.types import Activation, Cast, HeadLayout, Quantized, Rotary

_ROWS, _COLUMNS = 64, 64
"""A tile written in both directions: 64 bytes in a piece, two sectors of memory, either way."""
_WARPS = 8
_STEP = 4096
"""Elements a program of the flat kernels takes at once."""
_TOP = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
"""Exponent of each format's largest number, which is 1.75 times that power of two."""


def largest_of(cast: Cast | None) -> float:
    """The largest number of the format, for kernels: 0 is no cast."""
    return 0.0 if cast is None else 1.75 * 2.0 ** _TOP[cast.dtype]


@triton.jit
def scaled(values, scale, amax, LIMIT: tl.constexpr):
    """``values * scale`` within the format, their largest magnitude kept in ``amax``; what is not a number stays so."""
    largest = tl.max(tl.abs(values))
    # Most programs see a larger one there already, and need not queue at one address.
    tl.atomic_max(amax, largest, mask=largest > tl.load(amax), sem="relaxed")
    values = values * tl.load(scale)
    values = tl.maximum(values, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(values, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exponent(largest, TOP):
    """Of the largest power of two that keeps ``largest`` within the format; 0 of zero and of what is not finite."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    over = ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # more than 1.75 times its power of two
    result = tl.minimum(tl.maximum(TOP - exponent - over, -64), 64)
    return tl.where((bits == 0) | (exponent == 128), 0, result)


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


# ------------------------------------------------------------------------------------------------------------ scales


@triton.jit
def _next_scales(
    amax, history, position, scales, length, gradients_top,
    SLOTS: tl.constexpr, ACTIVATIONS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, SLOTS)
    here = tl.load(position)
    largest = tl.load(amax + slot * PAD)
    tl.store(history + here * SLOTS + slot, largest)
    tl.store(amax + slot * PAD, tl.zeros([SLOTS], tl.float32))
    for index in range(0, length):
        past = tl.load(history + index * SLOTS + slot)
        largest = tl.where(index == here, largest, tl.maximum(largest, past))
    exponent = _exponent(largest, tl.where(slot < ACTIVATIONS, 8, gradients_top))
    tl.store(scales + slot * PAD, _power(exponent))
    tl.store(scales + (SLOTS + slot) * PAD, _power(-exponent))
    tl.store(position, (here + 1) % length)


def next_scales(amax: Tensor, history: Tensor, position: Tensor, activations: int, gradients: torch.dtype) -> Tensor:
    scales = torch.empty(2, *amax.shape, device=amax.device)
    # One warp: all its threads have read the position before one writes it.
    _next_scales[(1,)](
        amax, history, position, scales, len(history), _TOP[gradients],
        SLOTS=amax.size(0), ACTIVATIONS=activations, PAD=amax.size(1), num_warps=1,
    )  # fmt: skip
    return scales


@triton.jit
def _measure(x, measured, size, STEP: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * STEP
    largest = tl.zeros([STEP], tl.float32)
    for start in range(first, size, tl.num_programs(0) * STEP):
        where = start + tl.arange(0, STEP)
        largest = tl.maximum(largest, tl.abs(tl.load(x + where, mask=where < size, other=0.0).to(tl.float32)))
    top = tl.max(largest)
    tl.atomic_max(measured, top, mask=top > tl.load(measured), sem="relaxed")


def measure(x: Tensor, measured: Tensor) -> None:
    _measure[(_programs(x),)](x, measured, x.numel(), STEP=_STEP, num_warps=_WARPS)


def _programs(x: Tensor) -> int:
    wanted = triton.cdiv(x.numel(), _STEP)
    if x.device.type != "cuda":  # interpreted
        return min(wanted, 4)
    return min(wanted, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count)


# ------------------------------------------------------------------------------------------------------------- casts


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of each element of this program's tile, and whether it exists."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def _store(small, eight, beside, row, column, inside, rows, stride, BESIDE: tl.constexpr):
    """One tile that is in FP8, and beside it nothing (not 1) or the same transposed (1).

    The transpose reads back what the program has stored, from the nearest cache, and never converts: of a conversion's
    result that is stored in both directions, ptxas 12.8, which Triton 3.6 brings, may read the register for the second
    one before the conversion has written it.
    """
    tl.store(eight + row * stride + column, small, mask=inside)
    if BESIDE == 1:
        tl.debug_barrier()
        tl.store(beside + column * rows + row, tl.load(eight + row * stride + column, mask=inside), mask=inside)


@triton.jit
def _write(
    result, eight, beside, scale, amax, row, column, inside, rows, stride, LIMIT: tl.constexpr, BESIDE: tl.constexpr
):
    """One tile in FP8, and beside it nothing (0), the same transposed (1) or unscaled values (2)."""
    if BESIDE == 2:
        tl.store(beside + row * stride + column, result.to(beside.dtype.element_ty), mask=inside)
    small = scaled(result, scale, amax, LIMIT).to(eight.dtype.element_ty)
    _store(small, eight, beside, row, column, inside, rows, stride, BESIDE)


def _outputs(x: Tensor, rows: int, width: int, cast: Cast) -> tuple[Quantized, Tensor, int]:
    """Empty results, and what the kernels call ``beside`` and ``BESIDE``."""
    eight = x.new_empty(rows, width, dtype=cast.dtype)
    columns = x.new_empty(width, rows, dtype=cast.dtype) if cast.beside == "columns" else None
    values = x.new_empty(rows, width) if cast.beside == "values" else None
    result = Quantized(eight, columns, values, cast.inverse)
    if columns is not None:
        return result, columns, 1
    return (result, eight, 0) if values is None else (result, values, 2)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS)


@triton.jit
def _quantize(
    x, eight, beside, scale, inverse, amax, measured, rows, width,
    DYNAMIC: tl.constexpr, TOP: tl.constexpr, LIMIT: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if DYNAMIC:
        exponent = _exponent(tl.load(measured), TOP)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scale, _power(exponent))
            tl.store(inverse, _power(-exponent))
            largest = tl.load(measured)
            tl.atomic_max(amax, largest, mask=largest > tl.load(amax), sem="relaxed")
        values = values * _power(exponent)
        values = tl.maximum(values, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        small = tl.minimum(values, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(eight.dtype.element_ty)
        _store(small, eight, beside, row, column, inside, rows, width, BESIDE)
    else:
        _write(values, eight, beside, scale, amax, row, column, inside, rows, width, LIMIT, BESIDE)


def quantize(x: Tensor, cast: Cast, into: Quantized | None = None) -> Quantized:
    rows, width = x.shape
    measured = cast.scale
    if cast.dynamic:
        measured = torch.zeros((), device=x.device)
        measure(x, measured)
    if into is None:
        columns = x.new_empty(width, rows, dtype=cast.dtype) if cast.beside == "columns" else None
        values = x if cast.beside == "values" else None
        into = Quantized(x.new_empty(rows, width, dtype=cast.dtype), columns, values, cast.inverse)
    _quantize[_grid(rows, width)](
        x, into.rows, into.rows if into.columns is None else into.columns, cast.scale, cast.inverse, cast.amax,
        measured, rows, width, DYNAMIC=cast.dynamic, TOP=_TOP[cast.dtype], LIMIT=largest_of(cast),
        BESIDE=int(into.columns is not None), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return into


@triton.jit
def _transpose(x, y, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    tl.store(y + column * rows + row, tl.load(x + row * width + column, mask=inside), mask=inside)


def transpose(x: Tensor) -> Tensor:
    rows, width = x.shape
    y = x.new_empty(width, rows)
    _transpose[_grid(rows, width)](
        x.view(torch.int8), y.view(torch.int8), rows, width, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS
    )
    return y


@triton.jit
def _activation_forward(
    x, eight, beside, scale, amax, rows, width,
    NAME: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    stride = 2 * width if GATED else width
    result = _activate(tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32), NAME)
    if GATED:
        result *= tl.load(x + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    _write(result, eight, beside, scale, amax, row, column, inside, rows, width, LIMIT, BESIDE)


def activation_forward(x: Tensor, activation: Activation, cast: Cast) -> Quantized:
    rows, width = len(x), x.size(1) // (2 if activation.gated else 1)
    result, beside, which = _outputs(x, rows, width, cast)
    _activation_forward[_grid(rows, width)](
        x, result.rows, beside, cast.scale, cast.amax, rows, width,
        NAME=_NAMES[activation.name], GATED=activation.gated, LIMIT=largest_of(cast), BESIDE=which, ROWS=_ROWS,
        COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return result


@triton.jit
def _activation_backward(
    dy, x, eight, beside, sums, scale, amax, rows, width,
    NAME: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr, LIMIT: tl.constexpr, BESIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, width, ROWS, COLUMNS)
    stride = 2 * width if GATED else width
    gradient = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    result = gradient * _derivative(values, NAME)
    total = sums + tl.program_id(0) * stride + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS) < width
    if GATED:
        up = gradient * _activate(values, NAME)
        result *= tl.load(x + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
        _write(up, eight, beside, scale, amax, row, column + width, inside, rows, stride, LIMIT, BESIDE)
        if SUMS:
            tl.store(total + width, tl.sum(up, 0), mask=here)
    _write(result, eight, beside, scale, amax, row, column, inside, rows, stride, LIMIT, BESIDE)
    if SUMS:
        tl.store(total, tl.sum(result, 0), mask=here)


def activation_backward(
    dy: Tensor, x: Tensor, activation: Activation, cast: Cast, with_sums: bool
) -> tuple[Quantized, Tensor | None]:
    rows, width = dy.shape
    result, beside, which = _outputs(x, rows, x.size(1), cast)
    grid = _grid(rows, width)
    sums = torch.empty(1, grid[0], x.size(1), device=x.device) if with_sums else None
    _activation_backward[grid](
        dy, x, result.rows, beside, cast.scale if sums is None else sums, cast.scale, cast.amax, rows, width,
        NAME=_NAMES[activation.name], GATED=activation.gated, SUMS=with_sums, LIMIT=largest_of(cast), BESIDE=which,
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
    return result, sums


@triton.jit
def _join_heads(
    dq, dk, dv, eight, beside, sums, cos, sin, scale, amax,
    q_sequence, q_batch, q_head, k_sequence, k_batch, k_head, v_sequence, v_batch, v_head,
    rows, batch, groups, width, turned,
    PER_GROUP: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, SUMS: tl.constexpr,
    LIMIT: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    group = head // (PER_GROUP + 2)
    index = head % (PER_GROUP + 2)
    channel = tl.arange(0, WIDTH)[None, :]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    if index == PER_GROUP + 1:
        result = _joined(dv, v_sequence, v_batch, v_head, group, row, batch, rows, channel, width, cos, sin, turned,
                         False, INTERLEAVED)  # fmt: skip
    elif index == PER_GROUP:
        result = _joined(dk, k_sequence, k_batch, k_head, group, row, batch, rows, channel, width, cos, sin, turned,
                         ROTARY, INTERLEAVED)  # fmt: skip
    else:
        result = _joined(dq, q_sequence, q_batch, q_head, group * PER_GROUP + index, row, batch, rows, channel,
                         width, cos, sin, turned, ROTARY, INTERLEAVED)  # fmt: skip
    stride = groups * (PER_GROUP + 2) * width
    inside = (row < rows) & (channel < width)
    column = (head * width + channel).to(tl.int64)
    _write(result, eight, beside, scale, amax, row, column, inside, rows, stride, LIMIT, BESIDE)
    if SUMS:
        lane = tl.arange(0, WIDTH)
        tl.store(sums + tl.program_id(0) * stride + head * width + lane, tl.sum(result, 0), mask=lane < width)


def join_heads(
    dq: Tensor, dk: Tensor, dv: Tensor, heads: HeadLayout, rotary: Rotary | None, cast: Cast, with_sums: bool
) -> tuple[Quantized, Tensor | None]:
    dq, dk, dv = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq, dk, dv))
    columns = heads.groups * (heads.queries_per_group + 2) * heads.width
    result, beside, which = _outputs(dq, heads.tokens, columns, cast)
    chunks = triton.cdiv(heads.tokens, _ROWS)
    sums = torch.empty(1, chunks, columns, device=dq.device) if with_sums else None
    _join_heads[(chunks, heads.groups * (heads.queries_per_group + 2))](
        dq, dk, dv, result.rows, beside, cast.scale if sums is None else sums,
        *((cast.scale, cast.scale) if rotary is None else (rotary.cos, rotary.sin)), cast.scale, cast.amax,
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        heads.tokens, heads.batch, heads.groups, heads.width, 0 if rotary is None else rotary.width,
        PER_GROUP=heads.queries_per_group, ROTARY=rotary is not None,
        INTERLEAVED=rotary is not None and rotary.interleaved, SUMS=with_sums, LIMIT=largest_of(cast), BESIDE=which,
        ROWS=_ROWS, WIDTH=triton.next_power_of_2(heads.width), num_warps=_WARPS,
    )  # fmt: skip
    return result, sums


# ------------------------------------------------------------------------------- accumulation inside of a CUDA graph


@triton.jit
def _set_aside(gradient, kept, accumulate, size, STEP: tl.constexpr):
    if tl.load(accumulate) != 0:
        for start in range(tl.program_id(0).to(tl.int64) * STEP, size, tl.num_programs(0) * STEP):
            where = start + tl.arange(0, STEP)
            tl.store(kept + where, tl.load(gradient + where, mask=where < size), mask=where < size)


@triton.jit
def _add_back(gradient, kept, accumulate, size, STEP: tl.constexpr):
    if tl.load(accumulate) != 0:
        for start in range(tl.program_id(0).to(tl.int64) * STEP, size, tl.num_programs(0) * STEP):
            where = start + tl.arange(0, STEP)
            total = tl.load(gradient + where, mask=where < size) + tl.load(kept + where, mask=where < size)
            tl.store(gradient + where, total, mask=where < size)


def set_aside(gradient: Tensor, kept: Tensor, accumulate: Tensor) -> None:
    """Copy what a matrix product is about to overwrite, if ``accumulate`` (int32 on the device) is not zero."""
    _set_aside[(_programs(gradient),)](gradient, kept, accumulate, gradient.numel(), STEP=_STEP, num_warps=_WARPS)


def add_back(gradient: Tensor, kept: Tensor, accumulate: Tensor) -> None:
    """Add it again."""
    _add_back[(_programs(gradient),)](gradient, kept, accumulate, gradient.numel(), STEP=_STEP, num_warps=_WARPS)
