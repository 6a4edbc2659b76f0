"""Transforms lose nothing, and tables say what does not fit."""

from __future__ import annotations

import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.interop import gpt2, mapping
from lightning_megatron.models.config import GPTConfig


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (mapping.Same(), [(3, 4)]),
        (mapping.Transposed(), [(3, 4)]),
        (mapping.QKV(heads=4, groups=2), [(12, 5), (6, 5), (6, 5)]),
        (mapping.QKV(heads=4, groups=1), [(12,), (3,), (3,)]),
        (mapping.FusedQKV(heads=2), [(4, 24)]),
        (mapping.FusedQKV(heads=2), [(24,)]),
        (mapping.KV(heads=2), [(6, 5), (6, 5)]),
        (mapping.Stacked(), [(6, 5), (6, 5)]),
        (mapping.PaddedVocabulary(7, 8), [(7, 3)]),
    ],
)
def test_transforms_invert(transform: mapping.Transform, shapes: list[tuple[int, ...]]) -> None:
    parts = [torch.randn(shape) for shape in shapes]
    back = transform.to_theirs(transform.to_core(parts))
    for part, again in zip(parts, back, strict=True):
        assert torch.equal(part, again)


def test_query_groups_stay_together() -> None:
    """Four heads in two groups: the first half of the rows is the first group's queries, key and value."""
    q, k, v = torch.arange(4.0)[:, None], torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0], [21.0]])
    core = mapping.QKV(heads=4, groups=2).to_core([q, k, v])
    assert core.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_unknown_and_missing_names() -> None:
    table = gpt2.table(GPTConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=8))
    with pytest.raises(lm.CheckpointError, match=r"Missing: transformer.wte.weight.*Unknown: surprise"):
        mapping.to_core(table, {"surprise": torch.zeros(1)})
