"""Core attention on ``torch.nn.functional.scaled_dot_product_attention``: memory linear in the sequence, any device."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
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

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SDPACoreAttention(CoreModule):
    """A drop-in for megatron-core's ``DotProductAttention``, which keeps scores of ``[batch, heads, query, key]``.

    Grouped queries are attended without copies of keys and values where the backend of torch can. Masks follow
    megatron-core: ``True`` is masked out. A query that sees no key gets the mean of all values, not NaN.

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
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        for name, only in (("context_parallel_size", 1), ("softmax_type", "vanilla"), ("window_size", None)):
            if getattr(config, name) != only:
                raise ValueError(f"{name}={getattr(config, name)!r} is not supported here, only {only!r}.")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.attn_mask_type = attn_mask_type
        self.hidden_size_per_partition = divide(config.kv_channels * config.num_attention_heads, groups.tp.size())
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[query_sequence, batch, heads, head_size]``, heads of this tensor-parallel rank.
            key, value: ``[key_sequence, batch, query_groups, head_size]``.
            attention_mask: ``True`` where a key is hidden; broadcastable to ``[batch, heads, query, key]``.
            attn_mask_type: overrides the type given to the constructor.
            attention_bias: added to the scaled scores; broadcastable to ``[batch, heads, query, key]``.

        Returns:
            ``[query_sequence, batch, heads * head_size]``
        """
        if packed_seq_params is not None:
            raise ValueError("Packed sequences need document boundaries given as a mask here, not packed_seq_params.")
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask_type = attn_mask_type if attn_mask_type is not None else self.attn_mask_type
        bias, is_causal = self._bias(q, k, attention_mask, attention_bias, mask_type)
        dropout = self.attention_dropout if self.training else 0.0
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
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), self.hidden_size_per_partition)

    def _rng(self, dropout: float) -> AbstractContextManager[None]:
        # Heads are split over tensor-parallel ranks, so each rank draws other dropout masks. Under sequence
        # parallelism the layer has forked the generator already.
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    @staticmethod
    def _bias(
        q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, mask_type: AttnMaskType
    ) -> tuple[Tensor | None, bool]:
        queries, keys = q.size(2), k.size(2)
        if mask_type in _CAUSAL and queries > 1:
            if mask is None and bias is None and queries == keys:
                return None, True
            # Aligned to the end, so that a chunk of queries sees every key before it.
            future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
            mask = future if mask is None else mask | future
        if mask is not None:
            hidden = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(mask, torch.finfo(q.dtype).min)
            bias = hidden if bias is None else (bias + hidden).clamp(min=torch.finfo(q.dtype).min)
        return bias, False
