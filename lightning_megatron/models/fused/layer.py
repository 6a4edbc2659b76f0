"""A Transformer layer that runs as two fused blocks around its core attention, with megatron-core's parameters."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends.core import (
    IdentityOp,
    ModuleSpec,
    TransformerConfig,
    TransformerLayer,
    tensor_parallel,
)
from lightning_megatron.models.fused.blocks import AttentionInput, AttentionOutputAndMLP, LayerPlan
from lightning_megatron.models.fused.cross import AttentionOutputAndQuery, KeyValue
from lightning_megatron.models.fused.exchange import Exchange
from lightning_megatron.models.fused.float8 import LayerCall, LayerFloat8
from lightning_megatron.models.fused.float8_blocks import Float8AttentionInput, Float8AttentionOutputAndMLP
from lightning_megatron.models.fused.graph import LayerGraph
from lightning_megatron.models.fused.linear import TensorParallel, before_forward, gradients_come_by_autograd
from lightning_megatron.models.fused.types import Activation, ActivationName, Norm
from lightning_megatron.precision import Float8

logger = logging.getLogger(__name__)

_MUST_BE_OFF = (
    "multi_latent_attention",
    "num_moe_experts",
    "fp8",
    "fp4",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "layernorm_zero_centered_gamma",
    "fp32_residual_connection",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "cpu_offloading",
    "fine_grained_activation_offloading",
    "use_te_activation_func",
    "use_kitchen",
    "no_rope_freq",
    "delay_wgrad_compute",
    "tp_comm_overlap",
)
"""Fields of megatron-core's configuration that change what a layer computes, in ways the fused layer does not know."""
_RECOMPUTES = {"core_attn", "layernorm"}
"""Recomputation that the fused layer can do, or does anyway."""


def _activation(config: TransformerConfig) -> ActivationName | None:
    function = config.activation_func
    if isinstance(function, partial) and function.func is F.gelu:
        return "gelu_tanh" if function.keywords == {"approximate": "tanh"} else None
    if function is F.gelu:
        # megatron-core's own fused bias and GELU is the tanh approximation.
        return "gelu_tanh" if config.bias_activation_fusion else "gelu"
    names: dict[Any, ActivationName] = {F.silu: "silu", F.relu: "relu"}
    return names.get(function)


def reason_not_used(config: TransformerConfig) -> str | None:
    """Why layers of this configuration run as megatron-core's, in words; ``None`` if they can be fused."""
    for name in _MUST_BE_OFF:
        if getattr(config, name):
            return f"{name}={getattr(config, name)!r}"
    if _activation(config) is None:
        return f"activation_func={config.activation_func!r}"
    if config.num_query_groups is not None and config.num_query_groups < config.tensor_model_parallel_size:
        return (
            f"num_query_groups={config.num_query_groups} is smaller than tensor_model_parallel_size="
            f"{config.tensor_model_parallel_size}"
        )
    modules = set(config.recompute_modules or ()) if config.recompute_granularity == "selective" else set()
    if not modules <= _RECOMPUTES:
        return f"recompute_modules={sorted(modules - _RECOMPUTES)}"
    return None


def reason_without_graphs(config: TransformerConfig) -> str | None:
    """Why fused FP8 layers of this configuration run without CUDA graphs, in words; ``None`` if they are captured.

    Scales are agreed on between ranks, and kept from one micro-batch to the next, outside of what is captured.
    """
    for name, only in (
        ("tensor_model_parallel_size", 1),
        ("pipeline_model_parallel_size", 1),
        ("context_parallel_size", 1),
        ("recompute_granularity", None),
        ("attention_dropout", 0.0),
    ):
        if getattr(config, name) != only:
            return f"fp8 with {name}={getattr(config, name)!r}"
    return None


@dataclass(frozen=True, slots=True)
class _Others:
    """What a layer reads besides its inputs and parameters."""

    mask: Tensor | None = None
    angles: Tensor | None = None
    """Of the rotary embedding."""
    bias: Any = None
    context_mask: Tensor | None = None

    @property
    def constants(self) -> tuple[Tensor, ...] | None:
        """All of it, if it lies at fixed addresses from step to step; masks do not, nor do other biases."""
        kept = () if self.bias is None else getattr(self.bias, "buffers", None)
        if self.mask is not None or self.context_mask is not None or kept is None:
            return None
        return kept if self.angles is None else (*kept, self.angles)


class FusedTransformerLayer(TransformerLayer):
    """megatron-core's layer with another forward and backward.

    Modules, parameters, their names and their shards are inherited, so checkpoints, pipeline stages, DDP and activation
    recomputation cannot tell the difference. Calls that the fused blocks do not cover (decoding with a cache, packed
    sequences) and configurations of :func:`reason_not_used` take megatron-core's own path.
    """

    inner_dropout = 0.0
    """Of the MLP between its activation and its output; T5's layers have one."""

    def __init__(self, config: TransformerConfig, *args: Any, float8: Float8 | None = None, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._reason = reason_not_used(config)
        if float8 is not None and self._reason is not None:
            raise ValueError(
                f"fp8 is for fused Transformer layers, but these run unfused, because of {self._reason}. Change that, "
                "or leave out MegatronPrecision(fp8=...)."
            )
        if self._reason is not None and self.layer_number == 1:
            logger.warning("Transformer layers run unfused, because of %s.", self._reason)
        self.float8 = None if float8 is None else LayerFloat8(float8, self._weights())
        self._plan = None if self._reason is not None else self._make_plan()
        self._graph: LayerGraph | None = None
        reason = self._reason
        if self.float8 is not None:
            reason = reason or reason_without_graphs(config)
        if reason is None:
            before_backward = None if self.float8 is None else self.float8.note_accumulation
            self._graph = LayerGraph(
                self._blocks,
                list(self.parameters()),
                before_backward,
                chunk=kwargs.get("vp_stage") or 0,
                holds_collectives=config.tensor_model_parallel_size * config.context_parallel_size > 1,
            )
        elif self.layer_number == 1 and torch.cuda.is_available():
            logger.info("Transformer layers run without CUDA graphs, because of %s.", reason)

    def _weights(self) -> list[torch.nn.Parameter]:
        attention, mlp = self.self_attention, self.mlp
        return [m.weight for m in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)]

    def _make_plan(self) -> LayerPlan:
        config, attention = self.config, self.self_attention
        name = _activation(config)
        assert name is not None
        size = self.tp_group.size()
        sequence_parallel = config.sequence_parallel and size > 1
        exchange = self._exchange() if sequence_parallel and self.float8 is None else None
        parallel = TensorParallel(self.tp_group, size, sequence_parallel, exchange)
        return LayerPlan(
            norm=Norm(config.normalization == "RMSNorm", config.layernorm_epsilon),
            activation=Activation(name, config.gated_linear_unit),
            groups=attention.num_query_groups_per_partition,
            queries_per_group=attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition,
            head_width=attention.hidden_size_per_attention_head,
            parallel=parallel,
            rotary_interleaved=config.rotary_interleaved,
            hidden_dropout=self.hidden_dropout,
            inner_dropout=self.inner_dropout,
            keep_norm_outputs=size > 1,
        )

    def _exchange(self) -> Exchange | None:
        exchange, reason = Exchange.of(self.tp_group)
        if reason is not None and self.layer_number == 1 and torch.cuda.is_available():
            logger.info("Tensor-parallel ranks exchange tokens through NCCL, because %s.", reason)
        return exchange

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        attention_bias: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[sequence, batch, hidden]`` to the same shape; the arguments are megatron-core's.

        Besides a tensor, ``attention_bias`` may be a :class:`~lightning_megatron.models.shared_bias.SharedBias`.
        """
        fused = (
            self._plan is not None
            and (context is None) == isinstance(self.cross_attention, IdentityOp)
            and not isinstance(rotary_pos_emb, tuple)
            and (rotary_pos_emb is None or rotary_pos_emb.size(1) == 1)  # kernels share angles between samples
            and all(value is None for name, value in others.items() if name != "padding_mask")
        )
        if not fused:
            if self.float8 is not None and self.training and torch.is_grad_enabled():
                raise ValueError(
                    "fp8 trains on whole sequences of hidden states, but this batch has packed sequences, another "
                    "context or a cache. Leave those out, or MegatronPrecision(fp8=...)."
                )
            out, context = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                context=context,
                context_mask=context_mask,
                rotary_pos_emb=rotary_pos_emb,
                attention_bias=attention_bias,
                **others,
            )
            if torch.is_grad_enabled() and out.requires_grad:
                gradients_come_by_autograd(out, list(self.parameters()))
            return out, context
        inputs = (hidden_states.contiguous(),) if context is None else (hidden_states.contiguous(), context)
        read = _Others(attention_mask, rotary_pos_emb, attention_bias, context_mask)
        return self._forward_fused(inputs, read), context

    def _forward_fused(self, inputs: tuple[Tensor, ...], others: _Others) -> Tensor:
        before_forward(self._modules_read(len(inputs) > 1))
        x = inputs[0]
        seed = None
        if self.training and max(self.hidden_dropout, self.inner_dropout) > 0:
            # From the generator that is active: the same on all tensor-parallel ranks, unless sequence parallelism
            # has forked it, and again the same when megatron-core's checkpointing runs the layer a second time.
            seed = torch.randint(2**31 - 2, (), device=x.device)
        if self.float8 is not None:
            gathered = self.tp_group.size() if self.config.sequence_parallel else 1
            self.float8.check_tokens(x.size(0) * x.size(1) * gathered)
            self.float8.refresh(self.training)
        self._others = others
        try:
            out = self._replayed(inputs, seed, others)
            if out is not None:
                return out
            return self._blocks(inputs, seed)
        finally:
            self._others = _Others()

    def _replayed(self, inputs: tuple[Tensor, ...], seed: Tensor | None, others: _Others) -> Tensor | None:
        """The output by CUDA graphs, where this call can be one of theirs."""
        x, attention = inputs[0], self.self_attention.core_attention
        if self._graph is None or others.constants is None or not (self.training and x.is_cuda):
            return None
        if torch.cuda.is_current_stream_capturing() or not attention.can_be_recorded(x):
            return None
        recomputed = self.config.recompute_granularity == "full" and self.config.recompute_method == "uniform"
        if not torch.is_grad_enabled() and not recomputed:
            return None
        replay = self._graph if torch.is_grad_enabled() else self._graph.without_gradient
        with attention.rng_of_graphs():
            return replay(inputs, seed, others.constants)

    def _modules_read(self, crosses: bool) -> list[torch.nn.Module]:
        attention, mlp = self.self_attention, self.mlp
        modules = [self.input_layernorm, attention.linear_qkv, attention.linear_proj]
        if crosses:
            cross = self.cross_attention
            modules += [self.pre_cross_attn_layernorm, cross.linear_q, cross.linear_kv, cross.linear_proj]
        return [*modules, self.pre_mlp_layernorm, mlp.linear_fc1, mlp.linear_fc2]

    def _blocks(self, inputs: tuple[Tensor, ...], seed: Tensor | None) -> Tensor:
        attention, mlp, plan, others = self.self_attention, self.mlp, self._plan, self._others
        qkv, proj, fc1, fc2 = attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2
        norm1, norm2 = self.input_layernorm, self.pre_mlp_layernorm
        begins: Any = AttentionInput
        ends: Any = AttentionOutputAndMLP
        calls: tuple[LayerCall, ...] = ()
        if self.float8 is not None:
            begins, ends, calls = Float8AttentionInput, Float8AttentionOutputAndMLP, (self.float8.begin(self.training),)
        residual, query, key, value = begins.apply(
            inputs[0], norm1.weight, _bias(norm1), qkv.weight, qkv.bias, others.angles, plan, *calls
        )
        attended = self._attend(attention, (query, key, value), others.mask, others.bias)
        if len(inputs) > 1:
            cross, norm = self.cross_attention, self.pre_cross_attn_layernorm
            residual, query = AttentionOutputAndQuery.apply(
                residual, attended, proj.weight, proj.bias, norm.weight, _bias(norm), cross.linear_q.weight,
                cross.linear_q.bias, seed, plan,
            )  # fmt: skip
            key, value = KeyValue.apply(inputs[1], cross.linear_kv.weight, cross.linear_kv.bias, plan)
            attended = self._attend(cross, (query, key, value), others.context_mask, None)
            proj = cross.linear_proj
        out: Tensor = ends.apply(
            residual, attended, proj.weight, proj.bias, norm2.weight, _bias(norm2), fc1.weight, fc1.bias, fc2.weight,
            fc2.bias, seed, plan, *calls,
        )  # fmt: skip
        return out

    def _attend(self, attention: Any, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, bias: Any) -> Tensor:
        run = partial(attention.core_attention, attn_mask_type=attention.attn_mask_type, attention_bias=bias)
        # What a graph may hold is a kernel that keeps no scores, so that there is nothing to save by a second pass.
        captured = states[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if attention.checkpoint_core_attention and self.training and not captured:
            return tensor_parallel.checkpoint(run, False, *states, mask)
        return run(*states, mask)


def _bias(norm: torch.nn.Module) -> Tensor | None:
    return getattr(norm, "bias", None)  # RMSNorm has none


def layer_spec(spec: ModuleSpec, layer: type[FusedTransformerLayer] = FusedTransformerLayer) -> ModuleSpec:
    """The same submodules, in a fused layer. ``layer`` may be a subclass, with whatever else ``spec.params`` names."""
    return ModuleSpec(module=layer, params=spec.params, submodules=spec.submodules)
