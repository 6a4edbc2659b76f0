"""Attention with position biases in cuDNN against scaled dot product attention with the tensor of all pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lightning_megatron.models import cudnn_attention, shared_bias
from lightning_megatron.models.attention import Scores
from lightning_megatron.models.context_parallel import positions
from lightning_megatron.models.position_bias import alibi_slopes

BATCH, LENGTH, WIDTH = 2, 384, 64


def draw(heads: int) -> torch.Tensor:
    """``[batch, heads, sequence, width]`` in megatron-core's order of memory."""
    memory = torch.randn(LENGTH, BATCH, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    return memory.requires_grad_().permute(1, 2, 0, 3)


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2), (12, 12)])
def test_alibi_in_cudnn(heads: int, groups: int) -> None:
    if cudnn_attention.unavailable() is not None:
        pytest.skip(cudnn_attention.unavailable())
    torch.manual_seed(0)
    q, k, v = draw(heads), draw(groups), draw(groups)
    out = cudnn_attention.attend(q, k, v, 0.125)
    assert out is not None
    place = positions(LENGTH, q.device)
    bias = Scores(True, place, place, slopes=torch.tensor(alibi_slopes(heads), device="cuda"))
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(
        *exact, attn_mask=bias.materialise(torch.float32), scale=0.125, enable_gqa=True
    )
    weight = torch.randn_like(expected)
    ours = (out, *torch.autograd.grad(out, (q, k, v), weight.to(out.dtype)))
    theirs = (expected, *torch.autograd.grad(expected, exact, weight))
    for here, there in zip(ours, theirs, strict=True):
        assert (here.float() - there).norm() / there.norm() < 5e-3


@pytest.mark.parametrize(
    ("causal", "padded", "length"), [*itertools.product((False, True), (False, True), (LENGTH,)), (False, False, 300)]
)
def test_a_shared_bias_in_cudnn(causal: bool, padded: bool, length: int) -> None:
    torch.manual_seed(0)
    heads = 6
    bias = shared_bias.SharedBias(heads, length, torch.bfloat16, torch.device("cuda"))
    rows = torch.randn(heads, 2 * length - 1, device="cuda").bfloat16().float().requires_grad_()
    bias.fill(rows)
    hidden = torch.zeros(BATCH, 1, 1, length, dtype=torch.bool, device="cuda")
    hidden[1, ..., 200:] = padded
    rule = shared_bias.Rule(causal=causal, scale=0.25, hidden=hidden if padded else None)
    q, k, v = (draw(heads)[:, :, :length] for _ in range(3))
    out = shared_bias.attend(q, k, v, bias, rule)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    place = torch.arange(length, device="cuda")
    scores = rows[:, place[None, :] - place[:, None] + length - 1].masked_fill(hidden, -torch.inf)
    if causal:
        scores = scores.masked_fill(place[None, :] > place[:, None], -torch.inf)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=scores, scale=0.25)
    weight = torch.randn_like(expected)
    ours = (out, *torch.autograd.grad(out, (q, k, v), weight.to(out.dtype)), bias.take_gradient())
    theirs = (expected, *torch.autograd.grad(expected, [*exact, rows], weight))
    for here, there in zip(ours, theirs, strict=True):
        assert (here.float() - there).norm() / there.norm() < 1e-2
