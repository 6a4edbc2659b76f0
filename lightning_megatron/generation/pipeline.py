"""One forward pass through all pipeline stages, and word from the last stage to the others."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends.core import ProcessGroupCollection
from lightning_megatron.generation.protocol import Decoder, Step


class Pipeline:
    """Runs a decoder's chunks in the order of the model, over the stages.

    Interleaved chunks go around the ring of stages once for each chunk.
    """

    def __init__(self, decoder: Decoder, groups: ProcessGroupCollection) -> None:
        self._decoder = decoder
        self._group = groups.pp
        self._rank, self._size = groups.pp.rank(), groups.pp.size()

    @property
    def is_last(self) -> bool:
        """Whether this rank gets the logits."""
        return self._rank == self._size - 1

    def __call__(self, tokens: Tensor, step: Step) -> Tensor | None:
        """Logits ``[rows, vocab]`` on the last stage, ``None`` on others, of ``tokens`` ``[rows, sequence]``."""
        out: Tensor | None = None
        for chunk in range(self._decoder.num_chunks):
            first = chunk == 0 and self._rank == 0
            inputs = tokens if first else self._receive(tokens.shape)
            out = self._decoder.forward(chunk, inputs, step)
            if not (self.is_last and chunk == self._decoder.num_chunks - 1):
                dist.send(out.contiguous(), group=self._group, group_dst=(self._rank + 1) % self._size)
        return out if self.is_last else None

    def _receive(self, shape: torch.Size) -> Tensor:
        decoder = self._decoder
        hidden = torch.empty((*shape, decoder.hidden_size), dtype=decoder.dtype, device=decoder.device)
        dist.recv(hidden, group=self._group, group_src=(self._rank - 1) % self._size)
        return hidden

    def share(self, tensor: Tensor) -> Tensor:
        """Fill ``tensor`` with the last stage's, on every stage."""
        if self._size > 1:
            dist.broadcast(tensor, group=self._group, group_src=self._size - 1)
        return tensor
