"""From our frozen configurations to megatron-core's ``TransformerConfig``: the one place that fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends.core import ProcessGroupCollection, TransformerConfig, parallel_state
from lightning_megatron.backends.extensions import APEX_WEIGHT_GRADIENTS, unavailable
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import TransformerModelConfig
from lightning_megatron.precision import DtypePolicy

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True, slots=True)
class Stage:
    """Which part of the model one chunk is."""

    pre_process: bool
    """Holds the embedding."""
    post_process: bool
    """Holds the output layer and computes the loss."""
    vp_stage: int | None
    """Index of the chunk on its rank, ``None`` without interleaving."""


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a module needs to know to build its chunks on this rank."""

    layout: ParallelLayout
    groups: ProcessGroupCollection
    policy: DtypePolicy
    device: torch.device
    seed: int
    """Of the initial weights, the same on every rank."""
    perform_initialization: bool = True
    """Whether weights are drawn; not if all come from elsewhere: on a CPU each is drawn whole, then cut."""

    @property
    def stages(self) -> list[Stage]:
        """The chunks of this rank, in order."""
        chunks = self.layout.virtual_pipeline_model_parallel_size
        return [
            Stage(
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=index),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=index),
                vp_stage=index,
            )
            for index in (range(chunks) if chunks is not None else (None,))
        ]


def transformer_config(
    model: TransformerModelConfig, context: BuildContext, num_layers: int | None = None, **more: Any
) -> TransformerConfig:
    """megatron-core's configuration of ``model`` on this rank.

    Args:
        num_layers: all layers that pipeline stages share, if that is not ``model.num_layers``.
        more: fields that this model alone has, or sets in its own way.

    Raises:
        LayoutError: the model cannot be split this way.
    """
    layout, policy = context.layout, context.policy
    more = {"init_method_std": model.init_method_std, **more}
    layout.check_model(
        num_layers=num_layers or model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_size,
    )
    layout.check_experts(getattr(model, "num_moe_experts", None), add_bias_linear=model.add_bias_linear)
    interleaved = layout.num_chunks > 1
    on_cpu = context.device.type == "cpu"
    return TransformerConfig(
        # the model
        num_layers=num_layers or model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
        normalization=model.normalization,
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=_ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated_linear_unit,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_bias_linear if model.add_qkv_bias is None else model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        recompute_granularity=model.recompute_granularity,
        recompute_method=model.recompute_method,
        recompute_num_layers=model.recompute_num_layers,
        recompute_modules=["core_attn"] if model.recompute_granularity == "selective" else None,
        # the layout
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        num_layers_in_first_pipeline_stage=layout.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=layout.num_layers_in_last_pipeline_stage,
        pipeline_model_parallel_layout=layout.pipeline_model_parallel_layout,
        # Interleaved stages send and receive several times between the same two ranks; in one batch these mix up
        # silently when there are two stages. Megatron-LM guards this in its argument parser only.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        # A wait of the host after each send and receive, for a race of torch before 2.0: the device would run dry.
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        # types
        params_dtype=policy.params,
        pipeline_dtype=policy.params,
        bf16=policy.params == torch.bfloat16,
        fp16=policy.params == torch.float16,
        # The gradient is divided by the tokens of all micro-batches and replicas, so the loss is a mean over tokens.
        calculate_per_token_loss=True,
        # Initialising on the CPU draws one master weight and cuts it, so weights do not depend on the TP size.
        use_cpu_initialization=on_cpu,
        perform_initialization=context.perform_initialization,
        # Linears of unfused layers then add weight gradients to `main_grad`, as fused blocks do by themselves. Whatever
        # trains must have one, and the strategy trains nothing outside of megatron-core's DDP, which gives it.
        gradient_accumulation_fusion=unavailable(APEX_WEIGHT_GRADIENTS, context.device.type) is None,
        # Fusions of megatron-core's own attention and MLP, which need TransformerEngine or Apex.
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=not on_cpu,
        **more,
    )
