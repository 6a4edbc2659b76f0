"""Core attention for every model: causal, padding, documents, arbitrary masks, position biases, context parallelism.

What a query may see, and what is added to its score, is kept small (:class:`Scores`): documents as one number per
token, biases as one row per head. Two kernels read it: torch's scaled dot product attention, which takes it as a
tensor of scores, and FlexAttention on CUDA, which computes it on the fly, so that memory stays linear in the sequence.
ALiBi runs in cuDNN where :mod:`~lightning_megatron.models.cudnn_attention` can.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends.core import (
    AttnMaskType,
    CoreModule,
    ProcessGroupCollection,
    TransformerConfig,
    divide,
    tensor_parallel,
)
from lightning_megatron.models import cudnn_attention, flex, shared_bias
from lightning_megatron.models.context_parallel import positions, zigzag_order, zigzag_positions
from lightning_megatron.models.position_bias import alibi_slopes
from lightning_megatron.models.shared_bias import SharedBias

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


@dataclass(frozen=True, slots=True)
class Scores:
    """What attention does to its scores besides scaling them."""

    causal: bool
    query_positions: Tensor
    """``[queries]``"""
    key_positions: Tensor
    """``[keys]``"""
    query_documents: Tensor | None = None
    """``[batch, queries]``; a query sees only keys of its own document."""
    key_documents: Tensor | None = None
    """``[batch, keys]``"""
    hidden: Tensor | None = None
    """``True`` where a key is hidden; broadcastable to ``[batch, heads, queries, keys]``."""
    bias: Tensor | None = None
    """Added to the scaled scores; broadcastable to ``[batch, heads, queries, keys]``."""
    bias_by_distance: Tensor | None = None
    """``[heads, 2 * length - 1]``; added by key position minus query position, see ``position_bias``."""
    slopes: Tensor | None = None
    """``[heads]``; each score loses its head's slope times the distance (ALiBi)."""

    @property
    def plain(self) -> bool:
        """Whether there is nothing but, perhaps, causality."""
        extras = (self.query_documents, self.hidden, self.bias, self.bias_by_distance, self.slopes)
        return all(extra is None for extra in extras)

    def materialise(self, dtype: torch.dtype) -> Tensor | None:
        """One tensor to add to scores, broadcastable to ``[batch, heads, queries, keys]``; ``None`` for nothing.

        Hidden keys get the lowest finite number, so a query that sees none gets the mean of all values, not NaN.
        """
        distance = self.key_positions[None, :] - self.query_positions[:, None]
        hidden = self.hidden
        if self.causal and self.query_positions.numel() > 1:
            hidden = distance > 0 if hidden is None else hidden | (distance > 0)
        if self.query_documents is not None and self.key_documents is not None:
            other = (self.query_documents[:, :, None] != self.key_documents[:, None, :])[:, None]
            hidden = other if hidden is None else hidden | other
        bias = self.bias
        if self.bias_by_distance is not None:
            by_distance = self.bias_by_distance[:, distance + self.bias_by_distance.size(1) // 2].to(dtype)
            bias = by_distance if bias is None else bias + by_distance
        if self.slopes is not None:
            alibi = (-self.slopes[:, None, None] * distance.abs()).to(dtype)
            bias = alibi if bias is None else bias + alibi
        if hidden is None:
            return bias
        lowest = torch.finfo(dtype).min
        floor = torch.zeros((), dtype=dtype, device=hidden.device).masked_fill(hidden, lowest)
        return floor if bias is None else (bias + floor).clamp(min=lowest)


class SDPACoreAttention(CoreModule):
    """A drop-in for megatron-core's ``DotProductAttention``, which keeps scores of ``[batch, heads, query, key]``.

    Grouped queries are attended without copies of keys and values where the backend of torch can. A query that sees no
    key gets the mean of all values, not NaN. Under context parallelism keys and values are gathered over the ranks that
    share a sequence; the order is megatron-core's, see :mod:`lightning_megatron.models.context_parallel`.

    Args:
        alibi: lower scores by distance instead of giving tokens positions (Press et al. 2021, arXiv:2108.12409).

    Raises:
        ValueError: a configuration that needs another core attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        alibi: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        for name, only in (("softmax_type", "vanilla"), ("window_size", None)):
            if getattr(config, name) != only:
                raise ValueError(f"{name}={getattr(config, name)!r} is not supported here, only {only!r}.")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp if config.context_parallel_size > 1 else None
        if self.context_group is not None and attention_type == "cross":
            raise ValueError("Cross attention cannot be split along the sequence: set context_parallel_size=1.")
        self.attn_mask_type = attn_mask_type
        self.hidden_size_per_partition = divide(config.kv_channels * config.num_attention_heads, groups.tp.size())
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.holds_all_heads = groups.tp.size() == 1
        self.slopes: Tensor | None = None
        if alibi:
            heads = divide(config.num_attention_heads, groups.tp.size())
            mine = slice(groups.tp.rank() * heads, (groups.tp.rank() + 1) * heads)
            # Kept in fp32 and out of the state dict: a module cast to bf16 would cast a buffer, and move slopes.
            self.slopes = torch.tensor(alibi_slopes(config.num_attention_heads)[mine], dtype=torch.float32)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | SharedBias | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[query_sequence, batch, heads, head_size]``, heads of this tensor-parallel rank.
            key, value: ``[key_sequence, batch, query_groups, head_size]``.
            attention_mask: boolean, ``True`` where a key is hidden, broadcastable to ``[batch, heads, query, key]``; or
                whole numbers ``[batch, key_sequence]``, the document of each token, which a query does not look
                beyond. Padding is a document of its own.
            attn_mask_type: overrides the type given to the constructor.
            attention_bias: added to the scaled scores: broadcastable to ``[batch, heads, query, key]``, or
                ``[heads, 2 * length - 1]`` by distance (see ``position_bias``); or one that layers share, whose mask
                can hide keys only.

        Returns:
            ``[query_sequence, batch, heads * head_size]``

        Raises:
            ValueError: packed sequences, or under context parallelism a boolean mask or a bias of all pairs.
        """
        if packed_seq_params is not None:
            raise ValueError("Packed sequences need document boundaries given as a mask here, not packed_seq_params.")
        causal = (attn_mask_type if attn_mask_type is not None else self.attn_mask_type) in _CAUSAL
        if isinstance(attention_bias, SharedBias):
            q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            rule = shared_bias.Rule(causal=causal, scale=self.softmax_scale, hidden=attention_mask)
            return self._joined(shared_bias.attend(q, k, v, attention_bias, rule))
        if self.context_group is not None:
            return self._across_ranks(query, key, value, attention_mask, attention_bias, causal)
        queries, keys = query.size(0), key.size(0)
        key_positions = positions(keys, query.device)
        # Aligned to the end, so that a chunk of queries sees every key before it.
        query_positions = key_positions[keys - queries :] if causal else positions(queries, query.device)
        documents = attention_mask if _holds_documents(attention_mask) else None
        scores = Scores(
            causal,
            query_positions,
            key_positions,
            query_documents=None if documents is None else documents[:, -queries:],
            key_documents=documents,
            hidden=attention_mask if documents is None else None,
            **self._biases(attention_bias, query.device),
        )
        return self._attend(query, key, value, scores, in_order=queries == keys)

    def _across_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool
    ) -> Tensor:
        """Attend from this rank's part of the sequences to all parts, which are gathered."""
        if (mask is not None and not _holds_documents(mask)) or (bias is not None and bias.dim() != 2):
            raise ValueError(
                "Under context parallelism, tell boundaries by document_ids: a mask or a bias of all pairs of tokens "
                "does not fit to a part of the sequence. Or set context_parallel_size=1."
            )
        group = self.context_group
        assert group is not None
        ranks, rank, device = group.size(), group.rank(), query.device
        length = query.size(0) * ranks
        gathered = tensor_parallel.gather_from_sequence_parallel_region(
            torch.stack([key, value], dim=1), tensor_parallel_output_grad=True, group=group
        )
        all_documents = None
        if mask is not None:
            parts = tensor_parallel.gather_from_sequence_parallel_region(
                mask.t().contiguous(), tensor_parallel_output_grad=False, group=group
            )
            all_documents = parts.t()
        scores = Scores(
            causal,
            query_positions=zigzag_positions(length, ranks, rank, device),
            key_positions=zigzag_order(length, ranks, device),
            query_documents=mask,
            key_documents=all_documents,
            **self._biases(bias, device),
        )
        return self._attend(query, gathered[:, 0], gathered[:, 1], scores, in_order=False)

    def _biases(self, given: Tensor | None, device: torch.device) -> dict[str, Tensor | None]:
        if self.slopes is not None:
            if given is not None:
                raise ValueError("ALiBi is a bias of its own and does not go with another attention_bias.")
            self.slopes = self.slopes.to(device)
            return {"slopes": self.slopes}
        by_distance = given is not None and given.dim() == 2
        return {"bias": None if by_distance else given, "bias_by_distance": given if by_distance else None}

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores, *, in_order: bool) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        dropout = self.attention_dropout if self.training else 0.0
        bias: Tensor | None = None
        is_causal = scores.plain and scores.causal and in_order
        out: Tensor | None = None
        if in_order and _only_slopes(scores) and self._alibi_in_cudnn(q.size(2), q):
            out = cudnn_attention.attend(q, k, v, self.softmax_scale)
        if out is None and not is_causal and flex.usable(q, scores, dropout):
            out = flex.attend(q, k, v, scores, self.softmax_scale)
        if out is None:
            if not is_causal:
                bias = scores.materialise(q.dtype)
            with self._rng(dropout):
                out = F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=bias,
                    dropout_p=dropout,
                    is_causal=is_causal,
                    scale=self.softmax_scale,
                    enable_gqa=q.size(1) != k.size(1),
                )
        return self._joined(out)

    def _alibi_in_cudnn(self, sequence: int, like: Tensor) -> bool:
        drops = self.training and self.attention_dropout > 0.0
        if self.slopes is None or not self.holds_all_heads or self.context_group is not None or drops:
            return False
        return cudnn_attention.usable(sequence, self.config.kv_channels, like)

    def can_be_recorded(self, states: Tensor) -> bool:
        """Whether a CUDA graph may hold this attention of ``[sequence, batch, hidden]`` states without a mask."""
        if self.slopes is not None and self.training and self.attention_dropout > 0.0:
            return False  # then scores of all pairs are made
        return not self._alibi_in_cudnn(states.size(0), states)

    def _joined(self, out: Tensor) -> Tensor:
        """``[batch, heads, sequence, head_size]`` to ``[sequence, batch, heads * head_size]``."""
        return out.permute(2, 0, 1, 3).reshape(out.size(2), out.size(0), self.hidden_size_per_partition)

    def _rng(self, dropout: float) -> AbstractContextManager[None]:
        # Heads are split over tensor-parallel ranks, so each rank draws other dropout masks. Under sequence
        # parallelism the layer has forked the generator already.
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    def rng_of_graphs(self) -> AbstractContextManager[None]:
        """Around the capture and the replay of a graph with this attention, which cannot fork the generator itself.

        A replay draws from the default generator's state of the time, as an ordinary call does.
        """
        return self._rng(self.attention_dropout if self.training else 0.0)


def _only_slopes(scores: Scores) -> bool:
    """Whether this is causal ALiBi and nothing else."""
    return scores.causal and scores.slopes is not None and replace(scores, slopes=None).plain


def _holds_documents(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 2 and mask.dtype != torch.bool
