"""GPT on megatron-core. The only file that builds its ``GPTModel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.core import GPTModel
from lightning_megatron.backends.core import TransformerConfig as CoreConfig
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.models.rotary import RotaryAtPositions
from lightning_megatron.models.specs import gpt_block_spec, layer_seed
from lightning_megatron.models.transformer_config import BuildContext, Stage, transformer_config
from lightning_megatron.models.vocabulary import VocabularyLoss, draw_vocabulary


def gpt_core_config(config: GPTConfig, context: BuildContext) -> CoreConfig:
    """megatron-core's configuration of a GPT, dense or with experts."""
    experts: dict[str, Any] = {}
    if config.num_moe_experts is not None:
        experts = {
            "num_moe_experts": config.num_moe_experts,
            "moe_router_topk": config.moe_router_topk,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": config.moe_aux_loss_coeff,
            "moe_z_loss_coeff": config.moe_z_loss_coeff,
            "moe_ffn_hidden_size": config.moe_ffn_hidden_size or config.ffn_size,
            "moe_token_dispatcher_type": config.moe_token_dispatcher_type,
            "moe_router_pre_softmax": config.moe_router_topk == 1
            if config.moe_router_pre_softmax is None
            else config.moe_router_pre_softmax,
            "moe_expert_capacity_factor": config.moe_expert_capacity_factor,
        }
    return transformer_config(config, context, **experts)


class GPTChunk(VocabularyLoss, GPTModel):
    """One chunk of a GPT: all of it, or the layers of one (virtual) pipeline stage."""

    def __init__(
        self, config: GPTConfig, core_config: CoreConfig, context: BuildContext, stage: Stage, *, fused: bool
    ) -> None:
        torch.manual_seed(context.seed)  # the first and the last stage draw the same tied embedding
        alibi = config.position_embedding_type == "alibi"
        GPTModel.__init__(
            self,
            core_config,
            gpt_block_spec(
                core_config, context.seed, stage.vp_stage, alibi=alibi, fused=fused, float8=context.policy.float8
            ),
            vocab_size=config.padded_vocab_size(context.layout.tensor_model_parallel_size),
            max_sequence_length=config.max_position_embeddings,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type="none" if alibi else config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            pg_collection=context.groups,
            vp_stage=stage.vp_stage,
        )
        if config.position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryAtPositions(
                config.head_size,
                config.rotary_percent,
                rotary_base=config.rotary_base,
                rope_scaling=config.rope_scaling,
                rope_scaling_factor=config.rope_scaling_factor,
                seq_len_interpolation_factor=config.seq_len_interpolation_factor,
                use_cpu_initialization=core_config.use_cpu_initialization,
                cp_group=context.groups.cp,
            )
        draw_vocabulary(self, config, context, output_seed=layer_seed(context.seed, config.num_layers) + 1)
        self.set_vocabulary(config, context, fused=fused)

    def forward(
        self, *args: Any, labels: Tensor | None = None, rotary_positions: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """As megatron-core's; with ``labels``, the loss of each token without ever holding all logits in float32.

        Args:
            rotary_positions: ``[batch, sequence]`` of this context-parallel rank, for rotary embeddings of tokens that
                do not stand one after the other.
        """
        if labels is not None and self.fused_loss is not None:
            kwargs["output_processor"] = self.fused_loss
        if rotary_positions is None:
            return super().forward(*args, labels=labels, **kwargs)
        with self.rotary_pos_emb.at(rotary_positions):
            return super().forward(*args, labels=labels, **kwargs)
