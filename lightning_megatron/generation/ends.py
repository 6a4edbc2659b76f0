"""The two ends of a model while decoding: tokens to hidden states, hidden states to logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends import peer_sum
from lightning_megatron.generation.layers import gather_columns, project
from lightning_megatron.generation.protocol import Step
from lightning_megatron.models.config import GPTConfig, T5Config


class Embedding:
    """Token and position embeddings of a chunk that begins a model."""

    def __init__(self, chunk: Any, tp: dist.ProcessGroup) -> None:
        self._embedding, self._tp = chunk.embedding, tp

    def __call__(self, tokens: Tensor, step: Step) -> Tensor:
        """``[rows, sequence]`` to ``[rows, sequence, hidden]``."""
        weight = self._embedding.word_embeddings.weight
        if self._tp.size() == 1:
            hidden = F.embedding(tokens, weight)
        else:
            local = tokens - self._tp.rank() * weight.size(0)
            elsewhere = (local < 0) | (local >= weight.size(0))
            hidden = F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0)
            hidden = peer_sum.all_reduce(hidden, self._tp)
        if self._embedding.add_position_embedding:
            hidden = hidden + self._embedding.position_embeddings(step.positions)
        return hidden


class Head:
    """The final norm and the vocabulary of a chunk that ends a model."""

    def __init__(
        self, chunk: Any, norm: torch.nn.Module, config: GPTConfig | T5Config, tp: dist.ProcessGroup, scale: float = 1.0
    ) -> None:
        self._chunk, self._norm, self._tp, self._scale = chunk, norm, tp, scale
        self._tied, self._vocab_size = config.share_embeddings_and_output_weights, config.vocab_size

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        """Logits ``[rows, vocab_size]`` in fp32 of the position that is wanted of ``[rows, sequence, hidden]``."""
        if step.last is None:
            hidden = hidden[:, 0]
        else:
            hidden = hidden[torch.arange(hidden.size(0), device=hidden.device), step.last]
        hidden = self._norm(hidden)
        if self._scale != 1.0:
            hidden = hidden * self._scale
        weight = self._chunk.shared_embedding_or_output_weight() if self._tied else self._chunk.output_layer.weight
        return gather_columns(project(hidden, weight), self._tp)[:, : self._vocab_size].float()
