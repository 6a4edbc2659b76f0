"""megatron-core as a script without the package uses it: its own layers, buffers, schedule-free step and optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Batch, Workload
from lightning_megatron.backends import core, cpu, kernels
from lightning_megatron.models.config import GPTConfig

Layers = Literal["megatron-core", "transformer-engine"]


def unavailable(layers: Layers) -> str | None:
    """Why these layers cannot run here, in words."""
    if layers == "megatron-core":
        return None
    for module in ("transformer_engine", "transformer_engine.pytorch"):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever an installation that does not fit this torch raises
            return f"{module} cannot be imported: {error}"
    return None


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _set_up(device: torch.device) -> core.ProcessGroupCollection:
    kernels.uninstall()  # what the package puts in place of megatron-core's optimizer functions
    core.use_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    core.parallel_state.destroy_model_parallel()
    core.parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    core.model_parallel_cuda_manual_seed(1234)
    return core.ProcessGroupCollection.use_mpu_process_groups()


def _config(model: GPTConfig, device: torch.device, layers: Layers) -> core.TransformerConfig:
    on_gpu = device.type == "cuda"
    return core.TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_size,
        normalization=model.normalization,
        activation_func=F.silu if model.gated_linear_unit else F.gelu,
        gated_linear_unit=model.gated_linear_unit,
        add_bias_linear=model.add_bias_linear,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=on_gpu and _has("scaled_upper_triang_masked_softmax_cuda"),
        apply_rope_fusion=on_gpu and layers == "transformer-engine",
        cross_entropy_loss_fusion=True,
        gradient_accumulation_fusion=on_gpu
        and (layers == "transformer-engine" or _has("fused_weight_gradient_mlp_cuda")),
    )


def _spec(model: GPTConfig, layers: Layers) -> Any:
    if layers == "megatron-core":
        return core.get_gpt_layer_local_spec(normalization=model.normalization)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec()


def megatron(workload: Workload, layers: Layers, device: torch.device | None = None) -> Callable[[Batch], Tensor]:
    """One optimizer step of megatron-core's ``GPTModel`` on a batch: bf16 with fp32 gradients and master weights.

    Raises:
        ValueError: a model that is no GPT with learned or rotary positions.
    """
    model = workload.config
    if not isinstance(model, GPTConfig) or model.position_embedding_type not in ("learned_absolute", "rope"):
        raise ValueError(f"megatron-core alone has no such model: {type(model).__name__}, {model}.")
    device = device or torch.device("cuda", torch.cuda.current_device())
    groups = _set_up(device)
    config = _config(model, device, layers)
    gpt = core.GPTModel(
        config,
        _spec(model, layers),
        vocab_size=model.padded_vocab_size(1),
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type=model.position_embedding_type,
        rotary_base=int(model.rotary_base),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        pg_collection=groups,
    ).to(device)
    chunk = core.DistributedDataParallel(
        config,
        core.DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        core.Float16Module(config, gpt),
        pg_collection=groups,
    )
    options = core.CoreOptimizerConfig(
        lr=1e-4, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16
    )
    with cpu.cuda_type_names():
        optimizer = core.get_megatron_optimizer(options, [chunk], use_gloo_process_groups=False, pg_collection=groups)
    positions = torch.arange(model.max_position_embeddings, device=device).unsqueeze(0)

    def step(batch: Batch) -> Tensor:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = chunk(batch["tokens"], positions, None, labels=batch["labels"]).float().mean()
        loss.backward()
        core.finalize_model_grads([chunk], pg_collection=groups)
        with cpu.cuda_type_names():
            optimizer.step()
        return loss.detach()

    return step
