"""Corrections to checkpoints of megatron-core 0.19's optimizers with torch's AdamW.

TransformerEngine's and Apex's Adam keep one step count per parameter group; torch's keeps a tensor per parameter, which
upstream's code does not expect. None of this is about CPU. `tests/backends/test_distributed_optimizer.py` shows each
defect upstream and fails when an upgrade changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_megatron.backends.core import DistributedOptimizer, MegatronOptimizer


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The single optimizers inside megatron-core's optimizer, which chains one for dense and one for expert weights."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]


def initialise_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its Adam state, as after zero steps.

    Upstream's ``state_dict`` asserts that a step was taken, with no message, so saving at step 0 and loading into a new
    run would fail.
    """
    for part in parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.Adam):  # AdamW is one
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=_step_device(group, parameter))
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def _step_device(group: dict[str, Any], parameter: torch.Tensor) -> torch.device:
    # torch keeps the count beside the weights only for its fused and capturable kernels.
    return parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


def load(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)``, after which each parameter has a step count of its own.

    Upstream hands all parameters the same tensor, which AdamW then increments once per parameter.
    """
    with torch.no_grad(), corrected():
        optimizer.load_state_dict(state)
    for part in parts(optimizer):
        for parameter_state in part.optimizer.state.values():
            if torch.is_tensor(parameter_state.get("step")):
                parameter_state["step"] = parameter_state["step"].clone()


@contextmanager
def corrected() -> Iterator[None]:
    """Mend two defects of ``DistributedOptimizer`` while a checkpoint is planned or loaded."""
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    shard = DistributedOptimizer.sharded_param_state_fully_reshardable

    def set_without_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        # Upstream looks up every tensor of Adam's state, but leaves the step out of what it passes: KeyError 'step'.
        set_states(self, model_param, {**tensors, "step": None})

    def shard_without_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Upstream gathers the state without the padding between buckets, then slices it at padded offsets, so every
        # parameter after a padded bucket is saved shifted, silently.
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _unpadded_index_map(buffer)
            return shard(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map

    DistributedOptimizer._set_main_param_and_optimizer_states = set_without_step
    DistributedOptimizer.sharded_param_state_fully_reshardable = shard_without_padding
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = set_states
        DistributedOptimizer.sharded_param_state_fully_reshardable = shard


def _unpadded_index_map(buffer: Any) -> dict[torch.Tensor, tuple[int, int, int]]:
    padding_before, total = [], 0
    for bucket in buffer.buckets:
        padding_before.append(total)
        total += bucket.grad_data.numel() - bucket.numel_unpadded
    return {
        parameter: (start - padding_before[bucket], end - padding_before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
