"""Norms of Transformer layers: torch's, and where layers run unfused those of TransformerEngine or Apex."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_megatron.backends.core import FusedLayerNorm, TENorm, TransformerConfig, make_viewless_tensor
from lightning_megatron.backends.extensions import APEX_NORM, TRANSFORMER_ENGINE_NORMS, unavailable


class TorchNorm:
    """torch's LayerNorm or RMSNorm, usable under sequence parallelism.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism. All that it takes is the mark on the parameters,
    which lets ``finalize_model_grads`` sum their gradients over the tensor-parallel ranks.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> torch.nn.Module:
        norm = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        return _marked(norm(hidden_size, eps=eps, dtype=config.params_dtype), config)


class UnfusedNorm:
    """A norm that is called as a module: TransformerEngine's or Apex's if they can be used, torch's otherwise.

    Not for fused blocks, which read a norm's weight and compute by themselves. Names, shapes and initial values of the
    parameters are torch's, so checkpoints do not tell which it was.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> torch.nn.Module:
        # `transformer_config` sets this on a CPU, and there alone.
        device_type = "cpu" if config.use_cpu_initialization else "cuda"
        if unavailable(TRANSFORMER_ENGINE_NORMS, device_type) is None:
            return _adopted(TENorm(config, hidden_size, eps), config)
        if config.normalization == "LayerNorm" and unavailable(APEX_NORM, device_type) is None:
            return _adopted(FusedLayerNorm(config, hidden_size, eps), config)
        return TorchNorm(config, hidden_size, eps)


class ExtensionNorm(torch.nn.Module):
    """What the norms of extensions have in common here; their classes are mixed with it."""

    # TransformerEngine keeps a state of FP8 in every module's state dict. That of a norm is empty, and a model that was
    # trained without TransformerEngine has none.
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to the same. megatron-core's schedule frees outputs, which must not be views for that."""
        out: Tensor = super().forward(x)
        return make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True)


def _adopted(norm: torch.nn.Module, config: TransformerConfig) -> torch.nn.Module:
    kind = type(norm)
    norm.__class__ = type(kind.__name__, (ExtensionNorm, kind), {})
    return _marked(norm.to(config.params_dtype), config)


def _marked(norm: torch.nn.Module, config: TransformerConfig) -> torch.nn.Module:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
