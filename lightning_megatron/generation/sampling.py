"""From logits to tokens: pure functions of tensors, the same on every device.

Where both are given, filters apply as in Hugging Face: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NEVER = float("-inf")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of tokens seen before by ``penalty``, multiply negative ones (arXiv:1909.05858).

    Args:
        logits: ``[rows, vocab]``
        seen: ``[rows, vocab]``, ``True`` for tokens of a row's prompt and of its text so far.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the ``k`` likeliest tokens of ``[rows, vocab]``, and those equal to the k-th, keep their logits."""
    least = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < least, _NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Only the fewest likeliest tokens of ``[rows, vocab]`` whose probabilities sum to ``p`` keep their logits.

    The likeliest always does.
    """
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    # The token that carries the sum over p belongs to the set, so each looks at the sum before itself.
    drop = probabilities.cumsum(-1) - probabilities >= p
    drop[:, 0] = False
    return logits.masked_fill(drop.scatter(1, order, drop), _NEVER)


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits ``[rows, vocab]`` of the distribution to draw from; zeros for ``top_k`` and ``top_p`` filter nothing."""
    if temperature != 1.0:
        logits = logits / temperature
    if top_k > 0:
        logits = keep_top_k(logits, top_k)
    if 0.0 < top_p < 1.0:
        logits = keep_top_p(logits, top_p)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token of each row by the inverse of its cumulative distribution.

    Unlike ``torch.multinomial``, the draw is a function of numbers that come from outside: it is the same on a CPU and
    a GPU, on each rank that makes it, and in whatever batch a row stands. Sums are in fp64, where 50,000 probabilities
    leave no visible error.

    Args:
        logits: ``[rows, vocab]``
        uniform: ``[rows]`` in fp64, each in [0, 1).

    Returns:
        ``[rows]``
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    # A uniform within rounding of 1 could land behind the last token that has a probability.
    last = logits.size(-1) - 1 - (logits > _NEVER).flip(-1).int().argmax(-1)
    return torch.minimum(tokens, last)


def uniforms(seed: int, rows: list[int], steps: int) -> Tensor:
    """Numbers to draw with, ``[len(rows), steps]`` in fp64. Row ``r`` has its own stream, whatever is beside it."""
    streams = []
    for row in rows:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
        streams.append(torch.rand(steps, dtype=torch.float64, generator=generator))
    return torch.stack(streams)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability ``[rows]`` of each row's token."""
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


def seen_tokens(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Which tokens each prompt holds, ``[len(prompts), vocab]``, on the device of ``logits`` ``[rows, vocab]``."""
    seen = torch.zeros(len(prompts), logits.size(-1), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen.to(logits.device)
