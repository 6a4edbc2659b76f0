"""Sharded training state of a run: model, optimizer and random states, as shards to save and as shards to fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import torch

from lightning_megatron.backends import optimizer_state, rng
from lightning_megatron.backends.core import ProcessGroupCollection
from lightning_megatron.backends.optimizer_state import ParameterState
from lightning_megatron.backends.sharded_state import ModelState, Piece, model_state
from lightning_megatron.backends.shards import Box, Shard
from lightning_megatron.checkpoint.averages import Averages
from lightning_megatron.checkpoint.window import Window
from lightning_megatron.gradients import Gradients
from lightning_megatron.optim.optimizer import MegatronOptimizer

OPTIMIZER_PREFIX = "optimizer.state."
MASTER = "optimizer.state.fp32_param."
CURRENT_WEIGHT = "optimizer.state.current_weight."
"""Weights of a checkpoint in whose place averages are."""
AVERAGE = "optimizer.state.average."
"""Averages beside the weights."""
RNG = "rng."


class WeightsKind(Enum):
    """What a checkpoint holds under the names of the weights, and what is wanted of it."""

    TRAINED = auto()
    AVERAGES = auto()
    """Averages, which are wanted."""
    BESIDE_AVERAGES = auto()
    """Averages, and the weights that training goes on with are wanted."""


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
        gradients: of the fit that the optimizer belongs to.
        averages: of the weights, to save or to fill.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        optimizer: MegatronOptimizer | None,
        groups: ProcessGroupCollection,
        gradients: Gradients | None = None,
        averages: Averages | None = None,
    ) -> None:
        self._chunks = list(chunks)
        self.optimizer = optimizer
        metadata = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": groups.dp_cp,
        }
        self.model: ModelState = model_state(self._chunks, metadata)
        self._pieces = {id(weight.tensor): weight.pieces for weight in self.model.weights}
        self._averages = averages or Averages()
        self.window = None
        if optimizer is not None and gradients is not None:
            self.window = Window(gradients, groups, lambda parameter: self._pieces[id(parameter)])

    # ------------------------------------------------------------------------------------------------ to save

    def shards(self, rank: int) -> Iterator[Shard]:
        """Everything that this rank may save.

        What the optimizer has not stepped yet is saved as after zero steps, so all checkpoints have the same names.
        """
        averages = {id(weight): average for weight, average in self._averages.of_weights}
        for weight in self.model.weights:
            average = averages.get(id(weight.tensor))
            found = [*weight.shards()] if average is None else [*replace(weight, tensor=average).shards()]
            if average is not None:
                found += weight.shards(CURRENT_WEIGHT)
            yield from (shard for shard in found if not shard.replica)
        beside = (wanted.shard for wanted in self.wanted_averages(averages_of_weights=False))
        yield from (shard for shard in beside if not shard.replica)
        for state in self._parameter_states():
            state.initialise()
            tensors = {name: state.state[name] for name in state.names}
            if state.is_master:
                tensors["fp32_param"] = state.stepped
            for name, tensor in tensors.items():
                yield from (shard for shard in self._optimizer_shards(state, name, tensor) if not shard.replica)
        if self.window is not None:
            yield from self.window.shards()
        for name, tensor in rng.capture().items():
            yield rng_shard(rank, name, tensor)

    def facts(self) -> dict[str, Any]:
        """Numbers that belong to no parameter."""
        facts = self.optimizer.facts() if self.optimizer is not None else {}
        return facts | (self.window.facts() if self.window is not None else {})

    def steps(self) -> dict[str, int]:
        """Updates so far of each parameter that this rank steps."""
        return {
            piece.name: state.step
            for state in self._parameter_states()
            if "step" in state.state
            for piece in self._of(state)
        }

    # ------------------------------------------------------------------------------------------------ to fill

    def wanted_weights(self, kind: WeightsKind = WeightsKind.TRAINED) -> Iterator[Wanted]:
        """All weights. An fp32 model takes the fp32 masters of a 16-bit run, which are more exact than its weights."""
        current = (CURRENT_WEIGHT,) if kind is WeightsKind.BESIDE_AVERAGES else ()
        for weight in self.model.weights:
            exact = (MASTER,) if weight.tensor.dtype == torch.float32 and kind is not WeightsKind.AVERAGES else ()
            for shard in weight.shards():
                yield Wanted(shard, (*(prefix + shard.key for prefix in (*exact, *current)), shard.key))

    def wanted_averages(self, *, averages_of_weights: bool) -> Iterator[Wanted]:
        """Averages of weights; those in the place of the weights only if ``averages_of_weights``."""
        pieces = {id(weight.tensor): weight.pieces for weight in self.model.weights}
        pairs = [("", pair) for pair in self._averages.of_weights if averages_of_weights]
        for prefix, (weight, average) in (*pairs, *((AVERAGE, pair) for pair in self._averages.beside)):
            for piece in pieces.get(id(weight), ()):
                for shard in piece.shards(prefix, average.detach().view(-1)):
                    yield Wanted(shard, (shard.key,))

    def wanted_masters(self, kind: WeightsKind = WeightsKind.TRAINED) -> Iterator[Wanted]:
        """fp32 copies of 16-bit weights; from the weights themselves if the checkpoint has no copies, and from averages
        of weights, which are fp32."""
        for state in self._parameter_states():
            if state.is_master:
                for shard in self._optimizer_shards(state, "fp32_param", state.stepped):
                    weight = shard.key.removeprefix(MASTER)
                    yield Wanted(shard, (weight,) if kind is WeightsKind.AVERAGES else (shard.key, weight))

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

    @torch.no_grad()
    def masters_follow_weights(self) -> None:
        """Copy 16-bit weights that are not their fp32 copies rounded, which others than the optimizer have written."""
        for state in self._parameter_states():
            if state.is_master:
                length = state.stepped.numel()
                flat = state.parameter.detach().view(-1)[state.start :][:length].view_as(state.stepped)
                written = state.stepped.to(flat.dtype) != flat
                state.stepped.copy_(torch.where(written, flat.to(state.stepped.dtype), state.stepped))

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
