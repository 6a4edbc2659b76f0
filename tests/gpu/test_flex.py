"""FlexAttention against scaled dot product attention with the tensor of all pairs, on CUDA: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_megatron.models import flex
from lightning_megatron.models.attention import Scores
from lightning_megatron.models.context_parallel import positions, zigzag_order, zigzag_positions
from lightning_megatron.models.position_bias import alibi_slopes

LENGTH, HEADS, GROUPS = 256, 4, 2


def scores(kind: str) -> tuple[Scores, torch.Tensor | None]:
    """What attention does, and a bias that learns, if there is one."""
    device = torch.device("cuda")
    place = positions(LENGTH, device)
    if kind == "documents":
        documents = torch.randint(0, 4, (2, LENGTH), device=device).sort().values
        return Scores(True, place, place, documents, documents), None
    if kind == "alibi":
        return Scores(True, place, place, slopes=torch.tensor(alibi_slopes(HEADS), device=device)), None
    if kind == "t5":
        rows = torch.randn(HEADS, 2 * LENGTH - 1, device=device, requires_grad=True)
        return Scores(False, place, place, bias_by_distance=rows), rows
    if kind == "padding":
        return Scores(False, place, place, hidden=(place > 200).expand(2, 1, 1, LENGTH)), None
    queries = zigzag_positions(2 * LENGTH, 2, 1, device)
    return Scores(True, queries, zigzag_order(2 * LENGTH, 2, device)), None


@pytest.mark.parametrize("kind", ["documents", "alibi", "t5", "padding", "context_parallel"])
def test_equals_all_pairs(kind: str) -> None:
    torch.manual_seed(0)
    rule, learned = scores(kind)
    keys = rule.key_positions.numel()
    q, k, v = (
        torch.randn(2, heads, size, 64, device="cuda", requires_grad=True)
        for heads, size in ((HEADS, LENGTH), (GROUPS, keys), (GROUPS, keys))
    )
    assert flex.usable(q, rule, 0.0)
    flexible = flex.attend(q, k, v, rule, 0.125)
    bias = rule.materialise(q.dtype)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.125, enable_gqa=True)
    assert flexible is not None
    torch.testing.assert_close(flexible, expected, atol=1e-5, rtol=0)
    inputs = [q, k, v] if learned is None else [q, k, v, learned]
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((flexible * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for here, there in zip(ours, theirs, strict=True):
        assert (here - there).norm() / there.norm() < 1e-5
