"""Decoding with the chunks of a GPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends import peer_sum
from lightning_megatron.backends.core import ProcessGroupCollection
from lightning_megatron.generation.ends import Embedding, Head
from lightning_megatron.generation.layers import DecodingLayer, DistanceBias, KVCache, Rotary
from lightning_megatron.generation.protocol import Step
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.models.position_bias import alibi_bias


class GPTDecoder:
    """The :class:`~lightning_megatron.generation.Decoder` of a :class:`~lightning_megatron.GPTModule`.

    Raises:
        ModuleError: layers that decoding does not know.
    """

    def __init__(self, chunks: Sequence[Any], config: GPTConfig, groups: ProcessGroupCollection) -> None:
        peer_sum.connect(groups.tp)
        weight = next(chunks[0].parameters())
        self.num_chunks = len(chunks)
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_position_embeddings
        self.is_encoder_decoder = False
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
        self._embed = Embedding(chunk, tp) if chunk.pre_process else None
        self._logits = Head(chunk, chunk.decoder.final_layernorm, config, tp) if chunk.post_process else None
        self._rotary = _rotary(chunk, config, dtype, device)
        self.layers = [
            DecodingLayer(layer, index, tp, self._rotary) for index, layer in enumerate(chunk.decoder.layers)
        ]
        self._bias = _alibi(chunk, config, dtype, device)
        # A stage of an uneven pipeline may hold the embedding or the output alone.
        self.groups = self.layers[0].groups if self.layers else 1
        self.head_size = self.layers[0].head_size if self.layers else 1
        self.cache_width = len(self.layers) * self.groups * self.head_size

    def __call__(self, inputs: Tensor, cache: KVCache, step: Step) -> Tensor:
        hidden = inputs if self._embed is None else self._embed(inputs, step)
        table = None if self._rotary is None else self._rotary.at(step.positions)
        bias = None if self._bias is None else self._bias.at(step)
        for layer in self.layers:
            hidden = layer(hidden, cache, step, table, bias)
        return hidden if self._logits is None else self._logits(hidden, step)


def _rotary(chunk: Any, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> Rotary | None:
    if config.position_embedding_type != "rope":
        return None
    # Outside inference mode: megatron-core keeps what it computes here, and training reads it later. The angles of a
    # whole sequence, not of a context-parallel rank's part.
    with torch.inference_mode(False), torch.no_grad():
        angles = chunk.rotary_pos_emb(config.max_position_embeddings, packed_seq=True)
    return Rotary(angles[:, 0, 0].to(device), dtype)


def _alibi(chunk: Any, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> DistanceBias | None:
    if config.position_embedding_type != "alibi" or not len(chunk.decoder.layers):
        return None
    slopes = chunk.decoder.layers[0].self_attention.core_attention.slopes
    return DistanceBias(alibi_bias(slopes, config.max_position_embeddings), dtype, device)
