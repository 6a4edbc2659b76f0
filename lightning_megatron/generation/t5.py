"""Decoding with the chunks of a T5: one pass of the encoder, whose output every layer of the decoder keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends.core import ProcessGroupCollection
from lightning_megatron.generation.ends import Embedding, Head
from lightning_megatron.generation.layers import DecodingLayer, DistanceBias, KVCache
from lightning_megatron.generation.protocol import Step
from lightning_megatron.models.config import T5Config


class T5Decoder:
    """The :class:`~lightning_megatron.generation.Decoder` of a ``T5Module``.

    While encoding, hidden states go through the chunks of the encoder, then, unchanged, through those of the decoder,
    whose layers take their keys and values from them. While decoding, the encoder's chunks pass tokens' states on.
    """

    def __init__(self, chunks: Sequence[Any], config: T5Config, groups: ProcessGroupCollection) -> None:
        weight = next(chunks[0].parameters())
        self.num_chunks = len(chunks)
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_position_embeddings
        self.is_encoder_decoder = True
        self._start = config.decoder_start_token_id
        self.dtype, self.device = weight.dtype, weight.device
        self._chunks = [_Chunk(chunk, config, groups.tp) for chunk in chunks]
        self._caches: list[KVCache] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The start token for each prompt."""
        return [(self._start,) for _ in prompts]

    def cache_bytes(self, rows: int, slots: int) -> int:
        """Keys and values of this rank's layers of the decoder, without those of what the encoder gives."""
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
        """Row ``i`` of the caches becomes a copy of row ``rows[i]``, of the same prompt."""
        for cache in self._caches:
            cache.select(rows, used)

    def release(self) -> None:
        """Drop the caches, and what the encoder gave."""
        self._caches = []
        for chunk in self._chunks:
            for layer in chunk.layers:
                layer.forget()


class _Chunk:
    def __init__(self, chunk: Any, config: T5Config, tp: dist.ProcessGroup) -> None:
        self._chunk = chunk
        self._max_positions = config.max_position_embeddings
        self._embed = Embedding(chunk, tp) if chunk.pre_process else None
        self._logits: Head | None = None
        if chunk.post_process:
            scale = config.hidden_size**-0.5 if config.scale_decoder_output else 1.0
            self._logits = Head(chunk, chunk.decoder.final_layernorm, config, tp, scale)
        self._encoder = [DecodingLayer(layer, index, tp, None) for index, layer in enumerate(chunk.encoder.layers)]
        self.layers = [DecodingLayer(layer, index, tp, None) for index, layer in enumerate(chunk.decoder.layers)]
        self.groups = self.layers[0].groups if self.layers else 1
        self.head_size = self.layers[0].head_size if self.layers else 1
        self.cache_width = len(self.layers) * self.groups * self.head_size

    def __call__(self, inputs: Tensor, cache: KVCache, step: Step) -> Tensor:
        hidden = inputs if self._embed is None else self._embed(inputs, step)
        if step.encoding:
            return self._encode(hidden, cache, step)
        bias = self._bias(self._chunk.decoder_position_bias, step) if self.layers else None
        for layer in self.layers:
            hidden = layer(hidden, cache, step, None, bias)
        return hidden if self._logits is None else self._logits(hidden, step)

    def _encode(self, hidden: Tensor, cache: KVCache, step: Step) -> Tensor:
        bias = self._bias(self._chunk.encoder_position_bias, step) if self._encoder else None
        for layer in self._encoder:
            hidden = layer(hidden, cache, step, None, bias)
        if self._chunk.encoder.final_layernorm is not None:
            hidden = self._chunk.encoder.final_layernorm(hidden)
        for layer in self.layers:
            layer.look_at(hidden, step.visible)
        return hidden

    def _bias(self, table: Any, step: Step) -> Tensor | None:
        if table is None:
            return None
        # From the weights of now, for the longest sequence, so that a recorded step sees a table of one size. Outside
        # inference mode: the module keeps buckets that training reads later.
        with torch.inference_mode(False), torch.no_grad():
            by_distance = table(self._max_positions)
        return DistanceBias(by_distance, by_distance.dtype, by_distance.device).at(step)
