"""16-bit parameters of a module as float32 main weights for a while, for code that averages or replaces weights.

The parameters themselves cannot change their type: torch would drop the nodes of autograd on which megatron-core has
put its hooks. So modules hold other parameters meanwhile. ``tests/backends/test_optimizer_state.py`` fails when an
upgrade moves an attribute of megatron-core's optimizers that is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_megatron.backends import optimizer_state
from lightning_megatron.backends.core import DistributedOptimizer, MegatronOptimizer

_HALF = (torch.bfloat16, torch.float16)


class MainWeights:
    """Shows the float32 main weights of an optimizer as the parameters of a module, and takes over what they become.

    Main weights of a distributed optimizer are gathered; 16-bit parameters without any are copied.
    """

    def __init__(self) -> None:
        self._shown: list[tuple[Module, str, Parameter, Parameter]] = []
        self._of: dict[int, Tensor] = {}
        self._close: list[Callable[[], None]] = []
        self._exact: dict[int, Tensor] = {}
        """Values of parameters without main weights that 16 bits do not hold, by the identity of the parameter."""

    @torch.no_grad()
    def open(self, module: Module, optimizer: MegatronOptimizer) -> None:
        """Replace all 16-bit parameters of ``module``. Every rank calls this with current weights, and then ``close``.

        Where a parameter is not its main weight rounded, others than the optimizer have written it, and its own value
        counts.
        """
        self._of = {}
        for part in optimizer_state.parts(optimizer):
            if isinstance(part, DistributedOptimizer):
                self._gather(part)
        for state in optimizer_state.parameter_states(optimizer):
            if state.is_master and id(state.parameter) not in self._of:
                self._of[id(state.parameter)] = state.stepped.view_as(state.parameter)
        shown: dict[int, Parameter] = {}
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.dtype in _HALF:
                    if id(parameter) not in shown:
                        shown[id(parameter)] = Parameter(self._float(parameter), parameter.requires_grad)
                    self._shown.append((owner, name, parameter, shown[id(parameter)]))
        for owner, name, _, instead in self._shown:
            owner.register_parameter(name, instead)

    def _gather(self, part: Any) -> None:
        """Whole main weights of a distributed optimizer, whose ranks have ranges of them."""
        parameters = [p for buffer in part.buffers for p in buffer.params if p.dtype in _HALF]
        if not parameters:
            return
        flat = parameters[0].new_zeros(sum(p.numel() for p in parameters), dtype=torch.float32)
        pieces = flat.split([p.numel() for p in parameters])
        whole = {id(p): piece for p, piece in zip(parameters, pieces, strict=True)}
        own = []
        for _, parameter, stepped, is_master, start in optimizer_state.stepped_tensors(part):
            if is_master:
                own.append((whole[id(parameter)][start : start + stepped.numel()], stepped.view(-1)))
        for piece, master in own:
            piece.copy_(master)
        dist.all_reduce(flat, group=part.data_parallel_group)
        self._of |= {id(p): whole[id(p)].view_as(p) for p in parameters}

        def take_over() -> None:
            for piece, master in own:
                master.copy_(piece)

        self._close.append(take_over)

    def _float(self, parameter: Parameter) -> Tensor:
        main = self._of.get(id(parameter), self._exact.get(id(parameter)))
        if main is None:
            return parameter.detach().float()
        written = main.to(parameter.dtype) != parameter
        return main.copy_(torch.where(written, parameter.detach().float(), main))

    @torch.no_grad()
    def close(self) -> None:
        """Put the parameters back, with the values that were given to what took their place."""
        shown, self._shown = self._shown, []
        without: dict[int, tuple[Tensor, Tensor]] = {}
        for owner, name, parameter, instead in shown:
            owner.register_parameter(name, parameter)
            parameter.copy_(instead)
            if id(parameter) not in self._of:
                without[id(parameter)] = parameter, instead.detach()
        rounded = [(parameter.float() != instead).any() for parameter, instead in without.values()]
        flags = torch.stack(rounded).tolist() if rounded else []  # the host waits once
        self._exact = {key: without[key][1] for key, is_rounded in zip(without, flags, strict=True) if is_rounded}
        for take_over in self._close:
            take_over()
        self._of, self._close = {}, []
