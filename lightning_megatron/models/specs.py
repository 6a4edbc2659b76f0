"""Which modules a Transformer layer is made of, as megatron-core's public ModuleSpecs."""

from __future__ import annotations

from typing import Any

import torch

from lightning_megatron.backends.core import (
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)
from lightning_megatron.models.attention import SDPACoreAttention
from lightning_megatron.models.fused import FusedTransformerLayer


class TorchNorm:
    """torch's LayerNorm or RMSNorm, usable under sequence parallelism.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism. All that it takes is the mark on the parameters,
    which lets ``finalize_model_grads`` sum their gradients over the tensor-parallel ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> torch.nn.Module:
        norm = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        module: torch.nn.Module = norm(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module


class SeededTransformerLayer(TransformerLayer):
    """A layer whose initial weights depend on the seed and its number alone.

    megatron-core draws all layers of a stage from one generator, so weights depend on which stage holds a layer. Here
    a seed gives the same model at any pipeline layout, and on a CPU, where one master weight is drawn and cut, at any
    tensor-parallel size too.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Any, layer_number: int = 1, *, seed: int, **kwargs: Any
    ) -> None:
        stage = kwargs["pg_collection"].pp.rank()
        number = layer_number + get_transformer_layer_offset(config, kwargs.get("vp_stage"), stage)
        torch.manual_seed(seed + 7919 * number)
        super().__init__(config, submodules, layer_number, **kwargs)


class SeededFusedLayer(SeededTransformerLayer, FusedTransformerLayer):
    """The same weights, run as fused blocks."""


def gpt_block_spec(
    config: TransformerConfig, seed: int, vp_stage: int | None = None, *, fused: bool = False
) -> TransformerBlockSubmodules:
    """The decoder layers of one chunk of a GPT. ``fused`` runs them as :mod:`lightning_megatron.models.fused` does."""
    submodules = get_gpt_layer_local_spec().submodules
    submodules.input_layernorm = TorchNorm
    submodules.pre_mlp_layernorm = TorchNorm
    submodules.self_attention.submodules.core_attention = SDPACoreAttention
    module = SeededFusedLayer if fused else SeededTransformerLayer
    layer = ModuleSpec(module=module, submodules=submodules, params={"seed": seed})
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=TorchNorm)
