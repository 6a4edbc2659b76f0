"""The decoding loop: prompts through the pipeline once, then token after token. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends.core import ProcessGroupCollection
from lightning_megatron.generation import sampling
from lightning_megatron.generation.beam import BeamSearch
from lightning_megatron.generation.config import GenerationConfig
from lightning_megatron.generation.graphs import GraphedDecoder
from lightning_megatron.generation.pipeline import Pipeline
from lightning_megatron.generation.protocol import Decoder, Step
from lightning_megatron.generation.result import Generation, NewTokens

_PADDING = 0
# Reading "is everyone finished" makes the host wait for the device, which could otherwise run ahead.
_STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 16}


class GenerationError(RuntimeError):
    """Generation that could not go on, such as for want of memory."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Sizes of one call. A row is one sequence; a prompt with several of them has its rows side by side."""

    prompts: list[tuple[int, ...]]
    """What the decoder reads first, one for each prompt."""
    sources: list[tuple[int, ...]]
    """What the encoder reads, if there is one."""
    copies: int
    """Rows of each prompt."""
    limits: list[int]
    """The most new tokens of each row."""

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.copies

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts))

    @property
    def aligned(self) -> bool:
        return len({len(prompt) for prompt in self.prompts}) == 1

    @property
    def steps(self) -> int:
        return max(self.limits)

    @property
    def slots(self) -> int:
        """Of the cache: nothing is computed from a row's last token."""
        lengths = [len(prompt) for prompt in self.prompts for _ in range(self.copies)]
        return max(length + limit - 1 for length, limit in zip(lengths, self.limits, strict=True))


class Engine:
    """Generates with one decoder. Keep it to generate often: on a GPU it keeps the cache and the recorded steps.

    Every rank of a replica calls the same method with the same arguments.

    Args:
        decoder: this rank's part of the model.
        groups: process groups of the replica.
        cuda_graphs: record the step of a new token and replay it, on CUDA; on every rank of the replica or on none.
    """

    def __init__(self, decoder: Decoder, groups: ProcessGroupCollection, *, cuda_graphs: bool = False) -> None:
        self.decoder: Decoder = GraphedDecoder(decoder) if cuda_graphs else decoder
        self.groups = groups
        self._pipeline = Pipeline(self.decoder, groups)

    # ------------------------------------------------------------------ what callers use

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        rows: Sequence[int] | None = None,
        on_tokens: Callable[[NewTokens], None] | None = None,
    ) -> list[Generation]:
        """Generate after checked prompts (see :func:`~lightning_megatron.generation.prompts.check_prompts`).

        Args:
            rows: the number of each prompt, which together with the seed decides its draws; ``None`` counts them.
            on_tokens: called with each new token as it comes; not with beams, which are known at the end only.

        Returns:
            ``num_return_sequences`` for each prompt, side by side.

        Raises:
            GenerationError: the cache does not fit into memory; on every rank of the replica.
        """
        if config.num_beams > 1:
            return self._beams(prompts, config)
        plan = self._plan(prompts, config, copies=config.num_return_sequences)
        tokens, log_probs = [], []
        news = _News(plan, config)
        for new, log_prob in self._steps(plan, config, rows):
            tokens.append(new)
            log_probs.append(log_prob)
            if on_tokens is not None:
                on_tokens(news(new, log_prob))
        return _generations(plan, config, prompts, tokens, log_probs)

    def stream(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, rows: Sequence[int] | None = None
    ) -> Iterator[NewTokens]:
        """As :meth:`generate`, yielding each token as it comes. Every rank of the replica must go on to the end."""
        plan = self._plan(prompts, config, copies=config.num_return_sequences)
        news = _News(plan, config)
        for new, log_prob in self._steps(plan, config, rows):
            yield news(new, log_prob)

    # ------------------------------------------------------------------------- the loop

    def _plan(self, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, copies: int) -> _Plan:
        starts = self.decoder.begin(prompts)
        limits = [config.limit(len(start)) for start in starts for _ in range(copies)]
        sources = [tuple(prompt) for prompt in prompts] if self.decoder.is_encoder_decoder else []
        return _Plan(starts, sources, copies, limits)

    @torch.inference_mode()
    def _steps(
        self, plan: _Plan, config: GenerationConfig, rows: Sequence[int] | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """New tokens ``[rows]`` and their log-probabilities, until every row is finished. The last stage chooses."""
        device = self.decoder.device
        choose = _Chooser(plan, config, rows, device) if self._pipeline.is_last else None
        stops = torch.tensor(config.stop_tokens, dtype=torch.long, device=device)
        limits = torch.tensor(plan.limits, device=device)
        finished = torch.zeros(plan.rows, dtype=torch.bool, device=device)
        check_every = _STEPS_BETWEEN_CHECKS.get(device.type, 1)
        logits = self._read_prompts(plan)
        for step in range(plan.steps):
            tokens = torch.empty(plan.rows, dtype=torch.long, device=device)
            log_probs = torch.empty(plan.rows, device=device) if config.log_probs else None
            if choose is not None:
                assert logits is not None
                tokens, log_probs = choose(logits, step)
            self._pipeline.share(tokens)
            if log_probs is not None:
                self._pipeline.share(log_probs)
            yield tokens, log_probs
            if step + 1 == plan.steps:
                return
            if config.stop_tokens or min(plan.limits) <= step + 1:
                finished |= torch.isin(tokens, stops) | (limits <= step + 1)
                if (step + 1) % check_every == 0 and bool(finished.all()):
                    return
            logits = self._pipeline(tokens[:, None], self._token_step(plan, step))

    def _read_prompts(self, plan: _Plan) -> Tensor | None:
        """Fill the cache from the prompts; the logits after each row's prompt on the last stage."""
        self._allocate(plan.rows, plan.slots)
        if plan.sources:
            self._encode(plan.sources)
        device, longest = self.decoder.device, plan.longest
        tokens, positions = self._padded(plan.prompts)
        last = torch.tensor([len(prompt) - 1 for prompt in plan.prompts], device=device)
        logits = self._pipeline(tokens, Step(positions, keys=longest, offset=0, last=last))
        if plan.copies > 1:
            source = torch.arange(len(plan.prompts), device=device).repeat_interleave(plan.copies)
            self.decoder.select(source, longest)
            logits = None if logits is None else logits[source]
        return logits

    def _encode(self, sources: list[tuple[int, ...]]) -> None:
        tokens, positions = self._padded(sources)
        lengths = torch.tensor([len(source) for source in sources], device=self.decoder.device)
        visible = (positions < lengths[:, None])[:, None, None]
        everywhere = len(set(map(len, sources))) == 1
        step = Step(positions, tokens.size(1), offset=0, visible=None if everywhere else visible, encoding=True)
        self._pipeline(tokens, step)

    def _padded(self, texts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Tokens and positions, each ``[len(texts), longest]``, with texts at the left."""
        longest, device = max(map(len, texts)), self.decoder.device
        rows = [[*text, *(_PADDING for _ in range(longest - len(text)))] for text in texts]
        positions = torch.arange(longest, device=device).expand(len(rows), longest)
        return torch.tensor(rows, device=device), positions

    def _token_step(self, plan: _Plan, new: int) -> Step:
        """Where the token goes that follows ``new`` others after each prompt."""
        device = self.decoder.device
        if plan.aligned:
            position = plan.longest + new
            positions = torch.full((plan.rows, 1), position, device=device)
            return Step(positions, keys=position + 1, offset=position)
        lengths = torch.tensor([len(prompt) for prompt in plan.prompts], device=device)
        # A finished row goes on beside the others, but not beyond the cache.
        positions = (lengths + new).clamp(max=plan.slots - 1).repeat_interleave(plan.copies)[:, None]
        keys = min(plan.longest + new + 1, plan.slots)
        visible = torch.arange(keys, device=device) <= positions[:, :, None, None]
        return Step(positions, keys=keys, offset=None, visible=visible)

    def _allocate(self, rows: int, slots: int) -> None:
        need = self.decoder.cache_bytes(rows, slots)
        problem = None
        try:
            self.decoder.allocate(rows, slots)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            problem = str(error).splitlines()[0]
        problems: list[Any] = [None] * self.groups.mp.size()
        dist.all_gather_object(problems, problem, group=self.groups.mp)
        if any(problems):
            self.decoder.release()
            raise GenerationError(
                f"The keys and values of {rows} sequences of {slots} tokens take {need / 2**30:.2f} GiB on each rank, "
                "which cannot be had. Generate for fewer prompts at a time, or ask for fewer tokens or beams. "
                f"({next(filter(None, problems))})"
            )

    # ---------------------------------------------------------------------------- beams

    @torch.inference_mode()
    def _beams(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[Generation]:
        plan = self._plan(prompts, config, copies=config.num_beams)
        device = self.decoder.device
        search = (
            BeamSearch(plan.prompts, plan.limits[:: plan.copies], config, device) if self._pipeline.is_last else None
        )
        logits = self._read_prompts(plan)
        for step in range(plan.steps):
            # The next token of each beam, the beam that it continues, and whether to go on.
            word = torch.zeros(2 * plan.rows + 1, dtype=torch.long, device=device)
            if search is not None:
                assert logits is not None
                tokens, source = search.advance(logits)
                word = torch.cat((tokens, source, torch.tensor([not search.done], device=device)))
            self._pipeline.share(word)
            tokens, source = word[:-1].view(2, plan.rows)
            if step + 1 == plan.steps or not int(word[-1]):
                break
            self.decoder.select(source, min(plan.longest + step, plan.slots))
            logits = self._pipeline(tokens[:, None], self._token_step(plan, step))
        found = [search.best() if search is not None else None]
        if self.groups.pp.size() > 1:
            dist.broadcast_object_list(found, group=self.groups.pp, group_src=self.groups.pp.size() - 1, device=device)
        assert found[0] is not None
        return [
            Generation(start, tuple(beam.tokens), "stop" if beam.stopped else "length", score=beam.score)
            for start, beams in zip(plan.prompts, found[0], strict=True)
            for beam in beams
        ]


class _Chooser:
    """The next tokens from logits, on the last stage. Every tensor-parallel rank of it makes the same choice."""

    def __init__(self, plan: _Plan, config: GenerationConfig, rows: Sequence[int] | None, device: torch.device) -> None:
        self._config = config
        self._plan = plan
        self._seen: Tensor | None = None
        if config.do_sample:
            numbers = range(len(plan.prompts)) if rows is None else rows
            streams = [number * plan.copies + copy for number in numbers for copy in range(plan.copies)]
            self._uniforms = sampling.uniforms(config.seed, streams, plan.steps).to(device)

    def __call__(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Tokens and log-probabilities ``[rows]`` from ``[rows, vocab]``."""
        config, scores = self._config, logits
        if config.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = sampling.seen_tokens(self._plan.prompts, logits).repeat_interleave(self._plan.copies, 0)
            scores = sampling.penalise_repetition(scores, self._seen, config.repetition_penalty)
        if config.do_sample:
            scores = sampling.filter_logits(
                scores, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p_at(step)
            )
            tokens = sampling.draw(scores, self._uniforms[:, step])
        else:
            tokens = scores.argmax(-1)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens, sampling.log_probabilities(logits, tokens) if config.log_probs else None


# ------------------------------------------------------------------------------------------ from tensors to results


def _ended(tokens: Sequence[int], stops: Sequence[int], limit: int) -> int | None:
    """How many of a row's tokens belong to it, if it has ended."""
    for count, token in enumerate(tokens[:limit], start=1):
        if token in stops or count == limit:
            return count
    return None


def _generations(
    plan: _Plan,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    tokens: list[Tensor],
    log_probs: list[Tensor | None],
) -> list[Generation]:
    texts = torch.stack(tokens, dim=1).tolist()
    numbers = torch.stack(log_probs, dim=1).tolist() if config.log_probs else None  # type: ignore[arg-type]
    found = []
    for row, text in enumerate(texts):
        count = _ended(text, config.stop_tokens, plan.limits[row])
        assert count is not None
        found.append(
            Generation(
                plan.prompts[row // plan.copies],
                tuple(text[:count]),
                "stop" if text[count - 1] in config.stop_tokens else "length",
                None if numbers is None else tuple(numbers[row][:count]),
            )
        )
    return found


class _News:
    """What each step adds for a listener. It remembers which rows have ended, so that a step costs the same at any
    length."""

    def __init__(self, plan: _Plan, config: GenerationConfig) -> None:
        self._limits, self._stops = plan.limits, frozenset(config.stop_tokens)
        self._open = list(range(plan.rows))
        self._step = 0

    def __call__(self, tokens: Tensor, log_probs: Tensor | None) -> NewTokens:
        texts: list[int] = tokens.tolist()
        numbers = None if log_probs is None else log_probs.tolist()
        rows = tuple(self._open)
        ended = [texts[row] in self._stops or self._step + 1 >= self._limits[row] for row in rows]
        new = NewTokens(
            self._step,
            rows,
            tuple(texts[row] for row in rows),
            None if numbers is None else tuple(numbers[row] for row in rows),
            tuple(ended),
        )
        self._open = [row for row, end in zip(rows, ended, strict=True) if not end]
        self._step += 1
        return new
