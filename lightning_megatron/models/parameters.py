"""How many parameters each rank holds, in the words that users of Megatron-LM look for."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def count_parameters(chunks: Iterable[torch.nn.Module]) -> int:
    """Parameters in this rank's chunks; the last stage's copy of a tied embedding counts, as in Megatron-LM."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def parameter_report(chunks: Iterable[torch.nn.Module], tensor_rank: int, pipeline_rank: int) -> str:
    """One line on this rank's share of the model."""
    place = f"({tensor_rank}, {pipeline_rank})"
    return f" > number of parameters on (tensor, pipeline) model parallel rank {place}: {count_parameters(chunks)}"
