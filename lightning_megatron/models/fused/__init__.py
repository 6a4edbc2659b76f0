"""Transformer layers and losses that run at the speed of the device, with nothing but torch and triton.

:class:`FusedTransformerLayer` takes the place of megatron-core's layer in a ModuleSpec, :class:`FusedLoss` that of the
output layer and the loss. Parameters, checkpoints and parallelism are megatron-core's. On a CPU the same code runs in
plain torch, which is how its values are tested without a GPU.
"""

from lightning_megatron.models.fused.cross_entropy import FusedLoss, linear_cross_entropy
from lightning_megatron.models.fused.float8_check import check_float8
from lightning_megatron.models.fused.layer import FusedTransformerLayer, layer_spec, reason_not_used
from lightning_megatron.models.fused.linear import TensorParallel

__all__ = [
    "FusedLoss",
    "FusedTransformerLayer",
    "TensorParallel",
    "check_float8",
    "layer_spec",
    "linear_cross_entropy",
    "reason_not_used",
]
