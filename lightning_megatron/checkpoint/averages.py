"""Averages of weights that Lightning's callbacks keep, as shards of a checkpoint.

``WeightAveraging`` and ``EMAWeightAveraging`` put their averages in the place of the weights, and the weights beside
them, so that whoever loads the checkpoint without the callback has the averages. ``StochasticWeightAveraging`` keeps
its averages in its own state. On each rank they are of this rank's part of the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

CURRENT = "current_model_state"
"""The key in which ``WeightAveraging`` puts the weights."""
_SWA_KEY = "average_model_state"


def keep_averages(callbacks: Sequence[pl.Callback]) -> bool:
    """Whether any of the callbacks averages weights."""
    return any(isinstance(callback, (StochasticWeightAveraging, WeightAveraging)) for callback in callbacks)


@dataclass(frozen=True, slots=True)
class Averages:
    """This rank's averages, each beside the parameter or buffer that it is of."""

    of_weights: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Those that take the place of the weights."""
    beside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Those of ``StochasticWeightAveraging``."""

    @classmethod
    def take(
        cls, checkpoint: dict[str, Any], module: pl.LightningModule, callbacks: Sequence[pl.Callback]
    ) -> tuple[dict[str, Any], Averages]:
        """The averages that callbacks have put into a checkpoint to save, and the checkpoint without them."""
        averages, checkpoint = cls(), dict(checkpoint)
        if CURRENT in checkpoint:
            averages.of_weights.extend(_pairs(module, checkpoint["state_dict"]))
            checkpoint |= {"state_dict": {}, CURRENT: {}}
        for key, state in _swa_states(checkpoint, callbacks):
            averages.beside.extend(_pairs(module, state[_SWA_KEY]))
            checkpoint["callbacks"] = checkpoint["callbacks"] | {key: state | {_SWA_KEY: {}}}
        return checkpoint, averages

    @classmethod
    def to_fill(cls, module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> FillableAverages | None:
        """Memory for the averages that callbacks will want of a checkpoint; ``None`` if none averages."""
        if not keep_averages(callbacks):
            return None
        state = deepcopy(module).state_dict()
        pairs = _pairs(module, state)
        lightning = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        return FillableAverages(cls(pairs if lightning else [], [] if lightning else pairs), state)


@dataclass(frozen=True, slots=True)
class FillableAverages:
    """Averages to fill from a checkpoint, and the state dict that they are in."""

    averages: Averages
    state: dict[str, Any]

    @torch.no_grad()
    def start_from_weights(self) -> None:
        """As they are before the first update."""
        for weight, average in (*self.averages.of_weights, *self.averages.beside):
            average.copy_(weight)

    def give(self, checkpoint: dict[str, Any], module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> None:
        """Put them into the checkpoint, where the callbacks look for them."""
        if self.averages.of_weights:
            checkpoint["state_dict"] = self.state
            if CURRENT in checkpoint:
                checkpoint[CURRENT] = module.state_dict()
        for key, state in _swa_states(checkpoint, callbacks):
            checkpoint["callbacks"][key] = state | {_SWA_KEY: self.state}


def swa_has_begun(checkpoint: dict[str, Any], callbacks: Sequence[pl.Callback]) -> bool:
    """Whether ``StochasticWeightAveraging`` had replaced the learning-rate scheduler by its own."""
    return any(state.get("scheduler_state") is not None for _, state in _swa_states(checkpoint, callbacks))


def _swa_states(checkpoint: dict[str, Any], callbacks: Sequence[pl.Callback]) -> list[tuple[str, dict[str, Any]]]:
    states = checkpoint.get("callbacks", {})
    keys = [c.state_key for c in callbacks if isinstance(c, StochasticWeightAveraging)]
    return [(key, states[key]) for key in keys if states.get(key, {}).get(_SWA_KEY) is not None]


def _pairs(module: pl.LightningModule, averages: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [(weights[name], average) for name, average in averages.items() if name in weights]
