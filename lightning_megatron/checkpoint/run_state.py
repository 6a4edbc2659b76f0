"""What of a run is spread over ranks, as shards to save and as shards to fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_megatron.backends import optimizer_state, rng
from lightning_megatron.backends.core import ProcessGroupCollection
from lightning_megatron.backends.optimizer_state import ParameterState
from lightning_megatron.backends.sharded_state import ModelState, Piece, model_state
from lightning_megatron.backends.shards import Box, Shard
from lightning_megatron.optim.optimizer import MegatronOptimizer

OPTIMIZER_PREFIX = "optimizer.state."
MASTER = "optimizer.state.fp32_param."
RNG = "rng."


@dataclass(frozen=True, slots=True)
class Wanted:
    """A shard to fill, and the tensors of a checkpoint to fill it from, the best first."""

    shard: Shard
    sources: tuple[str, ...]


class RunState:
    """Weights, and the optimizer's state for them if there is one.

    Args:
        chunks: this rank's chunks, unwrapped (megatron-core's DDP would prefix every name).
        optimizer: ``None`` for weights alone.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: MegatronOptimizer | None, groups: ProcessGroupCollection):
        self._chunks = list(chunks)
        self.optimizer = optimizer
        metadata = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": groups.dp_cp,
        }
        self.model: ModelState = model_state(self._chunks, metadata)
        self._pieces = {id(weight.tensor): weight.pieces for weight in self.model.weights}

    # ------------------------------------------------------------------------------------------------ to save

    def shards(self, rank: int) -> Iterator[Shard]:
        """Everything that this rank may save."""
        for weight in self.model.weights:
            yield from (shard for shard in weight.shards() if not shard.replica)
        for state in self._parameter_states():
            tensors = {name: state.state[name] for name in state.names if state.state.get(name) is not None}
            if state.is_master:
                tensors["fp32_param"] = state.stepped
            for name, tensor in tensors.items():
                yield from (shard for shard in self._optimizer_shards(state, name, tensor) if not shard.replica)
        for name, tensor in rng.capture().items():
            yield rng_shard(rank, name, tensor)

    def steps(self) -> dict[str, int]:
        """Updates so far of each parameter that this rank steps."""
        return {
            piece.name: state.step
            for state in self._parameter_states()
            if "step" in state.state
            for piece in self._of(state)
        }

    # ------------------------------------------------------------------------------------------------ to fill

    def wanted_weights(self) -> Iterator[Wanted]:
        """All weights. An fp32 model takes the fp32 masters of a 16-bit run, which are more exact than its weights."""
        for weight in self.model.weights:
            exact = (MASTER,) if weight.tensor.dtype == torch.float32 else ()
            for shard in weight.shards():
                yield Wanted(shard, (*(prefix + shard.key for prefix in exact), shard.key))

    def wanted_masters(self) -> Iterator[Wanted]:
        """fp32 copies of 16-bit weights; from the weights themselves if the checkpoint has no copies."""
        for state in self._parameter_states():
            if state.is_master:
                for shard in self._optimizer_shards(state, "fp32_param", state.stepped):
                    yield Wanted(shard, (shard.key, shard.key.removeprefix(MASTER)))

    def wanted_moments(self) -> Iterator[Wanted]:
        """The optimizer's averages of gradients, which are there, as after zero steps, from now on."""
        for state in self._parameter_states():
            state.initialise()
            for name in state.names:
                for shard in self._optimizer_shards(state, name, state.state[name]):
                    yield Wanted(shard, (shard.key,))

    def masters_from_weights(self) -> None:
        """Copy 16-bit weights into their fp32 copies, as a new optimizer does."""
        for state in self._parameter_states():
            if state.is_master:
                length = state.stepped.numel()
                state.stepped.copy_(state.parameter.detach().view(-1)[state.start :][:length].view_as(state.stepped))

    def restore_steps(self, default: int, others: dict[str, int]) -> None:
        """Set the count of updates of each parameter."""
        for state in self._parameter_states():
            state.set_step(others.get(self._of(state)[0].name, default))

    # ------------------------------------------------------------------------------------------------- inside

    def _parameter_states(self) -> Iterator[ParameterState]:
        if self.optimizer is not None:
            yield from optimizer_state.parameter_states(self.optimizer.core)

    def _of(self, state: ParameterState) -> tuple[Piece, ...]:
        return self._pieces[id(state.parameter)]

    def _optimizer_shards(self, state: ParameterState, name: str, tensor: torch.Tensor) -> Iterator[Shard]:
        flat = tensor.detach().view(-1)
        for piece in self._of(state):
            yield from piece.shards(f"{OPTIMIZER_PREFIX}{name}.", flat, state.start)


def rng_shard(rank: int, name: str, tensor: torch.Tensor) -> Shard:
    """A random state of one rank; a tensor of its own, since another layout has no use for a part of it."""
    sizes = tuple(tensor.shape)
    return Shard(f"{RNG}{rank}.{name}", sizes, Box((0,) * len(sizes), sizes), tensor)
