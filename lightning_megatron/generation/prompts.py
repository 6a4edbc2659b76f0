"""Prompts as the caller has them, into checked lists of token ids that every rank agrees about."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_megatron.errors import DataError
from lightning_megatron.generation.config import GenerationConfig

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


def as_lists(prompts: Prompts) -> list[list[int]]:
    """One list of ints for each prompt, from a tensor ``[batch, sequence]`` or ``[sequence]``, or from lists.

    Raises:
        ValueError: something else, or no prompt at all.
    """
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2) or prompts.is_floating_point():
            raise ValueError(
                f"Prompts as a tensor are ids [batch, sequence], not {prompts.dtype} {list(prompts.shape)}."
            )
        prompts = prompts.tolist()
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"Prompts are lists of token ids or a tensor of them, but got {type(prompts).__name__}.")
    if len(prompts) == 0:
        raise ValueError("No prompts were given.")
    rows: list[Any] = [prompts] if isinstance(prompts[0], int) else list(prompts)
    lists = [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]
    for row in lists:
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in row):
            raise ValueError(f"A prompt holds token ids, but one is {row!r:.80}.")
    return lists


def check_prompts(
    prompts: list[list[int]], config: GenerationConfig, *, vocab_size: int, max_positions: int, encoder: bool = False
) -> list[list[int]]:
    """Prompts with their beginning-of-sequence token, fit for the model.

    Args:
        encoder: the prompts go to an encoder, so that what is generated does not follow them.

    Raises:
        ValueError: an empty prompt, one with another vocabulary's tokens, or one that leaves no room to generate.
    """
    bos = [] if config.bos_token is None else [config.bos_token]
    prompts = [bos + prompt for prompt in prompts]
    for token in (*config.stop_tokens, *bos):
        if token >= vocab_size:
            raise ValueError(f"Token {token} of stop_tokens or bos_token is not in the vocabulary of {vocab_size}.")
    for index, prompt in enumerate(prompts):
        length = len(prompt)
        if length == 0:
            raise ValueError(f"Prompt {index} is empty. Give bos_token to generate from nothing.")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"Prompt {index} holds tokens from {min(prompt)} to {max(prompt)}, but vocab_size={vocab_size}."
            )
        if length > max_positions:
            raise ValueError(
                f"Prompt {index} has {length} tokens, more than max_position_embeddings={max_positions}. Shorten it."
            )
        before = 1 if encoder else length
        new = config.limit(before)
        if new < 1:
            raise ValueError(f"Prompt {index} has {length} tokens, but max_length={config.max_length} with the prompt.")
        if before + new > max_positions:
            raise ValueError(
                f"Prompt {index} of {length} tokens and {new} new ones are more than "
                f"max_position_embeddings={max_positions}. Shorten the prompt or ask for fewer."
            )
    return prompts


def agree(problem: str | None, content: object, groups: Sequence[dist.ProcessGroup]) -> None:
    """Let every rank of ``groups`` raise if any has a problem, or if they were given different things.

    Raises:
        ValueError: as said.
    """
    digest = hashlib.sha256(repr(content).encode()).hexdigest()
    for group in groups:
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, (problem, digest), group=group)
        problem = next((other for other, _ in told if other is not None), None)
        if problem is None and any(other != digest for _, other in told):
            ranks = dist.get_process_group_ranks(group)
            problem = f"Ranks {ranks} were given different prompts or options to generate from; they work on one text."
    if problem is not None:
        raise ValueError(problem)


def of_batch(batch: Mapping[str, Any]) -> list[list[int]]:
    """The prompts of a batch of a data loader.

    The batch holds ``prompts``, a list of lists of token ids; or ``input_ids`` or ``tokens``, ``[batch, sequence]``,
    with an optional ``attention_mask`` that is 0 at the padding, on either side, or ``lengths``.

    Raises:
        DataError: none of these.
    """
    if "prompts" in batch:
        return as_lists(batch["prompts"])
    tokens = batch.get("input_ids", batch.get("tokens"))
    if tokens is None:
        raise DataError(
            f"A batch of prompts needs 'prompts', 'input_ids' or 'tokens', but has the keys {sorted(batch)}."
        )
    rows = as_lists(tokens)
    if (mask := batch.get("attention_mask")) is not None:
        return [
            [token for token, keep in zip(*pair, strict=True) if keep] for pair in zip(rows, mask.tolist(), strict=True)
        ]
    if (lengths := batch.get("lengths")) is not None:
        return [row[: int(length)] for row, length in zip(rows, lengths, strict=True)]
    return rows
