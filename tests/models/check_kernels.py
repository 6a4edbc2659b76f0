"""Each Triton kernel of the fused layers against plain torch. Run by tests, in a process of its own:

on CPU tensors with ``TRITON_INTERPRET=1``, where triton runs its kernels in Python, or with ``KERNEL_DEVICE=cuda``.
"""

import itertools
import os

import torch
from triton.runtime import interpreter

from lightning_megatron.models.fused import bias_gradient, reference, triton_rows, triton_tiles
from lightning_megatron.models.fused.types import Activation, Dropout, HeadLayout, Norm, Rotary

patch = interpreter._patch_lang_tensor


def patch_for_numpy_2(tensor, scope):
    """Triton 3.6 reads loop bounds with ``int(array of one element)``, which numpy 2.4 and later refuse."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


device = os.environ.get("KERNEL_DEVICE", "cpu")
if device == "cpu":
    interpreter._patch_lang_tensor = patch_for_numpy_2
torch.set_default_device(device)
generator = torch.Generator(device).manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=generator)


def close(actual, expected, tolerance=2e-5):
    if actual is None or expected is None:
        assert actual is expected
        return
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


for rms, with_bias, with_residual, with_output in itertools.product((False, True), repeat=4):
    norm = Norm(rms, 1e-5)
    x, weight, bias = draw(11, 40), draw(40), draw(40) if with_bias else None
    expected = reference.norm_forward(x, weight, bias, norm)
    for a, e in zip(triton_rows.norm_forward(x, weight, bias, norm), expected, strict=True):
        close(a, e)
    arguments = (
        draw(11, 40),
        x,
        weight,
        bias,
        *expected[1:],
        draw(11, 40) if with_residual else None,
        norm,
        with_output,
    )
    dx, sums, y = triton_rows.norm_backward(*arguments)
    expected_dx, expected_sums, expected_y = reference.norm_backward(*arguments)
    close(dx, expected_dx)
    close(y, expected_y)
    for index in (0, 2) if rms else (0, 1, 2):  # RMSNorm has no bias whose gradient the second would be
        close(sums[index].sum(0), expected_sums[index].sum(0))
    # Another rank's part of the gradient, and a place for the result.
    more, place = draw(11, 40), draw(22, 40)
    again = triton_rows.norm_backward(*arguments, more=more, out=place[11:])
    close(place[11:], reference.norm_backward(*arguments, more=more)[0])
    close(again[0], place[11:])
    close(triton_rows.norm_forward(x, weight, bias, norm, out=place[:11])[0], expected[0])
    close(place[:11], expected[0])

for name, gated in itertools.product(("gelu", "gelu_tanh", "silu", "relu"), (False, True)):
    activation = Activation(name, gated)
    x = draw(150, 2 * 70 if gated else 70)
    close(triton_tiles.activation_forward(x, activation), reference.activation_forward(x, activation))
    dy = draw(150, 70)
    dx, sums = triton_tiles.activation_backward(dy, x, activation)
    expected_dx, expected_sums = reference.activation_backward(dy, x, activation)
    close(dx, expected_dx)
    close(sums.sum(1), expected_sums.sum(1), 2e-4)

for with_bias in (False, True):
    residual, x, bias = draw(130, 33), draw(130, 33), draw(33) if with_bias else None
    none = Dropout(0.0)
    close(triton_tiles.add_forward(residual, x, bias, none), reference.add_forward(residual, x, bias, none))
    rows_arguments = (draw(33), bias, Norm(with_bias, 1e-5))
    more, place = draw(130, 33), draw(130, 33)
    both = triton_rows.add_norm_forward(residual, x, bias, none, *rows_arguments, more=more, out=place)
    for a, e in zip(both, reference.add_norm_forward(residual, x + more, bias, none, *rows_arguments), strict=True):
        close(a, e)
    close(place, both[1])
    close(triton_tiles.add_forward(residual, x, bias, none, more=more), both[0])
    actual = triton_rows.add_norm_forward(residual, x, bias, none, *rows_arguments)
    for a, e in zip(actual, reference.add_norm_forward(residual, x, bias, none, *rows_arguments), strict=True):
        close(a, e)
    dx, sums = triton_tiles.add_backward(x, none)
    assert dx is x
    close(sums.sum(1), reference.add_backward(x, none)[1].sum(1), 1e-4)
    # With dropout, the same mask forward and backward, about as often as asked.
    half = Dropout(0.25, torch.tensor(77), stream=1)
    kept = triton_tiles.add_forward(torch.zeros_like(x), torch.ones_like(x), None, half)
    close(kept.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs((kept > 0).float().mean() - 0.75) < 0.03
    dx, sums = triton_tiles.add_backward(x, half)
    close(dx, x * kept)
    close(sums.sum(1)[0], (x * kept).sum(0)[None][0], 1e-4)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    close(triton_rows.add_norm_forward(zero, one, None, half, *rows_arguments)[0], kept)
    other = triton_tiles.add_forward(torch.zeros_like(x), torch.ones_like(x), None, Dropout(0.25, torch.tensor(77)))
    assert not torch.equal(kept, other)

for per_group, interleaved, turned in itertools.product((1, 3), (False, True), (12, 8, None)):
    heads = HeadLayout(sequence=7, batch=3, groups=2, queries_per_group=per_group, width=12)
    rotary = None
    if turned is not None:  # both halves of a pair turn by one angle
        angle = draw(7, 1, 1, turned // 2)
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
        rotary = Rotary.of(angle, interleaved)
    qkv = draw(21, 2 * (per_group + 2) * 12)
    expected = reference.split_heads(qkv, heads, rotary)
    if rotary is not None:
        for a, e in zip(triton_tiles.split_heads(qkv, heads, rotary), expected, strict=True):
            close(a, e)
    # In the layout of an attention backend, [batch, heads, sequence, width].
    gradients = [draw(3, t.size(2), 7, 12).permute(2, 0, 1, 3) for t in expected]
    dqkv, sums = triton_tiles.join_heads(*gradients, heads, rotary)
    expected_dqkv, expected_sums = reference.join_heads(*gradients, heads, rotary)
    close(dqkv, expected_dqkv)
    close(sums.sum(1), expected_sums.sum(1), 1e-4)

for columns in (5000, 4999, 1):
    logits, scale = draw(6, 5000) * 3, draw(6)
    target = torch.tensor([0, 4998, 17, -1, 5000, 4096])
    statistics = reference.softmax_statistics(logits, target, columns)
    for a, e in zip(triton_rows.softmax_statistics(logits, target, columns), statistics, strict=True):
        close(a, e)
    log_sum = statistics[0] + statistics[1].log()
    actual = triton_rows.softmax_gradient_(logits.clone(), target, log_sum, scale, columns)
    close(actual, reference.softmax_gradient_(logits.clone(), target, log_sum, scale, columns))

for count, missing in ((3, None), (3, 1), (1, None), (3, 2)):
    sums = draw(count, 70, 45)
    actual = [None if i == missing else torch.ones(45) for i in range(count)]
    expected = [None if t is None else t.clone() for t in actual]
    triton_tiles.accumulate_sums(sums, actual)
    reference.accumulate_sums(sums, expected)
    for a, e in zip(actual, expected, strict=True):
        close(a, e)
for causal, with_hidden in itertools.product((False, True), repeat=2) if device == "cpu" else ():
    batch, heads, length, width = 3, 2, 70, 24
    q, k, v = (draw(length, batch, heads, width).permute(1, 2, 0, 3) for _ in range(3))
    bias = draw(1, heads, length, 72)[..., :length].requires_grad_()
    hidden = torch.rand(batch, 1, 1, length, generator=generator) < 0.2 if with_hidden else None
    scores = q @ k.transpose(-1, -2) * 0.3 + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        scores[:, :, 0, 0] = 0.0  # the first query sees something
    log_sum = scores.logsumexp(-1, keepdim=True)
    out = scores.softmax(-1) @ v
    gradient = draw(batch, heads, length, width)
    (expected,) = torch.autograd.grad(out, bias, gradient)
    total = torch.ones(heads, length, 2 * length - 1)
    arguments = (q, k, v, out.detach(), gradient)
    bias_gradient.add(total, bias.detach(), arguments, log_sum.detach(), hidden, 0.3, causal)
    columns = torch.arange(length)[None, :] - torch.arange(length)[:, None] + length - 1
    actual = total.gather(2, columns.expand(heads, -1, -1)) - 1
    if causal:
        actual[:, 0, 0] = expected[0, :, 0, 0] = 0.0
    close(actual, expected[0], 1e-4)
    assert (total != 1).sum() <= heads * length * length
print("ok")
