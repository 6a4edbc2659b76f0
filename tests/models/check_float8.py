"""Each Triton kernel that writes FP8 against plain torch. Run by tests, in a process of its own:

on CPU tensors with ``TRITON_INTERPRET=1``, where triton runs its kernels in Python, or with ``KERNEL_DEVICE=cuda``.
"""

import itertools
import os
from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from lightning_megatron.models.fused import float8_reference as reference
from lightning_megatron.models.fused import triton_float8, triton_rows
from lightning_megatron.models.fused.types import Activation, Cast, Dropout, HeadLayout, Norm, Quantized, Rotary

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
patch = interpreter._patch_lang_tensor
convert = interpreter._convert_float


def patch_for_numpy_2(tensor, scope):
    """Triton 3.6 reads loop bounds with ``int(array of one element)``, which numpy 2.4 and later refuse."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def convert_with_carry(data, source, target, rounding):
    """Triton 3.6's interpreter loses the carry where FP8 rounds up to the next power of two; torch does not."""
    dtype = {tl.float8e4nv: E4M3, tl.float8e5: E5M2}.get(target)
    if dtype is None or source != tl.float32:
        return convert(data, source, target, rounding)
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(dtype)
    return rounded.view(torch.uint8).numpy().reshape(-1).view(np.uint8).reshape(data.shape)


device = os.environ.get("KERNEL_DEVICE", "cpu")
if device == "cpu":
    interpreter._patch_lang_tensor = patch_for_numpy_2
    interpreter._convert_float = convert_with_carry
torch.set_default_device(device)
generator = torch.Generator(device).manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=generator)


def new_cast(dtype, beside=None, scale=16.0, dynamic=False):
    scale, amax = torch.tensor(scale), torch.tensor(0.0)
    return Cast(dtype, scale, 1.0 / scale, amax, dynamic, beside)


def same(actual, expected):
    """Equal, but for the few values whose float32 differs in the last bit where FP8 changes to the next number."""
    if actual is None or expected is None:
        assert actual is expected
        return
    assert actual.dtype == expected.dtype
    a, e = actual.float(), expected.float()
    assert a.shape == e.shape
    torch.testing.assert_close(a, e, rtol=0.26, atol=2**-9, equal_nan=True)
    if actual.dtype in (E4M3, E5M2):
        assert (a != e).float().mean() < 0.003
    else:
        last_bit = 1e-2 if actual.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(a, e, rtol=last_bit, atol=1e-4)


def same_quantized(actual, expected, cast, expected_cast):
    same(actual.rows, expected.rows)
    if actual.columns is not None:
        wrong = actual.columns.float() != actual.rows.float().t()
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} by columns, {cast}, {actual.rows.shape}"
    assert (actual.columns is None) == (expected.columns is None)
    same(actual.values, expected.values)
    torch.testing.assert_close(cast.amax, expected_cast.amax)
    assert torch.equal(cast.scale, expected_cast.scale)
    assert torch.equal(cast.inverse, expected_cast.inverse)


besides = (None, "columns", "values")
shapes = ((70, 48, torch.float32), (70, 66, torch.float32), (128, 80, torch.float32), (128, 80, torch.bfloat16))
"""Kernels are compiled anew for multiples of 16, of which a thread writes many at once, and for each type."""

# Casts: the largest numbers saturate, what is not a number stays so.
for dtype, beside, dynamic, shape in itertools.product((E4M3, E5M2), besides, (False, True), shapes):
    x = (draw(*shape[:2]) * 20).to(shape[2])
    casts = new_cast(dtype, beside, dynamic=dynamic), new_cast(dtype, beside, dynamic=dynamic)
    same_quantized(triton_float8.quantize(x, casts[0]), reference.quantize(x, casts[1]), *casts)
cast = new_cast(E4M3)
x = torch.tensor([[1e30, -1e30, float("inf"), float("nan"), 28.0, 0.0, -29.0, 1e-9]])
y = triton_float8.quantize(x, cast).rows.float()[0]
torch.testing.assert_close(y, torch.tensor([448.0, -448, 448, float("nan"), 448, 0, -448, 0]), equal_nan=True)
into = Quantized(torch.empty(70, 48, dtype=E4M3), torch.empty(48, 70, dtype=E4M3), None, cast.inverse)
x = draw(70, 48)
cast = new_cast(E4M3, "columns", dynamic=True)
assert triton_float8.quantize(x, cast, into) is into
assert torch.equal(into.rows.float().t(), into.columns.float())
same(into.rows, reference.quantize(x, new_cast(E4M3, dynamic=True)).rows)
assert 224 <= into.rows.float().abs().max() <= 448
assert torch.equal(triton_float8.transpose(into.rows).float(), into.columns.float())

# Scales, over more calls than the history is long.
for gradients in (E4M3, E5M2):
    states = [(torch.zeros(8, 4), torch.zeros(3, 8), torch.zeros((), dtype=torch.int32)) for _ in range(2)]
    for call in range(7):
        largest = draw(8).abs() * 10.0**call
        largest[call] = (0.0, 448.0, 448.0001, 1e-38, float("inf"), 1.75, 57344.0)[call]
        for amax, _, _ in states:
            amax[:, 0] = largest
        scales = triton_float8.next_scales(*states[0], 4, gradients)
        expected = reference.next_scales(*states[1], 4, gradients)
        assert torch.equal(scales[..., 0], expected[..., 0]), (scales[..., 0], expected[..., 0])
        for a, e in zip(*states, strict=True):
            assert torch.equal(a, e)

for rms, with_bias in itertools.product((False, True), repeat=2):
    norm, weight, bias = Norm(rms, 1e-5), draw(40), draw(40) if with_bias else None
    x, residual = draw(11, 40), draw(11, 40)
    casts = new_cast(E4M3), new_cast(E4M3)
    actual = triton_rows.norm_forward(x, weight, bias, norm, casts[0])
    expected = reference.norm_forward(x, weight, bias, norm, casts[1])
    for a, e in zip((*actual, casts[0].amax), (*expected, casts[1].amax), strict=True):
        same(a, e)
    arguments = (residual, x, bias, Dropout(0.0), weight, bias, norm)
    actual = triton_rows.add_norm_forward(*arguments, casts[0])
    for a, e in zip(actual, reference.add_norm_forward(*arguments, casts[1]), strict=True):
        same(a, e)
    same(casts[0].amax, casts[1].amax)

for (name, gated), beside, (rows, width, dtype) in itertools.product(
    (("gelu", False), ("silu", True), ("relu", True)), besides, shapes[1:]
):
    activation = Activation(name, gated)
    x, dy = draw(rows, 2 * width if gated else width).to(dtype), draw(rows, width).to(dtype)
    casts = new_cast(E4M3, beside), new_cast(E4M3, beside)
    actual = triton_float8.activation_forward(x, activation, casts[0])
    same_quantized(actual, reference.activation_forward(x, activation, casts[1]), *casts)
    for with_sums in (False, True):
        casts = new_cast(E5M2, beside), new_cast(E5M2, beside)
        dx, sums = triton_float8.activation_backward(dy, x, activation, casts[0], with_sums)
        expected_dx, expected_sums = reference.activation_backward(dy, x, activation, casts[1], with_sums)
        same_quantized(dx, expected_dx, *casts)
        assert (sums is None) == (expected_sums is None)
        if sums is not None:
            same(sums.sum(1), expected_sums.sum(1))

for per_group, turned, beside, (sequence, batch, width), dtype in (
    (1, 12, "columns", (7, 11, 12), torch.float32),
    (3, 8, "values", (7, 11, 12), torch.float32),
    (3, None, None, (7, 11, 12), torch.float32),
    (1, None, "columns", (7, 11, 12), torch.float32),
    (1, 32, "columns", (8, 16, 32), torch.bfloat16),
    (2, None, "columns", (8, 16, 64), torch.bfloat16),
):
    heads = HeadLayout(sequence=sequence, batch=batch, groups=2, queries_per_group=per_group, width=width)
    rotary = None
    if turned is not None:
        angle = draw(sequence, 1, 1, turned // 2)
        rotary = Rotary.of(torch.cat([angle, angle], -1), False)
    # In the layout of an attention backend, [batch, heads, sequence, width].
    gradients = [draw(batch, count, sequence, width).to(dtype).permute(2, 0, 1, 3) for count in (2 * per_group, 2, 2)]
    casts = new_cast(E5M2, beside), new_cast(E5M2, beside)
    dqkv, sums = triton_float8.join_heads(*gradients, heads, rotary, casts[0], True)
    expected_dqkv, expected_sums = reference.join_heads(*gradients, heads, rotary, casts[1], True)
    same_quantized(dqkv, expected_dqkv, *casts)
    same(sums.sum(1), expected_sums.sum(1))
    assert triton_float8.join_heads(*gradients, heads, rotary, replace(casts[0], beside=None), False)[1] is None

for accumulate in (0, 1):
    gradient, kept, flag = torch.ones(5000), torch.zeros(6000), torch.tensor(accumulate, dtype=torch.int32)
    triton_float8.set_aside(gradient, kept, flag)
    gradient.fill_(2.0)
    triton_float8.add_back(gradient, kept, flag)
    assert torch.equal(gradient, torch.full((5000,), 2.0 + accumulate))
print("ok")
