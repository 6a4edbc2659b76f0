"""What generation gives back. Plain Python values, so that they print, pickle and serialise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Generation(NamedTuple):
    """One generated sequence. Not a dataclass, since Lightning's ``predict`` refuses frozen ones."""

    prompt: tuple[int, ...]
    """Token ids of the prompt, with the beginning-of-sequence token if one was added.
    Of an encoder-decoder, its decoder's start token."""
    new_tokens: tuple[int, ...]
    """What was generated, with the stop token if there was one."""
    finish_reason: Literal["stop", "length"]
    """``stop`` after a stop token, ``length`` at the most tokens that were asked for."""
    log_probs: tuple[float, ...] | None = None
    """The log-probability of each new token, if asked for."""
    score: float | None = None
    """Of a beam: the sum of its log-probabilities over ``length ** length_penalty``."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt and what follows; for an encoder-decoder, what the decoder wrote."""
        return self.prompt + self.new_tokens


@dataclass(frozen=True, slots=True)
class NewTokens:
    """One step of streaming: the next token of each sequence that is not finished."""

    step: int
    """How many tokens came before."""
    rows: tuple[int, ...]
    """Which sequences: indices into the list that ``generate`` would return."""
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...] | None
    finished: tuple[bool, ...]
    """Whether a sequence ends with this token."""
