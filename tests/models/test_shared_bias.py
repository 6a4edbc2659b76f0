"""A bias that layers share against the same bias through autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lightning_megatron.models import shared_bias
from lightning_megatron.models.position_bias import relative_buckets
from lightning_megatron.models.shared_bias import SharedBias

BATCH, HEADS, LENGTH, WIDTH, BUCKETS = 2, 3, 9, 8, 8


class Table:
    """What :class:`~lightning_megatron.models.position_bias.RelativePositionBias` does, without process groups."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.randn(BUCKETS, HEADS))
        self.buckets = relative_buckets(LENGTH, bidirectional=True, num_buckets=BUCKETS, max_distance=6)

    def rows(self, length: int) -> torch.Tensor:
        return F.embedding(self.buckets, self.weight).t()

    def weight_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(self.weight).index_add(0, self.buckets, rows.t())


@pytest.mark.parametrize(("causal", "padded"), itertools.product((False, True), repeat=2))
def test_two_layers_give_the_gradients_of_autograd(causal: bool, padded: bool) -> None:
    torch.manual_seed(0)
    table, bias = Table(), SharedBias(HEADS, LENGTH, torch.float32, torch.device("cpu"))
    bias.fill(table.rows(LENGTH))
    hidden = torch.zeros(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    hidden[1, ..., 5:] = padded
    rule = shared_bias.Rule(causal=causal, scale=0.5, hidden=hidden if padded else None)
    inputs = [torch.randn(BATCH, HEADS, LENGTH, WIDTH, requires_grad=True) for _ in range(3)]
    q, k, v = inputs
    for _ in range(2):  # what was added is taken, once
        states = shared_bias.gather_gradient(q, table, bias)
        first = shared_bias.attend(states, k, v, bias, rule)
        actual = shared_bias.attend(first, k, v, bias, rule)
        weight = torch.randn_like(actual)
        ours = torch.autograd.grad(actual, [*inputs, table.weight], weight)

    place = torch.arange(LENGTH)
    scores = table.rows(LENGTH)[:, place[None, :] - place[:, None] + LENGTH - 1].masked_fill(hidden, -torch.inf)
    if causal:
        scores = scores.masked_fill(place[None, :] > place[:, None], -torch.inf)
    expected = q
    for _ in range(2):
        expected = F.scaled_dot_product_attention(expected, k, v, attn_mask=scores, scale=0.5)
    torch.testing.assert_close(actual, expected)
    for here, there in zip(ours, torch.autograd.grad(expected, [*inputs, table.weight], weight), strict=True):
        torch.testing.assert_close(here, there)
    assert not bias.gradient.any()
