"""Low-rank adapters (LoRA, arXiv:2106.09685) on megatron-core's parallel linears.

A linear of the weight ``W`` computes ``x W^T + alpha / rank * (x A^T) B^T``, where only ``A`` ``[rank, inputs]`` and
``B`` ``[outputs, rank]`` are trained. Each is split as ``W`` is, or held alike by all tensor-parallel ranks:

- column-parallel: ``A`` is alike, ``B`` is split along the outputs. The gradient that enters ``x A^T`` is summed over
  ranks there, so that of ``A`` is whole; under sequence parallelism it is of this rank's tokens, and summed later.
- row-parallel: ``A`` is split along the inputs and ``x A^T`` summed over ranks; ``B`` is alike.

So a rank's part of ``B A`` is made of its parts of ``B`` and ``A``, which is how weights are merged for export.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends.core import (
    TransformerLayer,
    apply_swiglu_sharded_factory,
    make_sharded_tensors_for_checkpoint,
    tensor_parallel,
)
from lightning_megatron.errors import ModuleError

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
A, B = "adapter.lora_A", "adapter.lora_B"
EMBEDDINGS = ("word_embeddings.weight", "output_layer.weight", "output_layer.bias")
"""Ends of the names of what ``train_embeddings`` leaves unfrozen."""


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """Which linears get adapters, and of which size. Everything else is frozen.

    Raises:
        ValueError: a size out of range, or a name of no linear.
    """

    rank: int = 8
    """Inner size of an adapter."""
    alpha: float = 16.0
    """Adapters are scaled by ``alpha / rank``."""
    dropout: float = 0.0
    """Of the input of an adapter."""
    target_modules: tuple[str, ...] = ("linear_qkv", "linear_proj")
    """Of ``linear_qkv``, ``linear_proj``, ``linear_fc1`` and ``linear_fc2``."""
    train_embeddings: bool = False
    """Train the token embeddings and the output layer as well, whole. Added tokens need it: all of them begin with the
    same embedding."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))  # YAML has lists
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"rank={self.rank} must be at least 1, and dropout={self.dropout} in [0, 1).")
        if not self.target_modules:
            raise ValueError(f"target_modules is empty. Give some of {', '.join(LINEARS)}.")
        for name in self.target_modules:
            if name not in LINEARS:
                near = difflib.get_close_matches(name, LINEARS, n=1)
                raise ValueError(
                    f"target_modules names {name!r}, which is none of {', '.join(LINEARS)}."
                    + (f" Did you mean {near[0]!r}?" if near else "")
                )

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied by."""
        return self.alpha / self.rank


class LoRAAdapter(torch.nn.Module):
    """What is added to the output of one linear.

    Args:
        linear: column- or row-parallel.
        name: of the linear in the whole model; with the seed it gives the initial ``A``, the same in any layout.
    """

    def __init__(self, linear: Any, config: LoRAConfig, name: str, seed: int) -> None:
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        self.group = linear.tp_group
        self.column = isinstance(linear, tensor_parallel.ColumnParallelLinear)
        self.sequence_parallel = linear.sequence_parallel and self.group.size() > 1
        self.gated = name.endswith("linear_fc1") and linear.config.gated_linear_unit
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        bound = 1.0 / math.sqrt(linear.input_size)
        drawn = torch.empty(config.rank, linear.input_size, device="cpu").uniform_(-bound, bound, generator=generator)
        if not self.column:
            drawn = drawn.chunk(self.group.size(), dim=1)[self.group.rank()]
        weight = linear.weight
        self.lora_A = torch.nn.Parameter(drawn.to(weight.device, weight.dtype).contiguous())
        self.lora_B = torch.nn.Parameter(weight.new_zeros(weight.size(0), config.rank))
        split, alike = (self.lora_B, self.lora_A) if self.column else (self.lora_A, self.lora_B)
        tensor_parallel.set_tensor_model_parallel_attributes(split, True, 0 if self.column else 1, 1)
        alike.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[sequence, batch, inputs]`` to ``[sequence, batch, outputs]``, each as the linear has it on this rank."""
        x = self._drop(x)
        low = F.linear(x, self.lora_A)
        if self.column:
            enter = (
                tensor_parallel.gather_from_sequence_parallel_region
                if self.sequence_parallel
                else tensor_parallel.copy_to_tensor_model_parallel_region
            )
            low = enter(low, group=self.group)
        else:
            leave = (
                tensor_parallel.reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else tensor_parallel.reduce_from_tensor_model_parallel_region
            )
            low = leave(low, group=self.group)
        return F.linear(low, self.lora_B) * self.scale

    def product(self, x: Tensor) -> Tensor:
        """The same without collectives, for whoever sums a row-parallel linear's outputs over ranks."""
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return x
        # Tensor-parallel ranks draw the same where they hold the same. Under sequence parallelism the stack has forked.
        alike = self.column or self.sequence_parallel
        with nullcontext() if alike else tensor_parallel.get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        """Where the two matrices lie in the global model; with a gate, ``B`` is split as the weight is."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"lora_B": 0} if self.column else {"lora_A": 1},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:
            key = f"{prefix}lora_B"
            state[key] = apply_swiglu_sharded_factory(
                state[key], sharded_offsets, tp_group=self.group, dp_group=metadata["dp_cp_group"]
            )
        return state


def add_adapters(chunks: Iterable[Any], config: LoRAConfig, seed: int) -> None:
    """Freeze all weights of this rank's chunks but the embeddings, if they are to be trained, and give the linears that
    are asked for adapters.

    Raises:
        ModuleError: a linear of an expert.
    """
    parallel = (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(config.train_embeddings and name.endswith(EMBEDDINGS))
        for path, layer in list(chunk.named_modules()):
            if not isinstance(layer, TransformerLayer):
                continue
            for inner, linear in list(layer.named_modules()):
                if isinstance(linear, parallel) and inner.rpartition(".")[2] in config.target_modules:
                    _adapt(linear, config, f"{path.partition('.layers.')[0]}.{layer.layer_number}.{inner}", seed)
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None:
            # Recomputed layers have gradients only if their input has one, which frozen embeddings do not give it.
            embedding.register_forward_hook(_require_gradient)


def _adapt(linear: Any, config: LoRAConfig, name: str, seed: int) -> None:
    if linear.is_expert:
        raise ModuleError(f"LoRA on a mixture of experts is not supported, but {name} is an expert's. Leave lora=None.")
    adapter = LoRAAdapter(linear, config, name, seed)
    without = linear.sharded_state_dict

    def sharded_state_dict(prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        state: dict[str, Any] = without(prefix, sharded_offsets, metadata)
        return state | adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)

    linear.adapter = adapter
    linear.sharded_state_dict = sharded_state_dict
    linear.register_forward_hook(_add_output)


def _add_output(linear: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return outputs[0] + linear.adapter(inputs[0]), outputs[1]


def _require_gradient(embedding: Any, inputs: Any, output: Any) -> Any:
    if torch.is_grad_enabled() and torch.is_tensor(output) and not output.requires_grad:
        output.requires_grad_()
    return output


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter's matrix."""
    return name.endswith((A, B))
