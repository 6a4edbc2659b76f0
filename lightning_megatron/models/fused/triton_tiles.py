# ruff: noqa: N803  (Triton: constants in capitals, and everything is positional)
# mypy: disable-error-code="no-untyped-def"
"""Triton kernels on tiles of rows and columns: everything between two matrix products that is not a norm.

Gradients that also need their column sums (a bias's gradient) add them up while they write, one partial sum for each
chunk of rows, instead of reading the gradient again. Signatures and meaning as in
:mod:`~lightning_megatron.models.fused.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_megatron.models.fused.types import Activation, Dropout, HeadLayout, Rotary

_ROWS, _COLUMNS = 16, 128
_CHUNK = 128
"""Rows whose column sums one program adds up."""
_NAMES = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3}


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == 0:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == 1:
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == 2:
        return x * _sigmoid(x)
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def _derivative(x, NAME: tl.constexpr):
    if NAME == 0:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == 1:
        tanh = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope
    elif NAME == 2:
        sigmoid = _sigmoid(x)
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        return tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def _activation_forward(
    x, y, rows, width, NAME: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    stride = 2 * width if GATED else width
    result = _activate(tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32), NAME)
    if GATED:
        result *= tl.load(x + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, result.to(y.dtype.element_ty), mask=inside)


def activation_forward(x: Tensor, activation: Activation) -> Tensor:
    rows, width = len(x), x.size(1) // (2 if activation.gated else 1)
    y = x.new_empty(rows, width)
    _activation_forward[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](
        x, y, rows, width, NAME=_NAMES[activation.name], GATED=activation.gated, ROWS=_ROWS, COLUMNS=_COLUMNS
    )
    return y


@triton.jit
def _activation_backward(
    dy, x, dx, sums, rows, width,
    NAME: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < width
    stride = 2 * width if GATED else width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, CHUNK, ROWS):
        row = (chunk * CHUNK + first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & here[None, :]
        gradient = tl.load(dy + row * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        where = row * stride + column[None, :]
        values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        result = gradient * _derivative(values, NAME)
        if GATED:
            up = tl.load(x + where + width, mask=inside, other=0.0).to(tl.float32)
            rounded_up = (gradient * _activate(values, NAME)).to(dx.dtype.element_ty)
            tl.store(dx + where + width, rounded_up, mask=inside)
            total_up += rounded_up.to(tl.float32)
            result *= up
        rounded = result.to(dx.dtype.element_ty)
        tl.store(dx + where, rounded, mask=inside)
        total += rounded.to(tl.float32)
    tl.store(sums + chunk * stride + column, tl.sum(total, 0), mask=here)
    if GATED:
        tl.store(sums + chunk * stride + width + column, tl.sum(total_up, 0), mask=here)


def activation_backward(dy: Tensor, x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    rows, width = dy.shape
    dx = torch.empty_like(x)
    chunks = triton.cdiv(rows, _CHUNK)
    sums = torch.empty(1, chunks, x.size(1), device=x.device)
    _activation_backward[(chunks, triton.cdiv(width, _COLUMNS))](
        dy, x, dx, sums, rows, width,
        NAME=_NAMES[activation.name], GATED=activation.gated, ROWS=_ROWS, COLUMNS=_COLUMNS, CHUNK=_CHUNK,
    )  # fmt: skip
    return dx, sums


@triton.jit
def _add_forward(
    residual, x, more, bias, y, seed, stream, probability, rows, width,
    MORE: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    offsets = row * width + column
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if MORE:
        values += tl.load(more + offsets, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        values += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = tl.rand(tl.load(seed) + stream, offsets) >= probability
        values = tl.where(keep, values / (1.0 - probability), 0.0)
    values += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + offsets, values.to(y.dtype.element_ty), mask=inside)


def add_forward(
    residual: Tensor, x: Tensor, bias: Tensor | None, dropout: Dropout, *, more: Tensor | None = None
) -> Tensor:
    rows, width = x.shape
    y = torch.empty_like(residual)
    _add_forward[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](
        residual, x, x if more is None else more, x if bias is None else bias, y,
        x if dropout.seed is None else dropout.seed, dropout.stream, dropout.probability, rows, width,
        MORE=more is not None, BIAS=bias is not None, DROPOUT=dropout.probability > 0, ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return y


@triton.jit
def _add_backward(
    dy, dx, seed, stream, probability, sums, rows, width,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, CHUNK, ROWS):
        row = (chunk * CHUNK + first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & here[None, :]
        offsets = row * width + column[None, :]
        gradient = tl.load(dy + offsets, mask=inside, other=0.0)
        if DROPOUT:
            keep = tl.rand(tl.load(seed) + stream, offsets) >= probability
            gradient = tl.where(keep, gradient.to(tl.float32) / (1.0 - probability), 0.0).to(dx.dtype.element_ty)
            tl.store(dx + offsets, gradient, mask=inside)
        total += gradient.to(tl.float32)
    tl.store(sums + chunk * width + column, tl.sum(total, 0), mask=here)


def add_backward(dy: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    rows, width = dy.shape
    dx = torch.empty_like(dy) if dropout.probability else dy
    chunks = triton.cdiv(rows, _CHUNK)
    sums = torch.empty(1, chunks, width, device=dy.device)
    _add_backward[(chunks, triton.cdiv(width, _COLUMNS))](
        dy, dx, dy if dropout.seed is None else dropout.seed, dropout.stream, dropout.probability, sums, rows, width,
        DROPOUT=dropout.probability > 0, ROWS=_ROWS, COLUMNS=_COLUMNS, CHUNK=_CHUNK,
    )  # fmt: skip
    return dx, sums


@triton.jit
def _turn(x, offsets, inside, channel, position, cos, sin, turned, sign, INTERLEAVED: tl.constexpr):
    """Rows of one head turned by their positions' angles; ``offsets`` point at channel 0 of each row."""
    values = tl.load(x + offsets + channel, mask=inside, other=0.0).to(tl.float32)
    if INTERLEAVED:
        partner = channel ^ 1
        first = (channel & 1) == 0
    else:
        half = turned // 2
        first = channel < half
        partner = tl.where(first, channel + half, channel - half)
    rotates = inside & (channel < turned)
    other = tl.load(x + offsets + partner, mask=rotates, other=0.0).to(tl.float32)
    table = position * turned + channel
    cosine = tl.load(cos + table, mask=rotates, other=1.0)
    sine = tl.load(sin + table, mask=rotates, other=0.0)
    return values * cosine + tl.where(first, -sign, sign) * other * sine


@triton.jit
def _split_heads(
    qkv, q, k, v, cos, sin, rows, batch, groups, width, turned,
    PER_GROUP: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (channel < width)
    head = tl.program_id(1)
    group = head // (PER_GROUP + 2)
    index = head % (PER_GROUP + 2)
    source = (row * groups * (PER_GROUP + 2) + head) * width
    position = row // batch
    if index == PER_GROUP + 1:
        values = tl.load(qkv + source + channel, mask=inside)
        tl.store(v + (row * groups + group) * width + channel, values, mask=inside)
    else:
        result = _turn(qkv, source, inside, channel, position, cos, sin, turned, 1.0, INTERLEAVED)
        if index == PER_GROUP:
            tl.store(k + (row * groups + group) * width + channel, result.to(k.dtype.element_ty), mask=inside)
        else:
            where = (row * groups * PER_GROUP + group * PER_GROUP + index) * width
            tl.store(q + where + channel, result.to(q.dtype.element_ty), mask=inside)


def split_heads(qkv: Tensor, heads: HeadLayout, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    q = qkv.new_empty(*heads.leading, heads.groups * heads.queries_per_group, heads.width)
    k, v = (qkv.new_empty(*heads.leading, heads.groups, heads.width) for _ in range(2))
    rows = 32
    _split_heads[(triton.cdiv(heads.tokens, rows), heads.groups * (heads.queries_per_group + 2))](
        qkv, q, k, v, rotary.cos, rotary.sin, heads.tokens, heads.batch, heads.groups, heads.width, rotary.width,
        PER_GROUP=heads.queries_per_group, INTERLEAVED=rotary.interleaved, ROWS=rows,
        WIDTH=triton.next_power_of_2(heads.width),
    )  # fmt: skip
    return q, k, v


@triton.jit
def _joined(
    x, sequence_stride, batch_stride, head_stride, head, row, batch, rows, channel, width, cos, sin, turned,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    inside = (row < rows) & (channel < width)
    offsets = (row // batch) * sequence_stride + (row % batch) * batch_stride + head.to(tl.int64) * head_stride
    if ROTARY:
        return _turn(x, offsets, inside, channel, row // batch, cos, sin, turned, -1.0, INTERLEAVED)
    else:
        return tl.load(x + offsets + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _join_heads(
    dq, dk, dv, dqkv, sums, cos, sin,
    q_sequence, q_batch, q_head, k_sequence, k_batch, k_head, v_sequence, v_batch, v_head,
    rows, batch, groups, width, turned,
    PER_GROUP: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    group = head // (PER_GROUP + 2)
    index = head % (PER_GROUP + 2)
    channel = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    stride = groups * (PER_GROUP + 2) * width
    for first in range(0, CHUNK, ROWS):
        row = (chunk * CHUNK + first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        if index == PER_GROUP + 1:
            result = _joined(dv, v_sequence, v_batch, v_head, group, row, batch, rows, channel, width, cos, sin, turned,
                             False, INTERLEAVED)  # fmt: skip
        elif index == PER_GROUP:
            result = _joined(dk, k_sequence, k_batch, k_head, group, row, batch, rows, channel, width, cos, sin, turned,
                             ROTARY, INTERLEAVED)  # fmt: skip
        else:
            result = _joined(dq, q_sequence, q_batch, q_head, group * PER_GROUP + index, row, batch, rows, channel,
                             width, cos, sin, turned, ROTARY, INTERLEAVED)  # fmt: skip
        rounded = result.to(dqkv.dtype.element_ty)
        inside = (row < rows) & (channel < width)
        tl.store(dqkv + row * stride + head * width + channel, rounded, mask=inside)
        total += rounded.to(tl.float32)
    column = tl.arange(0, WIDTH)
    tl.store(sums + chunk * stride + head * width + column, tl.sum(total, 0), mask=column < width)


def join_heads(dq: Tensor, dk: Tensor, dv: Tensor, heads: HeadLayout, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    # Attention backends return gradients in layouts of their own; only the channels must lie side by side.
    dq, dk, dv = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq, dk, dv))
    columns = heads.groups * (heads.queries_per_group + 2) * heads.width
    dqkv = dq.new_empty(heads.tokens, columns)
    chunks = triton.cdiv(heads.tokens, _CHUNK)
    sums = torch.empty(1, chunks, columns, device=dq.device)
    width = triton.next_power_of_2(heads.width)
    _join_heads[(chunks, heads.groups * (heads.queries_per_group + 2))](
        dq, dk, dv, dqkv, sums, *((sums, sums) if rotary is None else (rotary.cos, rotary.sin)),
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        heads.tokens, heads.batch, heads.groups, heads.width, 0 if rotary is None else rotary.width,
        PER_GROUP=heads.queries_per_group, ROTARY=rotary is not None,
        INTERLEAVED=rotary is not None and rotary.interleaved, ROWS=max(2048 // width, 1), WIDTH=width, CHUNK=_CHUNK,
    )  # fmt: skip
    return dqkv, sums


@triton.jit
def _accumulate_sums(
    sums, first, second, third, partials, width, MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    which = tl.program_id(0)
    if ((MASK >> which) & 1) == 0:
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < width
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, partials, ROWS):
        row = start + tl.arange(0, ROWS)
        where = sums + (which * partials + row)[:, None] * width + column[None, :]
        total += tl.load(where, mask=(row < partials)[:, None] & here[None, :], other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(first + column, tl.load(first + column, mask=here) + result, mask=here)
    elif which == 1:
        tl.store(second + column, tl.load(second + column, mask=here) + result, mask=here)
    else:
        tl.store(third + column, tl.load(third + column, mask=here) + result, mask=here)


def accumulate_sums(sums: Tensor, destinations: list[Tensor | None]) -> None:
    count, partials, width = sums.shape
    padded = [*destinations, None, None][:3]
    mask = sum(1 << i for i, t in enumerate(padded) if t is not None)
    if not mask:
        return
    first, second, third = (sums if t is None else t for t in padded)
    columns = 32
    _accumulate_sums[(count, triton.cdiv(width, columns))](
        sums, first, second, third, partials, width, MASK=mask, ROWS=64, COLUMNS=columns, num_warps=4
    )
