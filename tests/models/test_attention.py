"""The core attention against formulas written out, and ALiBi and T5's buckets against Hugging Face's definitions."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_megatron.models.attention import Scores
from lightning_megatron.models.context_parallel import cut_sequence, restore_sequence, zigzag_positions
from lightning_megatron.models.position_bias import alibi_bias, alibi_slopes, distances, relative_buckets


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 16, 40, 112])
def test_alibi_equals_bloom_and_mpt(heads: int) -> None:
    """Up to a constant per query, which the softmax does not see."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    length = 7
    rows = alibi_bias(torch.tensor(alibi_slopes(heads)), length)
    place = torch.arange(length)
    ours = rows[:, place[None, :] - place[:, None] + length - 1]
    seen = place[None, :] <= place[:, None]
    bloom = build_alibi_tensor(torch.ones(1, length), heads, torch.float32).view(heads, 1, length)
    mpt = build_mpt_alibi_tensor(heads, length).view(heads, 1, length)
    for theirs in (bloom, mpt):
        last = theirs[:, :, :].expand(heads, length, length) - theirs[:, 0, :, None]
        difference = (ours - last).masked_fill(~seen, 0)
        torch.testing.assert_close(difference, torch.zeros_like(difference), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20)])
def test_buckets_equal_t5(bidirectional: bool, buckets: int, longest: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    ours = relative_buckets(200, bidirectional=bidirectional, num_buckets=buckets, max_distance=longest)
    theirs = T5Attention._relative_position_bucket(
        distances(200, torch.device("cpu")), bidirectional, num_buckets=buckets, max_distance=longest
    )
    assert torch.equal(ours, theirs)


def test_scores_say_who_is_seen() -> None:
    place = torch.arange(4)
    documents = torch.tensor([[0, 0, 1, 1]])
    scores = Scores(True, place, place, query_documents=documents, key_documents=documents)
    visible = scores.materialise(torch.float32) == 0
    assert visible[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    by_distance = Scores(False, place[2:], place, bias_by_distance=torch.arange(7.0)[None])
    assert by_distance.materialise(torch.float32)[0].tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]


def test_a_query_that_sees_nothing_is_finite() -> None:
    place = torch.arange(3)
    hidden = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    bias = Scores(False, place, place, hidden=hidden, bias=torch.full((1, 1, 3, 3), -5.0)).materialise(torch.float32)
    assert torch.allclose(torch.softmax(bias, dim=-1), torch.tensor(1 / 3))


def test_zigzag_gives_ranks_the_same_work() -> None:
    whole = torch.arange(16).view(1, 16)
    parts = [cut_sequence(whole, 4, rank) for rank in range(4)]
    assert parts[1].tolist() == [[2, 3, 12, 13]]
    assert torch.equal(restore_sequence(torch.cat(parts, dim=1), 4), whole)
    work = [int((zigzag_positions(16, 4, rank, torch.device("cpu")) + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1
    assert math.isclose(sum(work), 16 * 17 / 2)
