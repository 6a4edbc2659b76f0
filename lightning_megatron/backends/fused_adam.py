"""AdamW in one kernel over all parameters, which clips the gradients it reads and writes the model's weights as well.

One step of mixed-precision Adam must read gradient, master weight and two moments, and write the last three and the
16-bit weight: 30 bytes a parameter. Torch's fused AdamW, preceded by clipping and followed by a copy to 16 bit, moves
42. The kernel here moves the 30. It takes tables of addresses, so it needs no flat buffer and works on whatever tensors
megatron-core's optimizers hold (master copies, or shards of the distributed optimizer).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends import gpu_adam_kernel

_OWNER = "_pending_of_fused_adam"


def clip_gradients(parameters: list[Tensor], total_norm: Tensor, max_norm: float) -> None:
    """Scale gradients by ``min(1, max_norm / (total_norm + 1e-6))``, in the optimizer's kernel if it can.

    It can if one kernel owns all of these parameters. A parameter is marked by the :class:`FusedAdam` that owns it.

    Args:
        total_norm: of the gradients as they are, without the scale of :meth:`FusedAdam.scale_gradients`.
    """
    pending = getattr(parameters[0], _OWNER, None)
    scale = None if pending is None else pending.scale
    norm = total_norm if scale is None else total_norm * scale
    coefficient = (max_norm / (norm + 1.0e-6)).clamp(max=1.0)
    if scale is not None:
        coefficient = coefficient * scale
    # All of them, or megatron-core clips two groups of parameters by two norms.
    deferred = (
        pending is not None
        and pending.num_parameters == len(parameters)
        and all(getattr(p, _OWNER, None) is pending for p in parameters)
    )
    if deferred and pending is not None:
        pending.coefficient = coefficient
        return
    if pending is not None:
        pending.scaled = True
    _multiply_gradients(parameters, coefficient)


def _multiply_gradients(parameters: list[Tensor], factor: Tensor) -> None:
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor.reshape(()))


@dataclass
class _Pending:
    """What scales the gradients of one optimizer in its next step."""

    num_parameters: int = 0
    """That the kernel updates; 0 before its first step."""
    coefficient: Tensor | None = None
    """Of clipping, with ``scale`` in it, shape ``[1]``."""
    scale: Tensor | None = None
    """Asked for by :meth:`FusedAdam.scale_gradients`."""
    scaled: bool = False
    """The gradients have been multiplied by it already."""

    def take(self) -> Tensor | None:
        """What is left to multiply by; the next step starts afresh."""
        left = self.coefficient if self.coefficient is not None else None if self.scaled else self.scale
        self.coefficient, self.scale, self.scaled = None, None, False
        return left


@dataclass(frozen=True)
class _Launch:
    """Parameters that one launch updates: one parameter group, one step count, one 16-bit type, one alignment."""

    group: dict[str, Any]
    steps: list[Tensor]
    tables: gpu_adam_kernel.Tables


class FusedAdam(torch.optim.AdamW):
    """``torch.optim.AdamW`` (arXiv:1711.05101) whose step on CUDA is one kernel.

    State, state dict and arithmetic are torch's (``step`` on the host, ``exp_avg``, ``exp_avg_sq``), so checkpoints are
    interchangeable. On CPU, and with ``capturable=True``, the step is torch's own.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        """``adam_w_mode=False`` adds the decay to the gradient (Adam with L2), as in TransformerEngine's and Apex's."""
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, capturable=capturable)
        self.defaults["decoupled_weight_decay"] = adam_w_mode
        for group in self.param_groups:
            group["decoupled_weight_decay"] = adam_w_mode
        self._pending = _Pending()
        self._launches: list[_Launch] | None = None
        self._addresses: tuple[int, ...] = ()
        self._model_params: dict[Tensor, Tensor] = {}
        self.wrote_model_params = False
        """Whether the last step wrote the 16-bit weights too."""

    def set_model_params(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """From the next step on, write each ``(master, model)`` pair's 16-bit model weight together with its master."""
        self._model_params = dict(pairs)
        self._launches = None

    def scale_gradients(self, scale: Tensor) -> None:
        """Multiply the gradients of the next step by a number, when they are read: that saves a pass over all of them.

        Args:
            scale: on the gradients' device, shape ``[]`` or ``[1]``.
        """
        for group in self.param_groups:
            for p in group["params"]:
                setattr(p, _OWNER, self._pending)
        self._pending.take()
        self._pending.scale = scale.float().reshape(1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the next step looks at its tensors afresh."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # torch's AdamW sets it in every state it loads
            group["decoupled_weight_decay"] = self.defaults["decoupled_weight_decay"]
        self._launches = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters or not _kernel_runs_on(parameters, self.param_groups):
            self.wrote_model_params = False
            left = self._pending.take()
            if left is not None and parameters:
                _multiply_gradients(parameters, left)
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._initialise(parameters)
        if self._launches is None or self._addresses_of(parameters) != self._addresses:
            self._plan(parameters)
        coefficient = self._pending.take()
        for launch in self._launches or ():
            torch._foreach_add_(launch.steps, 1)
            group = launch.group
            gpu_adam_kernel.launch(
                launch.tables,
                coefficient=coefficient,
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group["decoupled_weight_decay"],
                step=int(launch.steps[0].item()),  # on the host: no synchronisation
            )
        self.wrote_model_params = bool(self._model_params)
        return loss

    def _initialise(self, parameters: list[Tensor]) -> None:
        for p in parameters:
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            elif state["step"].is_cuda:  # a checkpoint of torch's own fused AdamW
                state["step"] = state["step"].cpu()

    def _addresses_of(self, parameters: list[Tensor]) -> tuple[int, ...]:
        """Everything that the tables depend on; 2 host microseconds a parameter, while the device runs the backward."""
        addresses: list[int] = []
        for p in parameters:
            state, model = self.state[p], self._model_params.get(p)
            addresses += (p.data_ptr(), p.grad.data_ptr(), state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr())  # type: ignore[union-attr]
            addresses.append(0 if model is None else model.data_ptr())
        return tuple(addresses)

    def _plan(self, parameters: list[Tensor]) -> None:
        """Sort the parameters into launches and upload their addresses."""
        buckets: dict[tuple[Any, ...], tuple[dict[str, Any], list[Tensor]]] = {}
        wanted = set(parameters)
        self._pending.num_parameters = len(parameters)
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p not in wanted:
                    continue
                model = self._model_params.get(p)
                tensors = self._tensors(p)
                aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
                key = (index, self.state[p]["step"].item(), None if model is None else model.dtype, aligned, p.device)
                buckets.setdefault(key, (group, []))[1].append(p)
                setattr(p, _OWNER, self._pending)
        launches = []
        for (_, _, model_dtype, aligned, _), (group, members) in buckets.items():
            # A tensor that several parameters share (megatron-core's loading makes such) counts once a step.
            steps = list({id(self.state[p]["step"]): self.state[p]["step"] for p in members}.values())
            tables = gpu_adam_kernel.Tables.build([self._tensors(p) for p in members], model_dtype, aligned)
            launches.append(_Launch(group, steps, tables))
        self._launches, self._addresses = launches, self._addresses_of(parameters)

    def _tensors(self, p: Tensor) -> list[Tensor]:
        state, model = self.state[p], self._model_params.get(p)
        tensors = [p, p.grad, state["exp_avg"], state["exp_avg_sq"]]
        return [*tensors, model] if model is not None else tensors


def _kernel_runs_on(parameters: list[Tensor], groups: list[dict[str, Any]]) -> bool:
    """Float32 parameters and gradients on CUDA, dense in memory, with torch's plain AdamW options."""
    if any(group["amsgrad"] or group["maximize"] or group["capturable"] for group in groups):
        return False
    return gpu_adam_kernel.AVAILABLE and all(
        (p.is_cuda or gpu_adam_kernel.INTERPRETED)
        and p.dtype == torch.float32
        and p.is_contiguous()
        and p.grad is not None
        and p.grad.dtype == torch.float32
        and p.grad.is_contiguous()
        for p in parameters
    )
