"""Decoding with the chunks of a GPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends.core import ProcessGroupCollection
from lightning_megatron.generation.layers import DecodingLayer, KVCache, Rotary, gather_columns
from lightning_megatron.generation.protocol import Step
from lightning_megatron.models.config import GPTConfig


class GPTDecoder:
    """This rank's chunks of a :class:`~lightning_megatron.GPTModule`: a :class:`~lightning_megatron.generation.Decoder`.

    Raises:
        ModuleError: layers that decoding does not know.
    """

    def __init__(self, chunks: Sequence[Any], config: GPTConfig, groups: ProcessGroupCollection) -> None:
        weight = next(chunks[0].parameters())
        self.num_chunks = len(chunks)
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_position_embeddings
        self.dtype, self.device = weight.dtype, weight.device
        self._chunks = [_Chunk(chunk, config, groups.tp, self.dtype, self.device) for chunk in chunks]
        self._caches: list[KVCache] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The prompts themselves."""
        return [tuple(prompt) for prompt in prompts]

    def cache_bytes(self, rows: int, slots: int) -> int:
        """Keys and values of this rank's layers."""
        return sum(chunk.cache_width for chunk in self._chunks) * 2 * rows * slots * self.dtype.itemsize

    def allocate(self, rows: int, slots: int) -> None:
        """Make room for ``slots`` tokens of each of ``rows`` sequences."""
        self._caches = [
            KVCache((len(chunk.layers), rows, chunk.groups, slots, chunk.head_size), self.dtype, self.device)
            for chunk in self._chunks
        ]

    def forward(self, chunk: int, inputs: Tensor, step: Step) -> Tensor:
        """See :class:`~lightning_megatron.generation.Decoder`."""
        return self._chunks[chunk](inputs, self._caches[chunk], step)

    def select(self, rows: Tensor, used: int) -> None:
        """Row ``i`` of the caches becomes a copy of row ``rows[i]``."""
        for cache in self._caches:
            cache.select(rows, used)

    def release(self) -> None:
        """Drop the caches."""
        self._caches = []


class _Chunk:
    def __init__(
        self, chunk: Any, config: GPTConfig, tp: dist.ProcessGroup, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tp = tp
        self._vocab_size = config.vocab_size
        self._embedding = chunk.embedding if chunk.pre_process else None
        self._final_norm = chunk.decoder.final_layernorm if chunk.post_process else None
        self._tied, self._chunk = config.share_embeddings_and_output_weights, chunk
        self._rotary = _rotary(chunk, config, dtype, device)
        self.layers = [
            DecodingLayer(layer, index, tp, self._rotary) for index, layer in enumerate(chunk.decoder.layers)
        ]
        # A stage of an uneven pipeline may hold the embedding or the output alone.
        self.groups = self.layers[0].groups if self.layers else 1
        self.head_size = self.layers[0].head_size if self.layers else 1
        self.cache_width = len(self.layers) * self.groups * self.head_size

    def __call__(self, inputs: Tensor, cache: KVCache, step: Step) -> Tensor:
        hidden = inputs if self._embedding is None else self._embed(inputs, step)
        table = None if self._rotary is None else self._rotary.at(step.positions)
        for layer in self.layers:
            hidden = layer(hidden, cache, step, table, None)
        return hidden if self._final_norm is None else self._logits(hidden, step)

    def _embed(self, tokens: Tensor, step: Step) -> Tensor:
        assert self._embedding is not None
        weight = self._embedding.word_embeddings.weight
        if self._tp.size() == 1:
            hidden = F.embedding(tokens, weight)
        else:
            local = tokens - self._tp.rank() * weight.size(0)
            elsewhere = (local < 0) | (local >= weight.size(0))
            hidden = F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0)
            dist.all_reduce(hidden, group=self._tp)
        if self._embedding.add_position_embedding:
            hidden = hidden + self._embedding.position_embeddings(step.positions)
        return hidden

    def _logits(self, hidden: Tensor, step: Step) -> Tensor:
        assert self._final_norm is not None
        if step.last is not None:
            hidden = hidden[torch.arange(hidden.size(0), device=hidden.device), step.last]
        else:
            hidden = hidden[:, 0]
        chunk = self._chunk
        weight = chunk.shared_embedding_or_output_weight() if self._tied else chunk.output_layer.weight
        part = F.linear(self._final_norm(hidden), weight)
        return gather_columns(part, self._tp)[:, : self._vocab_size].float()


def _rotary(chunk: Any, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> Rotary | None:
    if config.position_embedding_type != "rope":
        return None
    # Outside inference mode: megatron-core keeps what it computes here, and training reads it later. The angles of a
    # whole sequence, not of a context-parallel rank's part.
    with torch.inference_mode(False), torch.no_grad():
        angles = chunk.rotary_pos_emb(config.max_position_embeddings, packed_seq=True)
    return Rotary(angles[:, 0, 0].to(device), dtype)
