"""Beam search over a step function: it sees logits and says which beams go on. Knows no model and no ranks.

Token for token what Hugging Face's ``generate(num_beams=...)`` finds, with one difference: a batch of unequal prompts
gives each prompt what it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_megatron.generation import sampling
from lightning_megatron.generation.config import GenerationConfig

_HOPELESS = -1.0e9


@dataclass(frozen=True, slots=True)
class Beam:
    """A complete sequence."""

    tokens: list[int]
    """Those after the prompt."""
    score: float
    stopped: bool
    """Whether it ends with a stop token."""


class BeamSearch:
    """State of a search for several prompts, ``num_beams`` each.

    Args:
        prompts: token ids, for the repetition penalty.
        limits: the most new tokens for each prompt.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], config: GenerationConfig, device: torch.device
    ) -> None:
        self._config = config
        self._prompts = prompts
        batch, beams, self._steps = len(prompts), config.num_beams, max(limits)
        self._limits = torch.tensor(limits, device=device)[:, None]
        self._stops = torch.tensor(config.stop_tokens, dtype=torch.long, device=device)
        # The next tokens may all be stops, and the search must go on with as many beams.
        self._candidates = max(2, 1 + len(config.stop_tokens)) * beams
        self._first = torch.arange(batch, device=device)[:, None] * beams
        self._length = 0
        self._seen: Tensor | None = None
        # Beams that go on. All start equal, so only the first of each prompt may be continued at first.
        self._texts = torch.zeros(batch, beams, self._steps, dtype=torch.long, device=device)
        self._sums = torch.full((batch, beams), _HOPELESS, device=device)
        self._sums[:, 0] = 0.0
        # The best complete sequences so far.
        self._complete = torch.zeros_like(self._texts)
        self._scores = torch.full((batch, beams), _HOPELESS, device=device)
        self._lengths = torch.zeros(batch, beams, dtype=torch.long, device=device)
        self._is_complete = torch.zeros(batch, beams, dtype=torch.bool, device=device)
        self._open = torch.ones(batch, 1, dtype=torch.bool, device=device)

    @property
    def done(self) -> bool:
        """Whether no prompt's result can change any more."""
        return not bool(self._open.any())

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Continue every beam by one token.

        Args:
            logits: ``[prompts * beams, vocab]``

        Returns:
            The token that each beam now ends with, and the row of ``logits`` that it continues, each
            ``[prompts * beams]``.
        """
        batch, beams = self._sums.shape
        vocab = logits.size(-1)
        log_probs = self._penalise(logits.log_softmax(-1)).view(batch, beams, vocab)
        sums = (log_probs + self._sums[:, :, None]).view(batch, -1)
        sums, index = sums.topk(min(self._candidates, sums.size(1)))
        parents, tokens = index // vocab, index % vocab
        texts = _take(self._texts, parents)
        texts[:, :, self._length] = tokens
        self._length += 1
        ends = torch.isin(tokens, self._stops) | (self._length >= self._limits)
        self._collect(texts, sums, ends)

        going_on = sums + ends * _HOPELESS
        order = going_on.topk(beams).indices
        self._texts, self._sums = _take(texts, order), going_on.gather(1, order)
        self._close(ends)
        source = self._first + parents.gather(1, order)
        if self._seen is not None:
            self._seen = self._seen[source.flatten()]
            self._seen.scatter_(1, tokens.gather(1, order).view(-1, 1), True)
        return tokens.gather(1, order).flatten(), source.flatten()

    def _penalise(self, log_probs: Tensor) -> Tensor:
        penalty = self._config.repetition_penalty
        if penalty == 1.0:
            return log_probs
        if self._seen is None:
            seen = sampling.seen_tokens(self._prompts, log_probs)
            self._seen = seen.repeat_interleave(self._config.num_beams, 0)
        return sampling.penalise_repetition(log_probs, self._seen, penalty)

    def _collect(self, texts: Tensor, sums: Tensor, ends: Tensor) -> None:
        """Merge candidates that end here into the best complete sequences."""
        beams, config = self._sums.size(1), self._config
        # Candidates beyond the first `num_beams` only stand by for those that end.
        counts = ends.clone()
        counts[:, beams:] = False
        counts &= self._open
        scores = torch.where(counts, sums / self._length**config.length_penalty, 2 * _HOPELESS)
        all_scores = torch.cat((self._scores, scores), dim=1)
        order = all_scores.topk(beams).indices
        self._complete = _take(torch.cat((self._complete, texts), dim=1), order)
        lengths = torch.full_like(sums, self._length, dtype=torch.long)
        self._lengths = torch.cat((self._lengths, lengths), dim=1).gather(1, order)
        self._is_complete = torch.cat((self._is_complete, counts), dim=1).gather(1, order)
        self._scores = all_scores.gather(1, order)

    def _close(self, ends: Tensor) -> None:
        """Find out which prompts could still get better sequences."""
        config = self._config
        longest: Tensor | int = self._length
        if config.early_stopping == "never" and config.length_penalty > 0:
            longest = self._limits
        best_to_come = self._sums[:, :1] / longest**config.length_penalty
        worst = torch.where(self._is_complete, self._scores.min(1, keepdim=True).values, _HOPELESS)
        self._open &= (best_to_come > worst).any(1, keepdim=True) & ~ends.all(1, keepdim=True)
        if config.early_stopping is True:
            self._open &= ~self._is_complete.all(1, keepdim=True)

    def best(self) -> list[list[Beam]]:
        """The best ``num_return_sequences`` of each prompt, best first."""
        found = []
        rows = zip(self._complete.tolist(), self._lengths.tolist(), self._scores.tolist(), strict=True)
        for texts, lengths, scores in rows:
            beams = []
            for text, length, score in list(zip(texts, lengths, scores, strict=True))[
                : self._config.num_return_sequences
            ]:
                tokens = text[:length]
                beams.append(Beam(tokens, score, bool(tokens) and tokens[-1] in self._config.stop_tokens))
            found.append(beams)
        return found


def _take(texts: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[prompts, n]`` of ``[prompts, m, steps]``."""
    return texts.gather(1, index[:, :, None].expand(-1, -1, texts.size(-1)))
