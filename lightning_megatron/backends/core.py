"""The door to megatron-core: its public names that the package uses, imported once, quietly, on any device.

Modules of the package import megatron-core only from here. On a machine without CUDA the CPU stand-ins are in place
before the first import (see :mod:`lightning_megatron.backends.cpu`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from lightning_megatron.backends import compiler_cache, cpu, extensions, kernels


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Silence what megatron-core says at import about packages that are optional here; nothing else."""
    extension_log = logging.getLogger("torch.utils.cpp_extension")
    level = extension_log.level
    extension_log.setLevel(logging.ERROR)  # "No CUDA runtime is found"
    try:
        with warnings.catch_warnings():
            for message in (r".*Transformer Engine and Apex are not installed", r".*Apex is not installed"):
                warnings.filterwarnings("ignore", message=message, category=UserWarning)
            warnings.filterwarnings("ignore", category=SyntaxWarning, module=r"megatron\.")
            warnings.filterwarnings("ignore", category=SyntaxWarning, message=r".*invalid escape sequence")
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")
            yield
    finally:
        extension_log.setLevel(level)


_NOISE = (
    r"full scope is deprecated",  # of a default of megatron-core's own
    r"MimoModelConfig is experimental",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.11
    # The distributed optimizer's shards are views.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
)
_NOISE_ON_CPU = (r"When using (async grad allreduce|sequence parallelism) it is recommended to set the environment",)


class _WithoutNotices(logging.Filter):
    """Drops lines that tell a user of the package nothing: about a model class that the GPT checkpoints of the world
    are in, and about a layout that may be computed in either of two places."""

    NOTICES = ("GPTModel IS DEPRECATED", "Auto-computing layout inside DDP")

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(notice in message for notice in self.NOTICES)


if not torch.cuda.is_available():
    cpu.install()

with compiler_cache.left_to_compilation(), _quiet_import():
    extensions.keep_out_broken()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        distributed_data_parallel,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt import gpt_model
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Float16Optimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer, MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules, SelfAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules, apply_swiglu_sharded_factory
    from megatron.core.transformer.module import Float16Module, param_is_not_shared
    from megatron.core.transformer.module import MegatronModule as CoreModule
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.router import Router
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
        get_transformer_layer_offset,
    )
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
    from megatron.core.utils import divide, get_model_config, make_viewless_tensor

kernels.install()
for _logger in (gpt_model.logger, distributed_data_parallel.logger):
    _logger.addFilter(_WithoutNotices())
for _message in _NOISE + (() if torch.cuda.is_available() else _NOISE_ON_CPU):
    warnings.filterwarnings("ignore", message=_message)


def use_device(device: torch.device) -> None:
    """Let megatron-core run on ``device``: with the CPU stand-ins for a CPU, without them for CUDA."""
    if device.type == "cpu":
        cpu.install()
    else:
        cpu.uninstall()


def device_name_and_memory(device: torch.device) -> tuple[str, float]:
    """What CUDA calls the device and its total bytes; ``"cpu"`` and the host's free bytes for a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, float(properties.total_memory)
    return "cpu", float(psutil.virtual_memory().available)


def is_counted_here(parameter: torch.Tensor, groups: ProcessGroupCollection) -> bool:
    """Whether this rank counts ``parameter`` for its tensor- and pipeline-parallel ranks.

    False for all but one copy of what tensor-parallel ranks hold alike, and for the last stage's copy of a tied
    embedding.
    """
    return param_is_not_shared(parameter) and tensor_parallel.param_is_not_tensor_parallel_duplicate(
        parameter, groups.tp, groups.expt_tp
    )


__all__ = [
    "AttnMaskType",
    "CoreModule",
    "CoreOptimizerConfig",
    "CrossAttention",
    "CrossAttentionSubmodules",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "FP32Optimizer",
    "Float16Module",
    "Float16Optimizer",
    "FusedLayerNorm",
    "GPTModel",
    "IdentityOp",
    "LanguageModelEmbedding",
    "LanguageModule",
    "MLP",
    "MLPSubmodules",
    "MegatronOptimizer",
    "ModelType",
    "ModuleSpec",
    "OptimizerParamScheduler",
    "ProcessGroupCollection",
    "RotaryEmbedding",
    "Router",
    "SelfAttention",
    "ShardedObject",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TENorm",
    "TransformerBlock",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "apply_swiglu_sharded_factory",
    "device_name_and_memory",
    "dist_checkpointing",
    "divide",
    "finalize_model_grads",
    "get_bias_dropout_add",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_megatron_optimizer",
    "get_model_config",
    "get_moe_metrics_tracker",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "initialize_rng_tracker",
    "is_counted_here",
    "make_sharded_tensors_for_checkpoint",
    "make_viewless_tensor",
    "model_parallel_cuda_manual_seed",
    "parallel_state",
    "replace_prefix_for_sharding",
    "sharded_state_dict_default",
    "tensor_parallel",
    "use_device",
]
