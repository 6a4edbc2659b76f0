"""``parameter.grad`` as hooks and callbacks know it, between the schedule of a batch and the optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.errors import ModuleError

_TOLERANCE = 1e-5


class VisibleGradients:
    """Shows megatron-core's gradient buffers as ``parameter.grad``, and takes over what hooks made of them.

    Args:
        parameters: that have a ``main_grad``.
        group: of this replica's model-parallel ranks, over which a norm of the whole gradient would go.
        device: of the group's tensors.
    """

    def __init__(self, parameters: Sequence[Any], group: dist.ProcessGroup, device: torch.device) -> None:
        self._parameters = list(parameters)
        self._group = group
        self._device = device
        self._shown: list[Any] = []
        self._norms: Tensor | None = None

    @torch.no_grad()
    def show(self, untrained: Sequence[Tensor]) -> None:
        """Let ``parameter.grad`` be a view of the buffer, in its type, for all parameters but ``untrained``."""
        without = {id(parameter) for parameter in untrained}
        self._shown = [p for p in self._parameters if id(p) not in without and _takes(p)]
        for parameter in self._shown:
            if parameter.dtype != parameter.main_grad.dtype:
                parameter.grad_dtype = None
            parameter.grad = parameter.main_grad
        self._norms = _norms(self._shown) if self._group.size() > 1 and self._shown else None

    @torch.no_grad()
    def take(self) -> list[Tensor]:
        """Put what hooks have left in ``parameter.grad`` into the buffers.

        Returns:
            Parameters whose gradient a hook has set to ``None``, which torch's optimizers leave as they are.

        Raises:
            ModuleError: gradients were scaled by the norm of this rank's part of them; on all model-parallel ranks.
        """
        shown, self._shown = self._shown, []
        without: list[Tensor] = []
        for parameter in shown:
            gradient = parameter.grad
            if gradient is None:
                parameter.main_grad.zero_()
                without.append(parameter)
            elif gradient.data_ptr() != parameter.main_grad.data_ptr():
                parameter.main_grad.copy_(gradient)
            parameter.grad = None
            if parameter.dtype != parameter.main_grad.dtype:
                parameter.grad_dtype = parameter.dtype
        before, self._norms = self._norms, None
        if self._group.size() > 1:
            self._check_scaling(shown, torch.zeros(0, device=self._device) if before is None else before)
        return without

    def _check_scaling(self, shown: Sequence[Any], before: Tensor) -> None:
        """Refuse that ranks have multiplied all their gradients by one number each, and by different ones."""
        none = torch.tensor(float("-inf"), device=self._device)
        least, most = -none, none
        if shown:
            moved = before > 0
            ratio = _norms(shown) / before.clamp(min=torch.finfo(before.dtype).tiny)
            least, most = torch.where(moved, ratio, -none).min(), torch.where(moved, ratio, none).max()
        one_factor = ~(most - least > _TOLERANCE * most)  # also of a rank without gradients
        facts = torch.stack([-one_factor.float(), most, -least])
        dist.all_reduce(facts, op=dist.ReduceOp.MAX, group=self._group)
        everywhere, largest, smallest = facts[0].item() < 0, facts[1].item(), -facts[2].item()
        if everywhere and largest - smallest > 2 * _TOLERANCE * largest:
            raise ModuleError(
                f"A hook has multiplied the gradients of one model-parallel rank by {smallest:.6g} and those of "
                f"another by {largest:.6g}. parameters() of a rank are only its part of the model, so that "
                "torch.nn.utils.clip_grad_norm_ sees a part of the norm. Use Trainer(gradient_clip_val=...), or call "
                "self.clip_gradients(optimizer, gradient_clip_val=...) in configure_gradient_clipping, which clip by "
                "the norm of the whole model."
            )


def _norms(parameters: Sequence[Any]) -> Tensor:
    return torch.stack(torch._foreach_norm([parameter.main_grad for parameter in parameters], dtype=torch.float32))


def _takes(parameter: Any) -> bool:
    """Whether torch lets the gradient have another type than its parameter, which it does from 2.10 on."""
    return parameter.dtype == parameter.main_grad.dtype or hasattr(parameter, "grad_dtype")
