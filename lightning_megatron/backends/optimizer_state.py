"""The state of megatron-core's optimizers, parameter by parameter, whatever their kind.

The kinds differ in what they step: the parameter itself (``FP32Optimizer``), an fp32 copy
(``Float16OptimizerWithFloat16Params``), or a range of the flattened parameter, copied if it is 16-bit
(``DistributedOptimizer``). `tests/backends/test_optimizer_state.py` fails when an upgrade moves one of the attributes
that are read here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.core import DistributedOptimizer, Float16Optimizer, FP32Optimizer, MegatronOptimizer


@dataclass(frozen=True, slots=True)
class ParameterState:
    """What an optimizer of this rank keeps for one parameter of the model."""

    parameter: Tensor
    start: int
    """First element of the flattened parameter that this rank steps; 0 but for the distributed optimizer."""
    stepped: Tensor
    """What the inner optimizer updates: elements of the parameter itself, or of its fp32 master copy."""
    is_master: bool
    inner: torch.optim.Optimizer
    group: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """The inner optimizer's state, in place; empty before the first step."""
        return self.inner.state[self.stepped]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the state that are as large as the parameter."""
        if isinstance(self.inner, torch.optim.Adam):  # AdamW is one
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.group.get("momentum") else ()

    def initialise(self) -> None:
        """Give it the state of zero steps, if it has none yet."""
        for name in self.names:
            if self.state.get(name) is None:
                self.state[name] = torch.zeros_like(self.stepped)
        if "step" not in self.state and isinstance(self.inner, torch.optim.Adam):
            # torch keeps the count beside the weights only for its fused and capturable kernels.
            on_device = self.group.get("fused") or self.group.get("capturable")
            device = self.stepped.device if on_device else torch.device("cpu")
            self.state["step"] = torch.zeros((), dtype=torch.float32, device=device)

    @property
    def step(self) -> int:
        """Updates so far."""
        return int(self.state.get("step", 0))

    def set_step(self, value: int) -> None:
        """Say how many updates there were."""
        if "step" in self.state:
            self.state["step"].fill_(value)


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The single optimizers inside megatron-core's optimizer, which chains one for dense and one for expert weights."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]


def parameter_states(optimizer: MegatronOptimizer) -> Iterator[ParameterState]:
    """All parameters that this rank steps, or steps a part of.

    Raises:
        NotImplementedError: a kind of optimizer that is not known here.
    """
    for part in parts(optimizer):
        groups = part.optimizer.param_groups
        for index, parameter, stepped, is_master, start in stepped_tensors(part):
            yield ParameterState(parameter, start, stepped, is_master, part.optimizer, groups[index])


def stepped_tensors(part: Any) -> Iterator[tuple[int, Tensor, Tensor, bool, int]]:
    """Group, parameter, what is stepped for it, whether that is a master copy, and where it starts."""
    lists: tuple[tuple[Any, Any, bool], ...]
    if isinstance(part, DistributedOptimizer):
        lists = (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups, True),
            (part.model_fp32_groups, part.shard_fp32_groups, False),
        )
    elif isinstance(part, Float16Optimizer):
        lists = (
            (part.float16_groups, part.fp32_from_float16_groups, True),
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups, False),
        )
    elif isinstance(part, FP32Optimizer):
        # Also those that were frozen after the optimizer was built.
        trained = [list(group["params"]) for group in part.optimizer.param_groups]
        lists = ((trained, trained, False),)
    else:
        raise NotImplementedError(
            f"Checkpoints do not know the state of {type(part).__name__}. Use an optimizer that OptimizerConfig names."
        )
    for models, stepped, is_master in lists:
        for index, (parameters, tensors) in enumerate(zip(models, stepped, strict=True)):
            for parameter, tensor in zip(parameters, tensors, strict=True):
                start = 0
                if isinstance(part, DistributedOptimizer):
                    start = part._get_model_param_range_map(parameter)["param"].start  # no public way
                yield index, parameter, tensor, is_master, start


_GROUP_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_NOT_OF_A_RUN = {*_GROUP_IDENTITY, "params", "default_config"}
_SCHEDULED = {"lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum"}
"""What torch's schedulers compute from its last value, or note in the groups."""


def group_values(optimizer: MegatronOptimizer) -> dict[str, dict[str, Any]]:
    """The options of each parameter group (``lr``, ``betas``, ``weight_decay`` and so on), as plain Python values."""
    found: dict[str, dict[str, Any]] = {}
    for identity, group in _identified(optimizer):
        values = {name: _plain(value) for name, value in group.items() if name not in _NOT_OF_A_RUN}
        found[identity] = {name: value for name, value in values.items() if isinstance(value, (int, float, tuple))}
    return found


def facts(optimizer: MegatronOptimizer, configured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Numbers that belong to no parameter: the options of each parameter group, and the loss scale.

    Args:
        configured: :func:`group_values` of the new optimizer.
    """
    found: dict[str, Any] = {"groups": group_values(optimizer), "configured": configured}
    for part in parts(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None:
            found["loss_scale"] = {name: float(value) for name, value in scaler.state_dict().items()}
            found["loss_scale"]["scale"] = float(scaler.scale)
    return found


def restore_facts(optimizer: MegatronOptimizer, found: dict[str, Any]) -> None:
    """Take over what is not configuration of this run.

    That is the dynamic loss scale, and options of parameter groups that a scheduler or the user has changed during the
    saved run. Where one of torch's schedulers is in charge (it marks the groups with ``initial_lr``), it is all that
    the scheduler computes from its last value. Other options are those of this run's configuration.
    """
    configured = found.get("configured")
    for identity, group in _identified(optimizer):
        saved = found.get("groups", {}).get(identity, {})
        scheduled = _SCHEDULED if "initial_lr" in group and "initial_lr" in saved else set()
        for name in saved.keys() & group.keys():
            # A checkpoint from before the options were saved tells no more of them than the rate.
            before = saved if configured is None and name != "lr" else (configured or {}).get(identity, {})
            if saved[name] != before.get(name) or name in scheduled:
                group[name] = saved[name]
    for part in parts(optimizer):
        scaler, scale = getattr(part, "grad_scaler", None), found.get("loss_scale", {})
        if scaler is not None and "growth_tracker" in scale and "growth_tracker" in scaler.state_dict():
            device = scaler.scale.device
            scaler.load_state_dict(
                {
                    "scale": torch.tensor([scale["scale"]], dtype=torch.float32, device=device),
                    "growth_tracker": int(scale["growth_tracker"]),
                    "hysteresis_tracker": int(scale["hysteresis_tracker"]),
                }
            )


def restore_rates(optimizer: MegatronOptimizer, found: dict[str, Any]) -> None:
    """Take over the learning rates, for a scheduler that is made after the checkpoint is loaded."""
    for identity, group in _identified(optimizer):
        group["lr"] = found.get("groups", {}).get(identity, {}).get("lr", group["lr"])


def _identified(optimizer: MegatronOptimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parameter groups, and which each is in any layout: parts of an optimizer depend on what a rank holds, the order
    of groups within a part does not."""
    seen: Counter[str] = Counter()
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            identity = ",".join(f"{name}={group[name]}" for name in _GROUP_IDENTITY if name in group)
            yield f"{identity}#{seen[identity]}" if seen[identity] else identity, group
            seen[identity] += 1


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
