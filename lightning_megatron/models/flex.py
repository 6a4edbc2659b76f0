"""FlexAttention: masks and biases computed inside the kernel, from rows that are linear in the sequence. CUDA only.

torch compiles the kernel when it is first used. Dropout has no place in it; attention with dropout and a mask takes
scaled dot product attention.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_megatron.models.attention import Scores


logger = logging.getLogger(__name__)

# A bias by distance is looked up for all pairs of a tile, which the kernels keep in shared memory beside keys and
# values: on an H100 the tiles that torch chooses do not fit.
_SMALL_TILES = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "fwd_num_stages": 2,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "bwd_num_stages": 1,
}
_SHORTEST = 128
"""Queries from which on the tensor of all pairs is worth avoiding. For fewer, torch takes another kernel, made for
decoding, with which a T5 of 80 and 49 tokens did not finish on an H100 (torch 2.11)."""
_refused: list[str] = []


def usable(query: Tensor, scores: Scores, dropout: float) -> bool:
    """Whether this kernel can and should be used: not for what is a tensor of all pairs already."""
    if query.device.type != "cuda" or _refused or dropout > 0.0 or query.size(2) < _SHORTEST:
        return False
    whole = (scores.hidden, scores.bias)
    return all(tensor is None or tensor.size(-2) == 1 for tensor in whole) and not (scores.plain and not scores.causal)


def attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores, scale: float) -> Tensor | None:
    """Attend ``[batch, heads, queries, head_size]`` to ``[batch, query_groups, keys, head_size]``.

    Returns:
        ``None`` if torch cannot compile the kernel here, which is logged once; scaled dot product attention can.
    """
    attention, _ = _compiled()
    try:
        out: Tensor = attention(
            query,
            key,
            value,
            score_mod=_score_mod(scores),
            block_mask=block_mask(scores, query.size(0), query.size(2), key.size(2)),
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
            kernel_options=_SMALL_TILES if scores.bias_by_distance is not None else None,
        )
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        _refused.append(str(error))
        logger.warning(
            "Attention with masks or biases holds the scores of all pairs of tokens, because torch cannot compile "
            "FlexAttention here: %s",
            str(error).splitlines()[0],
        )
        return None
    return out


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Uncompiled, either would make the tensor of all pairs that this module is there to avoid.
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _score_mod(scores: Scores) -> Callable[..., Tensor] | None:
    rows, bias, slopes = scores.bias_by_distance, scores.bias, scores.slopes
    if rows is None and bias is None and slopes is None:
        return None
    query_positions, key_positions = scores.query_positions, scores.key_positions
    if slopes is not None:

        def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score - slopes[h] * (key_positions[k] - query_positions[q]).abs()

        return alibi
    if rows is not None:
        middle = rows.size(1) // 2

        def by_distance(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + rows[h, key_positions[k] - query_positions[q] + middle]

        return by_distance
    assert bias is not None
    keys = bias.expand(bias.size(0), bias.size(1), 1, key_positions.numel())
    one_head, one_sample = keys.size(1) == 1, keys.size(0) == 1

    def by_key(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + keys[0 if one_sample else b, 0 if one_head else h, 0, k]

    return by_key


# Layers of a micro-batch share a mask, so the last one is kept: (what it is of, the mask).
_last: list[tuple[tuple[Any, ...], Any]] = []
_recorded: list[Any] = []
"""Masks that CUDA graphs read, whose addresses must stay theirs."""


def block_mask(scores: Scores, batch: int, queries: int, keys: int) -> Any:
    """Which blocks of queries and keys need computing, or ``None`` if all do."""
    documents, key_documents, hidden = scores.query_documents, scores.key_documents, scores.hidden
    if not scores.causal and documents is None and hidden is None:
        return None
    sources = (scores.query_positions, scores.key_positions, documents, key_documents, hidden)
    key = (scores.causal, batch, queries, keys, *((t.data_ptr(), t._version) for t in sources if t is not None))
    if _last and _last[0][0] == key:
        kept = _last[0][1]
        if torch.cuda.is_current_stream_capturing() and not any(kept is other for other in _recorded):
            _recorded.append(kept)
        return kept[0]
    mask = _compiled()[1](
        _mask_mod(scores),
        B=batch if documents is not None or (hidden is not None and hidden.size(0) > 1) else None,
        H=None,
        Q_LEN=queries,
        KV_LEN=keys,
        device=str(scores.query_positions.device),
    )
    # The sources stay alive with the entry, so that their addresses are not given to other tensors.
    _last[:] = [(key, (mask, sources))]
    return mask


def _mask_mod(scores: Scores) -> Callable[..., Tensor]:
    query_positions, key_positions = scores.query_positions, scores.key_positions
    documents, key_documents, hidden = scores.query_documents, scores.key_documents, scores.hidden
    causal = scores.causal

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k >= 0
        if causal:
            seen = seen & (key_positions[k] <= query_positions[q])
        if documents is not None and key_documents is not None:
            seen = seen & (documents[b, q] == key_documents[b, k])
        if hidden is not None:
            seen = seen & ~hidden[0 if hidden.size(0) == 1 else b, 0, 0, k]
        return seen

    return visible
