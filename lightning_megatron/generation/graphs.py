"""The step of a new token as a CUDA graph: one launch instead of hundreds, which cost more than the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.groups import release_before_groups_end
from lightning_megatron.generation.protocol import Decoder, Step

_BUCKET = 128
"""A graph reads a fixed number of keys, so there is one for every so many tokens of length."""
_WARM_UP_RUNS = 2


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    positions: Tensor
    output: Tensor


class GraphedDecoder:
    """A decoder whose passes over single new tokens are recorded once and replayed.

    Recordings hold addresses of the cache and the weights; both stay while calls have the same rows, and no more slots.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.num_chunks = decoder.num_chunks
        self.hidden_size = decoder.hidden_size
        self.vocab_size = decoder.vocab_size
        self.max_positions = decoder.max_positions
        self.is_encoder_decoder = decoder.is_encoder_decoder
        self.dtype, self.device = decoder.dtype, decoder.device
        self._size = (0, 0)
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._pool: Any = None
        release_before_groups_end(self)  # tensor parallelism records its collectives too

    def begin(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """As the decoder's."""
        return self._decoder.begin(prompts)

    def cache_bytes(self, rows: int, slots: int) -> int:
        """As the decoder's, for whole buckets."""
        return self._decoder.cache_bytes(rows, _whole_buckets(slots))

    def allocate(self, rows: int, slots: int) -> None:
        """Keep the cache if it is large enough and has this many rows."""
        slots = _whole_buckets(slots)
        if self._decoder.is_encoder_decoder:
            self.release()  # recordings hold the address of what the encoder wrote
        if self._size[0] == rows and self._size[1] >= slots:
            return
        self.release()
        self._decoder.allocate(rows, slots)
        self._size = (rows, slots)

    def select(self, rows: Tensor, used: int) -> None:
        """As the decoder's."""
        self._decoder.select(rows, used)

    def release(self) -> None:
        """Drop the cache and the recordings."""
        self._recorded = {}
        self._pool = None
        self._size = (0, 0)
        self._decoder.release()

    def forward(self, chunk: int, inputs: Tensor, step: Step) -> Tensor:
        """As the decoder's. The output of a new token is overwritten by the next one's."""
        if step.is_prompt or step.encoding:
            return self._decoder.forward(chunk, inputs, step)
        key = (chunk, _whole_buckets(step.keys))
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._record(*key, inputs, step.positions)
        recorded.inputs.copy_(inputs)
        recorded.positions.copy_(step.positions)
        recorded.graph.replay()
        return recorded.output

    def _record(self, chunk: int, keys: int, inputs: Tensor, positions: Tensor) -> _Recorded:
        inputs, positions = inputs.clone(), positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries make their workspaces before the recording
            for _ in range(_WARM_UP_RUNS):
                self._run(chunk, keys, inputs, positions)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may go on calling CUDA.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._run(chunk, keys, inputs, positions)
        self._pool = graph.pool()
        return _Recorded(graph, inputs, positions, output)

    def _run(self, chunk: int, keys: int, inputs: Tensor, positions: Tensor) -> Tensor:
        hidden = torch.arange(keys, device=self.device) > positions[:, :, None, None]
        # Added to scores: attention would make the same of a boolean mask, once in each layer.
        floor = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return self._decoder.forward(chunk, inputs, Step(positions, keys=keys, offset=None, visible=floor))


def _whole_buckets(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET
