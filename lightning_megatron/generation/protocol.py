"""What the engine asks of a model: forward passes of this rank's chunks over a cache, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """Which positions a forward pass is about.

    Prompts stand at the left of their rows: token ``i`` of a row has position ``i`` and slot ``i`` of the cache, at any
    length of the others. What is to the right of a shorter prompt is never seen: causality hides it from the prompt's
    own tokens, and each new token overwrites one slot of it and sees none beyond.
    """

    positions: Tensor
    """``[rows, sequence]``; all of a prompt's, or the one of a new token."""
    keys: int
    """How many slots of the cache attention reads."""
    offset: int | None
    """The first position if all rows agree, so that slices can do what indices otherwise must."""
    visible: Tensor | None = None
    """``[rows, 1, 1, keys]``: ``True`` where a new token, or one of an encoder, may look, or what is added to scores.
    ``None`` is everywhere."""
    last: Tensor | None = None
    """``[rows]``: in a prompt, which position's logits are wanted. ``None`` is the only one."""
    encoding: bool = False
    """Whether an encoder reads what the decoder will look back at."""

    @property
    def is_prompt(self) -> bool:
        """Whether this pass fills the cache, rather than extends it."""
        return self.last is not None


class Decoder(Protocol):
    """This rank's chunks of one model, decoding. The engine drives it; a module's ``build_decoder`` makes it.

    Chunk ``c`` of pipeline rank ``p`` is part ``c * pipeline_size + p`` of the model; parts run in that order.
    """

    num_chunks: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    """The longest sequence."""
    is_encoder_decoder: bool
    """Whether the model first runs with ``Step.encoding`` over the prompts; that pass gives nothing."""
    dtype: torch.dtype
    device: torch.device

    def begin(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """What the decoder reads first: the prompts, or the start token of an encoder-decoder for each."""
        ...

    def cache_bytes(self, rows: int, slots: int) -> int:
        """The memory that :meth:`allocate` takes on this rank."""
        ...

    def allocate(self, rows: int, slots: int) -> None:
        """Make room for ``slots`` tokens of each of ``rows`` sequences."""
        ...

    def forward(self, chunk: int, inputs: Tensor, step: Step) -> Tensor:
        """Run one chunk, reading and writing the cache.

        Args:
            inputs: token ids ``[rows, sequence]`` for the first part of the model, else ``[rows, sequence, hidden]``.

        Returns:
            ``[rows, sequence, hidden]``, or from the last part logits ``[rows, vocab_size]`` in fp32, the same on every
            tensor-parallel rank.
        """
        ...

    def select(self, rows: Tensor, used: int) -> None:
        """Make row ``i`` of the cache a copy of row ``rows[i]``, of which the first ``used`` slots matter."""
        ...

    def release(self) -> None:
        """Give the cache back."""
        ...
