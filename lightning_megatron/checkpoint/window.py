"""Gradients of an accumulation window that is still open, as shards to save and to take over in any layout.

They are not reduced yet: each data-parallel rank has those of its own samples, under sequence parallelism each
tensor-parallel rank those of its tokens, and the last pipeline stage those of its use of a tied embedding. Each of
these contributions is saved as a tensor of its own, so a run of the same layout goes on with exactly the same numbers.
In another layout one rank takes the sum of all contributions, and those that it is reduced with begin at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.core import ProcessGroupCollection, get_model_config
from lightning_megatron.backends.sharded_state import Piece
from lightning_megatron.backends.shards import Box, Shard
from lightning_megatron.checkpoint.shard_files import ShardFiles
from lightning_megatron.gradients import Gradients

GRADIENTS = "optimizer.state.accumulated."
TOKENS = "optimizer.state.accumulated_tokens."


class Window:
    """The open accumulation window of a fit.

    Args:
        pieces: where a parameter lies in the global model.
    """

    def __init__(
        self, gradients: Gradients, groups: ProcessGroupCollection, pieces: Callable[[Tensor], Sequence[Piece]]
    ) -> None:
        self._gradients, self._groups, self._pieces = gradients, groups, pieces

    def facts(self) -> dict[str, Any]:
        """What is not a tensor; empty without an open window."""
        schedules = self._gradients.unreduced_schedules
        if not schedules:
            return {}
        weights = {name: float(weight) for name, weight in self._gradients.term_weights.items()}
        return {"window": {"schedules": schedules, "loss_scale": self._gradients.loss_scale(), "term_weights": weights}}

    def shards(self) -> Iterator[Shard]:
        """All gradients, and the tokens that they are to be divided by."""
        if not self._gradients.unreduced_schedules:
            return
        for parameter, piece, label, _ in self._contributions():
            yield from piece.shards(f"{GRADIENTS}{label}.", parameter.main_grad.detach().view(-1))
        tokens = self._gradients.tokens
        if tokens is not None and self._counts_tokens:
            yield _tokens_shard(self._groups.dp_cp.rank(), tokens.detach())

    @torch.no_grad()
    def restore(self, files: ShardFiles, facts: dict[str, Any], *, same_layout: bool) -> None:
        """Continue in the window that ``facts`` tell of, or begin a new one if they tell of none."""
        self._gradients.begin_window()
        window = facts.get("window")
        if window is None:
            return
        self._gradients.zero()
        labels = sorted(
            {key.removeprefix(GRADIENTS).split(".")[0] for key in files.shapes if key.startswith(GRADIENTS)}
        )
        for parameter, piece, label, first in self._contributions():
            flat = parameter.main_grad.view(-1)
            for source in [label] if same_layout else labels if first else []:
                for shard in piece.shards(f"{GRADIENTS}{source}.", flat):
                    if shard.key in files.shapes:
                        part = torch.zeros_like(shard.tensor)
                        files.read(shard.key, shard.box, part)
                        shard.tensor.add_(part)
        self._gradients.continue_window(
            window["schedules"], self._tokens(files, same_layout), window["loss_scale"], window["term_weights"]
        )

    def _contributions(self) -> Iterator[tuple[Any, Piece, str, bool]]:
        """Parameters with a buffer, piece by piece; whose contribution to the gradient this rank has, and whether this
        rank is the one to have the whole gradient in another layout."""
        for chunk in self._gradients.unwrapped:
            config = get_model_config(chunk)
            for name, parameter in chunk.named_parameters():
                if not hasattr(parameter, "main_grad"):
                    continue
                data = self._groups.dp_cp if getattr(parameter, "allreduce", True) else self._groups.expt_dp
                label, first = str(data.rank()), data.rank() == 0
                # Otherwise the gradient of what tensor-parallel ranks hold alike is the same on all of them.
                if _is_summed_over_tensor_ranks(config, name, parameter):
                    label += f"-tp{self._groups.tp.rank()}"
                    first = first and self._groups.tp.rank() == 0
                for piece in self._pieces(parameter):
                    tied = "-tied" if piece.pipeline_copy else ""
                    yield parameter, piece, label + tied, first and not tied

    @property
    def _counts_tokens(self) -> bool:
        return bool(self._groups.pp.rank() == self._groups.pp.size() - 1)

    def _tokens(self, files: ShardFiles, same_layout: bool) -> Tensor | None:
        """This rank's count, of which the last stage's are summed over data-parallel ranks."""
        counts = {
            key.removeprefix(TOKENS): files.load(chunks[0]).clone()
            for key, chunks in files.chunks.items()
            if key.startswith(TOKENS)
        }
        if not counts:
            return None
        rank = self._groups.dp_cp.rank()
        if not self._counts_tokens or (rank and not same_layout):
            return torch.zeros_like(next(iter(counts.values())))
        return counts[str(rank)] if same_layout else sum(counts.values(), torch.zeros_like(next(iter(counts.values()))))


def _tokens_shard(rank: int, tokens: Tensor) -> Shard:
    sizes = tuple(tokens.shape)
    return Shard(f"{TOKENS}{rank}", sizes, Box((0,) * len(sizes), sizes), tokens)


def _is_summed_over_tensor_ranks(config: Any, name: str, parameter: Any) -> bool:
    """Whether tensor-parallel ranks hold a parameter alike, and megatron-core sums its gradient over them."""
    return bool(config.tensor_model_parallel_size > 1) and (
        bool(config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        or bool(config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
    )
