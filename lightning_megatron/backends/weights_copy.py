"""Copies of a module's weights without what it computes with: process groups, configurations, hooks and graphs.

torch's modules copy everything they refer to, and a process group cannot be copied. Private attributes of
``torch.nn.Module`` are read for what has no public name: shared submodules and which buffers are saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class WeightsCopy(Module):
    """Parameters, buffers and submodules under the names that the original has, and nothing to call."""


class WeightsCopyWithExtraState(WeightsCopy):
    """Of a module that has an extra state."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self._extra = state

    def get_extra_state(self) -> Any:
        return self._extra

    def set_extra_state(self, state: Any) -> None:
        self._extra = state


def copy_weights(original: Module, memo: dict[int, Any]) -> Module:
    """A copy of all parameters and buffers, 16-bit ones as float32, so that averages of many do not lose small changes.

    Args:
        memo: of ``copy.deepcopy``; what is shared inside of ``original`` is shared inside of the copy.
    """
    if id(original) in memo:
        return memo[id(original)]
    has_extra_state = type(original).get_extra_state is not Module.get_extra_state
    copy = WeightsCopyWithExtraState(original.get_extra_state()) if has_extra_state else WeightsCopy()
    memo[id(original)] = copy
    for name, parameter in original._parameters.items():
        copy.register_parameter(name, None if parameter is None else _copied(parameter, memo))  # type: ignore[arg-type]
    for name, buffer in original._buffers.items():
        persistent = name not in original._non_persistent_buffers_set
        copy.register_buffer(name, None if buffer is None else _copied(buffer, memo), persistent=persistent)
    for name, module in original._modules.items():
        copy.add_module(name, None if module is None else copy_weights(module, memo))
    return copy


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        half = tensor.dtype in (torch.bfloat16, torch.float16)
        values = tensor.detach().to(torch.float32 if half else tensor.dtype, copy=True)
        memo[id(tensor)] = Parameter(values, tensor.requires_grad) if isinstance(tensor, Parameter) else values
    return memo[id(tensor)]
