"""megatron-core's optimizer as a ``torch.optim.Optimizer`` that Lightning, callbacks and LR schedulers can hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from lightning_megatron.backends import optimizer_state
from lightning_megatron.backends.core import (
    CoreOptimizerConfig,
    OptimizerParamScheduler,
    ProcessGroupCollection,
    get_megatron_optimizer,
)
from lightning_megatron.backends.cpu import cuda_type_names
from lightning_megatron.backends.fused_adam import FusedAdam
from lightning_megatron.errors import CheckpointError
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.precision import MegatronPrecision

_ENDLESS = 2**62
"""The length of a run that no schedule asks for."""


class MegatronOptimizer(torch.optim.Optimizer):
    """Steps, clips and shards through megatron-core.

    ``zero_grad`` does nothing: Lightning calls it *after* ``training_step``, when the gradients of the schedule are
    already complete. The strategy zeroes the gradient buffers before each schedule.
    """

    def __init__(self, core: Any) -> None:
        # Not Optimizer.__init__, which would take ownership of parameters and state: both are megatron-core's.
        self.core = core
        self._configured = optimizer_state.group_values(core)
        self.grad_norm: torch.Tensor | float | None = None
        """Global norm of the last step's gradient before clipping; ``None`` if the step was skipped."""
        self.skipped = False
        """Whether the last step was skipped because a gradient overflowed in fp16, or by ``skip_next``."""
        self._scale: torch.Tensor | None = None
        self.skip_next = False
        """Set while the closure runs, makes this step leave everything as it is (``callbacks.NonFinite`` does so)."""
        self.complete_gradients: Callable[[], bool] | None = None
        """Called between closure and update; whether there are gradients at all. Set by the strategy's gradients."""
        self.zeroed = True
        """Whether ``zero_grad`` was called in this accumulation window; the strategy sets it where one begins."""
        self._left_out: list[torch.Tensor] = []
        self._hooked: list[torch.optim.Optimizer] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.core.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's options, by which schedulers of momentum tell ``betas`` from ``momentum``."""
        inner = [part.optimizer for part in optimizer_state.parts(self.core)]
        return inner[0].defaults if inner else {}

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.core.state

    @property
    def clip_grad(self) -> float:
        """Largest global norm of the gradient; 0 turns clipping off."""
        return float(self.core.config.clip_grad)

    @clip_grad.setter
    def clip_grad(self, value: float) -> None:
        for part in getattr(self.core, "chained_optimizers", [self.core]):
            part.config.clip_grad = value
        self.core.config.clip_grad = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing; see the class."""
        self.zeroed = True

    def scale_gradients(self, scale: torch.Tensor) -> bool:
        """Let the next step multiply the gradients by ``scale`` (shape ``[]``) as it reads them.

        Returns:
            Whether it will. Optimizers other than Adam cannot.
        """
        parts = getattr(self.core, "chained_optimizers", [self.core])
        inner = [part.optimizer for part in parts if not getattr(part, "is_stub_optimizer", False)]
        if not all(isinstance(optimizer, FusedAdam) for optimizer in inner):
            return False
        for optimizer in inner:
            optimizer.scale_gradients(scale)
        self._scale = scale
        return True

    def leave_out(self, parameters: Collection[torch.Tensor]) -> None:
        """Update all parameters but these from the next step on, as torch does with those that have no gradient.

        They are neither decayed, and their state stays. Their ``main_grad`` must be zero.
        """
        left_out = {id(parameter) for parameter in parameters}
        states = optimizer_state.parameter_states(self.core) if left_out else ()
        self._left_out = [state.stepped for state in states if id(state.parameter) in left_out]
        for part in optimizer_state.parts(self.core) if left_out else ():
            if part.optimizer not in self._hooked:
                part.optimizer.register_step_pre_hook(self._clear_left_out)
                self._hooked.append(part.optimizer)

    def _clear_left_out(self, *_: Any) -> None:
        for tensor in self._left_out:
            tensor.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure (the whole schedule), then clip and update.

        Nothing is updated if ``training_step`` returned ``None`` for all batches of this step. Such a step counts, and
        schedules go on, as in Lightning.
        """
        loss = closure() if closure is not None else None
        if self.complete_gradients is not None and not self.complete_gradients():
            self.skip_next, self.skipped, self.grad_norm = False, False, None
            return loss
        if self.skip_next:
            self.skip_next, self.skipped, self.grad_norm = False, True, None
            return loss
        with cuda_type_names():
            success, self.grad_norm, _ = self.core.step()
        if self._scale is not None and self.grad_norm is not None:
            self.grad_norm = self.grad_norm * self._scale
        self._scale = None
        self.skipped = not success
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Empty: the strategy saves the state in shards (:mod:`lightning_megatron.checkpoint`)."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing; see :meth:`state_dict`."""

    def facts(self) -> dict[str, Any]:
        """Numbers of this rank that a checkpoint keeps beside the sharded state; see :func:`optimizer_state.facts`."""
        return optimizer_state.facts(self.core, self._configured)

    def restore_facts(self, found: dict[str, Any]) -> None:
        """Take over the numbers of a checkpoint; see :func:`optimizer_state.restore_facts`."""
        optimizer_state.restore_facts(self.core, found)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible: parameters live in megatron-core's buffers from the start.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "Parameters cannot join a Megatron optimizer later. Freeze them with requires_grad=False in "
            "configure_model, before the optimizer is built, and start a new fit to unfreeze them."
        )


class MegatronScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Megatron's learning-rate and weight-decay schedules, in optimizer steps."""

    def __init__(self, optimizer: MegatronOptimizer, core: OptimizerParamScheduler) -> None:
        # Not LRScheduler.__init__, which would reset the rates that megatron-core's scheduler has just set.
        self.optimizer = optimizer
        self.core = core

    @classmethod
    def build(cls, optimizer: MegatronOptimizer, config: OptimizerConfig, total_steps: int | None) -> MegatronScheduler:
        """The schedule of ``config`` for a run of ``total_steps`` optimizer steps.

        Args:
            total_steps: ``None`` if unknown, which only a schedule without ``config.needs_total_steps`` can run with.
        """
        assert total_steps is not None or not config.needs_total_steps
        total_steps = _ENDLESS if total_steps is None else total_steps
        decay_steps = config.lr_decay_steps or max(total_steps, config.lr_warmup_steps + 1, 1)
        constant = config.weight_decay
        return cls(
            optimizer,
            OptimizerParamScheduler(
                optimizer.core,
                init_lr=config.lr_warmup_init,
                max_lr=config.lr,
                min_lr=config.min_lr,
                lr_warmup_steps=config.lr_warmup_steps,
                lr_decay_steps=decay_steps,
                lr_decay_style=config.lr_decay_style,
                start_wd=config.start_weight_decay if config.start_weight_decay is not None else constant,
                end_wd=config.end_weight_decay if config.end_weight_decay is not None else constant,
                wd_incr_steps=max(total_steps, 1),
                wd_incr_style=config.weight_decay_incr_style,
                use_checkpoint_opt_param_scheduler=False,
                wsd_decay_steps=config.lr_wsd_decay_steps,
                lr_wsd_decay_style=config.lr_wsd_decay_style,
            ),
        )

    def step(self, epoch: int | None = None) -> None:
        """Advance by one optimizer step, unless that step was skipped for an overflow."""
        if not self.optimizer.skipped:  # type: ignore[attr-defined]
            self.core.step(increment=1)

    def get_last_lr(self) -> list[float | torch.Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.core.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved step. The shape of the schedule is this run's, so a longer run decays longer.

        Raises:
            CheckpointError: the state of another scheduler.
        """
        if "num_steps" not in state_dict:
            raise CheckpointError(
                f"The checkpoint holds the state of another LR scheduler ({', '.join(sorted(state_dict))}), which "
                "Megatron's schedule cannot continue. Return the same kind of scheduler from configure_optimizers, or "
                "start a new run from the weights alone (callbacks.InitialWeights)."
            )
        self.core.num_steps = 0
        self.core.step(increment=state_dict["num_steps"])


def build_optimizer(
    config: OptimizerConfig,
    chunks: Sequence[torch.nn.Module],
    precision: MegatronPrecision,
    groups: ProcessGroupCollection,
    *,
    use_distributed_optimizer: bool,
    overlap_param_gather: bool = False,
) -> MegatronOptimizer:
    """The optimizer over all chunks (wrapped in megatron-core's DistributedDataParallel) of this rank."""
    policy, scaling = precision.policy, precision.loss_scaling
    fp16 = policy.params == torch.float16
    # Without master weights a bf16 model is stepped as it is, by the plain optimizer. The distributed one shards fp32
    # master weights in any case.
    bf16 = policy.params == torch.bfloat16 and (policy.master_weights or use_distributed_optimizer)
    core_config = CoreOptimizerConfig(
        optimizer=config.optimizer,
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        sgd_momentum=config.sgd_momentum,
        clip_grad=config.clip_grad,
        fp16=fp16,
        bf16=bf16,
        params_dtype=policy.params,
        loss_scale=scaling.constant if fp16 else None,
        initial_loss_scale=scaling.initial,
        min_loss_scale=scaling.minimum,
        loss_scale_window=scaling.window,
        hysteresis=scaling.hysteresis,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
    )
    with cuda_type_names():
        core = get_megatron_optimizer(core_config, list(chunks), use_gloo_process_groups=False, pg_collection=groups)
    for group in core.param_groups:
        # megatron-core's scheduler alone applies this factor, which is 0 for biases and norms; there may be another.
        group["weight_decay"] *= group["wd_mult"]
    return MegatronOptimizer(core)
