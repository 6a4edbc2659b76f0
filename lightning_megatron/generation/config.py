"""How to generate: one frozen dataclass, standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: object, least: int, most: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not fits:
        upper = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r}, but must be a whole number {upper}.")


def _within(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if not (_is_number(value) and (low < value if above else low <= value) and value <= high):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}, but must be a number in {'(' if above else '['}{low:g}, {high:g}].")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """What to generate, and how to choose tokens. Greedy unless ``do_sample`` or ``num_beams`` say otherwise.

    Names and ranges are those of Megatron's text generation and of Hugging Face's ``generate``.

    Raises:
        ValueError: a value out of range, or two that exclude each other; the message names them.
    """

    max_new_tokens: int | None = None
    """The most tokens after each prompt."""
    max_length: int | None = None
    """The most tokens of each prompt and what follows together. Give either this or ``max_new_tokens``."""
    stop_tokens: Sequence[int] = ()
    """A sequence ends with the first of these that it generates."""
    bos_token: int | None = None
    """A token put before each prompt."""

    do_sample: bool = False
    """Draw tokens instead of taking the likeliest."""
    temperature: float = 1.0
    """Divides the logits before the filters below; in (0, 100]."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is all of them, at most 1000."""
    top_p: float = 0.0
    """Draw from the fewest likeliest tokens whose probabilities sum to this (arXiv:1904.09751); 0 is all of them."""
    top_p_decay: float = 0.0
    """Multiplies ``top_p`` after every token (arXiv:2206.04624); 0 leaves it as it is."""
    top_p_bound: float = 0.0
    """The least that ``top_p_decay`` makes of ``top_p``."""
    seed: int = 0
    """Of the draws. A prompt's text depends on this and its place in the list alone, at any layout and batch."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens of the prompt and of the text so far less likely (arXiv:1909.05858)."""

    num_beams: int = 1
    """Width of beam search; 1 is none."""
    length_penalty: float = 1.0
    """Beams are ranked by the sum of log-probabilities over ``length ** length_penalty``."""
    early_stopping: bool | Literal["never"] = False
    """When beam search ends, as in Hugging Face: once ``num_beams`` sequences are complete (``True``), when better ones
    are unlikely (``False``), or when there cannot be better ones (``"never"``)."""

    num_return_sequences: int = 1
    """Sequences for each prompt: as many draws, or the best beams."""
    log_probs: bool = False
    """Also return the log-probability that the model gave each new token, before temperature and filters."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        self._check_length()
        _within("temperature", self.temperature, 0, 100, above=True)
        _whole("top_k", self.top_k, 0, 1000)
        for name in ("top_p", "top_p_decay", "top_p_bound"):
            _within(name, getattr(self, name), 0, 1)
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty!r}, but must be a number above 0.")
        _whole("seed", self.seed, 0, 2**63 - 1)
        for name in ("num_beams", "num_return_sequences"):
            _whole(name, getattr(self, name), 1)
        if not _is_number(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty!r}, but must be a number.")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r} is none of True, False, 'never'.")
        for token in (*self.stop_tokens, *(() if self.bos_token is None else (self.bos_token,))):
            _whole("a token of stop_tokens or bos_token", token, 0)
        self._check_strategy()

    def _check_length(self) -> None:
        given = [name for name in ("max_new_tokens", "max_length") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"Give one of max_new_tokens and max_length, but they are {self.max_new_tokens!r} and "
                f"{self.max_length!r}."
            )
        _whole(given[0], getattr(self, given[0]), 1)

    def _check_strategy(self) -> None:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"num_beams={self.num_beams} with do_sample=True: beam search is deterministic. Choose one of the two."
            )
        if not self.do_sample:
            defaults = {"temperature": 1.0, "top_k": 0, "top_p": 0.0}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} changes nothing unless tokens are drawn. Set do_sample=True."
                    )
        for name in ("top_p_decay", "top_p_bound"):
            if getattr(self, name) > 0 and self.top_p == 0:
                raise ValueError(f"{name}={getattr(self, name)!r} needs top_p, which is 0.")
        if self.top_p_bound > self.top_p:
            raise ValueError(f"top_p_bound={self.top_p_bound!r} is above top_p={self.top_p!r}.")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}. Set "
                "do_sample=True to draw several sequences, or more beams."
            )
        if self.log_probs and self.num_beams > 1:
            raise ValueError("log_probs=True is for greedy and sampled tokens; beams have a score each.")

    def top_p_at(self, step: int) -> float:
        """``top_p`` for the token after ``step`` new ones."""
        if self.top_p_decay == 0.0:
            return self.top_p
        return max(self.top_p * self.top_p_decay**step, self.top_p_bound)

    def limit(self, prompt_length: int) -> int:
        """The most new tokens after a prompt of this length; zero or less when the prompt is too long."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        assert self.max_length is not None
        return self.max_length - prompt_length

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)
