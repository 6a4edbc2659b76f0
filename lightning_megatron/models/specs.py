"""Which modules a Transformer layer is made of, as megatron-core's public ModuleSpecs."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from lightning_megatron.backends.core import (
    MLP,
    AttnMaskType,
    CrossAttention,
    CrossAttentionSubmodules,
    IdentityOp,
    MLPSubmodules,
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    tensor_parallel,
)
from lightning_megatron.models.attention import SDPACoreAttention
from lightning_megatron.models.fused import FusedTransformerLayer, reason_not_used
from lightning_megatron.models.norms import TorchNorm, UnfusedNorm
from lightning_megatron.precision import Float8


class SeededTransformerLayer(TransformerLayer):
    """A layer whose initial weights depend on the seed and its number alone.

    megatron-core draws all layers of a stage from one generator, so weights depend on which stage holds a layer. Here
    a seed gives the same model at any pipeline layout, and on a CPU, where one master weight is drawn and cut, at any
    tensor- and expert-parallel size too.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Any, layer_number: int = 1, *, seed: int, **kwargs: Any
    ) -> None:
        stage = kwargs["pg_collection"].pp.rank()
        number = layer_number
        if kwargs.get("add_layer_offset", True):
            number += get_transformer_layer_offset(config, kwargs.get("vp_stage"), stage)
        seed = layer_seed(seed, number)
        torch.manual_seed(seed)
        super().__init__(config, submodules, layer_number, **kwargs)
        if self.is_moe_layer and config.use_cpu_initialization:
            _draw_experts(self.mlp.experts, config, seed)
        # What follows the last layer, an output projection, must not depend on how many experts were drawn here.
        torch.manual_seed(seed + 1)


class SeededFusedLayer(SeededTransformerLayer, FusedTransformerLayer):
    """The same weights, run as fused blocks."""


class FusedT5Layer(SeededFusedLayer):
    """A layer of T5 run as fused blocks, whose MLP drops out between its activation and its output."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        self.inner_dropout = config.hidden_dropout
        super().__init__(config, *args, **kwargs)


class PostNormLayer(SeededTransformerLayer):
    """A layer whose norms come after its residuals, as the original BERT has it (arXiv:1810.04805)."""

    def __init__(self, config: TransformerConfig, submodules: Any, layer_number: int = 1, **kwargs: Any) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.post_self_attn_layernorm = UnfusedNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_layernorm = UnfusedNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        """``[sequence, batch, hidden]`` to the same, and ``None`` where other layers return a context."""
        rotary = kwargs.get("rotary_pos_emb")
        attended = self.self_attention(hidden_states, attention_mask=attention_mask, rotary_pos_emb=rotary)
        states = self.post_self_attn_layernorm(self._add(self.self_attn_bda, attended, hidden_states))
        states = self.post_mlp_layernorm(self._add(self.mlp_bda, self.mlp(states), states))
        return states, None

    def _add(self, bias_dropout_add: Any, output: Any, residual: torch.Tensor) -> torch.Tensor:
        with self.bias_dropout_add_exec_handler():
            added: torch.Tensor = bias_dropout_add(self.training, self.config.bias_dropout_fusion)(
                output, residual, self.hidden_dropout
            )
        return added


def layer_seed(seed: int, number: int) -> int:
    """The seed of the weights of layer ``number``, counted from one over all stages; 0 is for what is not a layer."""
    return seed + 7919 * number


def _draw_experts(experts: Any, config: TransformerConfig, seed: int) -> None:
    """Draw each expert from a seed of its own. megatron-core gives the n-th expert of every rank the same weights."""
    first = experts.ep_group.rank() * experts.num_local_experts
    for index, expert in enumerate(experts.local_experts):
        torch.manual_seed(seed + 104729 * (1 + first + index))
        # Gates and values are interleaved over ranks, so that each rank holds matching halves.
        _draw_cut(
            expert.linear_fc1.weight, config.init_method, experts.tp_group, 0, 2 if config.gated_linear_unit else 1
        )
        _draw_cut(expert.linear_fc2.weight, config.output_layer_init_method, experts.tp_group, 1, 1)


def _draw_cut(weight: torch.Tensor, init_method: Any, group: Any, dim: int, stride: int) -> None:
    """Draw a whole weight and keep this rank's part, in ``stride`` pieces along ``dim``."""
    shape = list(weight.shape)
    shape[dim] *= group.size()
    whole = torch.empty(shape)
    init_method(whole)
    pieces = whole.split(weight.size(dim) // stride, dim=dim)[group.rank() :: group.size()]
    weight.data.copy_(torch.cat(pieces, dim=dim))


def _float8(module: type[TransformerLayer], float8: Float8 | None) -> dict[str, Any]:
    """The argument of fused layers. For others :func:`check_float8` tells the user."""
    return {"float8": float8} if issubclass(module, FusedTransformerLayer) else {}


def norm_for(config: TransformerConfig, *, fused: bool) -> Any:
    """What builds the norms of layers: fused blocks read weights of torch's; see :class:`UnfusedNorm` for others."""
    return TorchNorm if fused and reason_not_used(config) is None else UnfusedNorm


def self_attention_submodules(submodules: Any, norm: Any, core_attention: Any = SDPACoreAttention) -> Any:
    """Put the package's norms and attention into the submodules of one of megatron-core's layers."""
    submodules.input_layernorm = norm
    submodules.pre_mlp_layernorm = norm
    submodules.self_attention.submodules.core_attention = core_attention
    return submodules


class ExpertRowParallelLinear(tensor_parallel.RowParallelLinear):
    """The output of an expert with biases, to which megatron-core adds the bias in place.

    Over one tensor-parallel rank its reduction returns its input as it is, and autograd lets nobody write to that.
    """

    def forward(self, input_: torch.Tensor) -> Any:
        """``[tokens, width]``, as megatron-core's."""
        output, bias = super().forward(input_)
        return output.clone(), bias


def gpt_block_spec(
    config: TransformerConfig,
    seed: int,
    vp_stage: int | None = None,
    *,
    alibi: bool = False,
    fused: bool = False,
    float8: Float8 | None = None,
) -> TransformerBlockSubmodules:
    """The decoder layers of one chunk of a GPT. ``fused`` runs them as :mod:`lightning_megatron.models.fused` does, and
    ``float8`` those with FP8 matrix products."""
    submodules = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False).submodules
    core_attention = partial(SDPACoreAttention, alibi=True) if alibi else SDPACoreAttention
    norm = norm_for(config, fused=fused)
    submodules = self_attention_submodules(submodules, norm, core_attention)
    if config.num_moe_experts is not None and config.add_bias_linear:
        submodules.mlp.keywords["submodules"].experts.keywords["submodules"].linear_fc2 = ExpertRowParallelLinear
    module = SeededFusedLayer if fused else SeededTransformerLayer
    layer = ModuleSpec(module=module, submodules=submodules, params={"seed": seed, **_float8(module, float8)})
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def bert_block_spec(
    config: TransformerConfig,
    seed: int,
    vp_stage: int | None = None,
    *,
    post_layernorm: bool = False,
    fused: bool = False,
    float8: Float8 | None = None,
) -> TransformerBlockSubmodules:
    """The encoder layers of one chunk of a BERT. ``fused`` is for those with norms before each block."""
    norm = norm_for(config, fused=fused and not post_layernorm)
    submodules = self_attention_submodules(get_gpt_layer_local_spec().submodules, norm)
    submodules.self_attention.params["attn_mask_type"] = AttnMaskType.padding
    module = PostNormLayer if post_layernorm else SeededFusedLayer if fused else SeededTransformerLayer
    if post_layernorm:
        submodules.input_layernorm = submodules.pre_mlp_layernorm = IdentityOp
    layer = ModuleSpec(module=module, submodules=submodules, params={"seed": seed, **_float8(module, float8)})
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=None if post_layernorm else norm)


class DropoutRowParallelLinear(tensor_parallel.RowParallelLinear):
    """Drops out its input, as T5 does between the MLP's activation and its output."""

    def forward(self, input_: torch.Tensor) -> Any:
        """``[sequence, batch, width / tensor_parallel]``, as megatron-core's."""
        rate = self.config.hidden_dropout if self.training else 0.0
        if rate > 0.0:
            # The width is split over tensor-parallel ranks, so each draws other masks. Under sequence parallelism the
            # stack has forked the generator already.
            forked = nullcontext() if self.config.sequence_parallel else tensor_parallel.get_cuda_rng_tracker().fork()
            with forked:
                input_ = F.dropout(input_, rate)
        return super().forward(input_)


def t5_layer_submodules(norm: Any, *, decoder: bool) -> TransformerLayerSubmodules:
    """What a layer of T5's encoder, or of its decoder, is made of, with ``norm`` of :func:`norm_for`."""
    submodules = self_attention_submodules(get_gpt_layer_local_spec().submodules, norm)
    submodules.self_attention.params["attn_mask_type"] = AttnMaskType.causal if decoder else AttnMaskType.padding
    linears = MLPSubmodules(linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=DropoutRowParallelLinear)
    submodules.mlp = partial(MLP.as_mlp_submodule, submodules=linears)
    if decoder:
        submodules.pre_cross_attn_layernorm = norm
        submodules.cross_attention = ModuleSpec(
            module=CrossAttention,
            params={"attn_mask_type": AttnMaskType.padding},
            submodules=CrossAttentionSubmodules(
                linear_q=tensor_parallel.ColumnParallelLinear,
                linear_kv=tensor_parallel.ColumnParallelLinear,
                core_attention=SDPACoreAttention,
                linear_proj=tensor_parallel.RowParallelLinear,
            ),
        )
        submodules.cross_attn_bda = get_bias_dropout_add
    return submodules
