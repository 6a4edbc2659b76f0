"""T5 with pipeline parallelism.

megatron-core's schedules send one tensor from stage to stage, and its own T5 has two, so it runs on one stage only.
Here encoder and decoder states travel as one tensor ``[encoder_sequence + decoder_sequence, batch, hidden]``: the
layers of the encoder, then those of the decoder, are one list that stages share. A stage of encoder layers carries the
decoder's embeddings on; a stage of decoder layers carries the encoder's output, which each of them attends to.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends.core import (
    LanguageModelEmbedding,
    ModelType,
    divide,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    replace_prefix_for_sharding,
    sharded_state_dict_default,
    tensor_parallel,
)
from lightning_megatron.backends.core import TransformerConfig as CoreConfig
from lightning_megatron.models import shared_bias
from lightning_megatron.models.config import T5Config
from lightning_megatron.models.position_bias import RelativePositionBias
from lightning_megatron.models.shared_bias import SharedBias
from lightning_megatron.models.specs import (
    FusedT5Layer,
    SeededTransformerLayer,
    layer_seed,
    norm_for,
    t5_layer_submodules,
)
from lightning_megatron.models.t5_weights import deviation_fields, scale_layer, table_std
from lightning_megatron.models.transformer_config import BuildContext, Stage, transformer_config
from lightning_megatron.models.vocabulary import VocabularyLoss, draw_vocabulary, whole_rows


def t5_core_config(config: T5Config, context: BuildContext) -> CoreConfig:
    """megatron-core's configuration of a T5, whose layers are the encoder's and the decoder's together."""
    core = transformer_config(
        config,
        context,
        num_layers=config.num_layers + config.decoder_layers,
        softmax_scale=None if config.scale_attention else 1.0,
        **deviation_fields(config),
    )
    # Lets finalize_model_grads sum the gradients of the bias tables that every stage holds. megatron-core reads this
    # attribute, but does not declare it among the fields.
    core.has_cond_embedder = True
    return core


class T5Stack(torch.nn.Module):
    """The layers of the encoder, or of the decoder, that one chunk holds, with the norm after the last of all."""

    def __init__(
        self,
        config: CoreConfig,
        context: BuildContext,
        *,
        decoder: bool,
        layers: range,
        total: int,
        offset: int,
        fused: bool,
    ) -> None:
        super().__init__()
        self.total, self.first, self.tp_group = total, layers.start, context.groups.tp
        norm = norm_for(config, fused=fused)
        submodules = t5_layer_submodules(norm, decoder=decoder)
        build = FusedT5Layer if fused else SeededTransformerLayer
        self.layers = torch.nn.ModuleList(
            build(
                config,
                submodules,
                offset + index + 1,  # numbers count both stacks, so that seeds differ
                seed=context.seed,
                pg_collection=context.groups,
                add_layer_offset=False,
            )
            for index in layers
        )
        self.final_layernorm: torch.nn.Module | None = None
        if len(layers) and layers.stop == total:
            self.final_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Layers as slices of one stacked tensor per name, as megatron-core's ``TransformerBlock`` has them."""
        state: dict[str, Any] = {}
        layers: list[Any] = list(self.layers)
        for index, layer in enumerate(layers):
            local = f"{prefix}layers.{index}."
            part: Any = layer.sharded_state_dict(local, [(0, self.first + index, self.total)], metadata)
            replace_prefix_for_sharding(part, local, f"{prefix}layers.")
            state.update(part)
        if self.final_layernorm is not None:
            name = f"{prefix}final_layernorm."
            state.update(sharded_state_dict_default(self.final_layernorm, name, (), metadata, tp_group=self.tp_group))
        return state


class T5Chunk(VocabularyLoss):
    """One chunk of a T5: all of it, or the layers of one (virtual) pipeline stage."""

    def __init__(
        self, config: T5Config, core_config: CoreConfig, context: BuildContext, stage: Stage, *, fused: bool = False
    ) -> None:
        super().__init__(config=core_config, pg_collection=context.groups)
        self.model_type = ModelType.encoder_or_decoder
        self.model_config = config
        self.pre_process, self.post_process, self.vp_stage = stage.pre_process, stage.post_process, stage.vp_stage
        self.share_embeddings_and_output_weights = config.share_embeddings_and_output_weights
        self.input_tensor: Tensor | None = None
        padded = config.padded_vocab_size(context.layout.tensor_model_parallel_size)
        learned = config.position_embedding_type == "learned_absolute"
        if self.pre_process:
            torch.manual_seed(context.seed)
            self.embedding = LanguageModelEmbedding(
                config=core_config,
                vocab_size=padded,
                max_sequence_length=config.max_position_embeddings,
                position_embedding_type="learned_absolute" if learned else "none",
                tp_group=context.groups.tp,
            )
        first = get_transformer_layer_offset(core_config, stage.vp_stage, context.groups.pp.rank())
        last = first + get_num_layers_to_build(core_config, stage.vp_stage, context.groups.pp.rank())
        encoder, decoder = config.num_layers, config.decoder_layers
        # Modules are registered in the order in which a forward reads them, which is the order in which megatron-core
        # gathers their weights beside it (`overlap_param_gather`).
        self.encoder_position_bias = self._position_bias(context, bidirectional=True, seed=1)
        self.encoder = T5Stack(
            core_config,
            context,
            decoder=False,
            layers=range(min(first, encoder), min(last, encoder)),
            total=encoder,
            offset=0,
            fused=fused,
        )
        self.decoder_position_bias = self._position_bias(context, bidirectional=False, seed=2)
        self.decoder = T5Stack(
            core_config,
            context,
            decoder=True,
            layers=range(max(first - encoder, 0), max(last - encoder, 0)),
            total=decoder,
            offset=encoder,
            fused=fused,
        )
        if config.initializer_factor is not None and context.perform_initialization:
            for layer in (*self.encoder.layers, *self.decoder.layers):
                scale_layer(layer, config)
        if self.post_process:
            torch.manual_seed(layer_seed(context.seed, 0) + 3)
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded,
                config=core_config,
                init_method=whole_rows(partial(torch.nn.init.normal_, std=table_std(config)), config),
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=context.groups.tp,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        draw_vocabulary(self, config, context, output_seed=None)
        self.set_vocabulary(config, context, fused=fused)
        self._shares_biases = fused

    def _position_bias(self, context: BuildContext, *, bidirectional: bool, seed: int) -> RelativePositionBias | None:
        if self.model_config.position_embedding_type != "relative":
            return None
        return RelativePositionBias(
            self.config,
            context.groups,
            bidirectional=bidirectional,
            num_buckets=self.model_config.relative_attention_num_buckets,
            max_distance=self.model_config.relative_attention_max_distance,
            canonical=self.pre_process,
            std=table_std(self.model_config),
            seed=context.seed + seed,
        )

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by the schedule with what the stage before sent."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        encoder_input_ids: Tensor,
        decoder_input_ids: Tensor,
        encoder_attn_mask: Tensor | None,
        decoder_attn_mask: Tensor | None,
        encoder_decoder_attn_mask: Tensor | None,
        lm_labels: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk.

        Args:
            encoder_input_ids: ``[batch, encoder_sequence]``
            decoder_input_ids: ``[batch, decoder_sequence]``
            encoder_attn_mask: for attention in the encoder, as
                :class:`~lightning_megatron.models.attention.SDPACoreAttention` takes it; the decoder's are alike.
            lm_labels: ``[batch, decoder_sequence]``

        Returns:
            On the last stage losses ``[batch, decoder_sequence]``, or without labels logits ``[batch, decoder_sequence,
            padded_vocabulary / tensor_parallel]``; on others states ``[encoder_sequence + decoder_sequence, batch,
            hidden]``, split along the sequence under sequence parallelism.
        """
        lengths = encoder_input_ids.size(1), decoder_input_ids.size(1)
        if self.pre_process:
            encoder, decoder = self._embed(encoder_input_ids), self._embed(decoder_input_ids)
        else:
            assert self.input_tensor is not None
            ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
            encoder, decoder = self.input_tensor.split([divide(length, ranks) for length in lengths], dim=0)
        # Under sequence parallelism dropouts between the layers see other tokens on each rank.
        with tensor_parallel.get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext():
            if len(self.encoder.layers):
                encoder, bias = self._bias(self.encoder_position_bias, encoder, lengths[0])
                encoder = self._run(self.encoder, encoder, encoder_attn_mask, bias)
            elif self.encoder_position_bias is not None:
                decoder = self.encoder_position_bias.without_layers(decoder)
            if not len(self.decoder.layers) and self.decoder_position_bias is not None:
                decoder = self.decoder_position_bias.without_layers(decoder)
            elif len(self.decoder.layers):
                decoder, bias = self._bias(self.decoder_position_bias, decoder, lengths[1])
                decoder = self._run(
                    self.decoder,
                    decoder,
                    decoder_attn_mask,
                    bias,
                    context=encoder,
                    context_mask=encoder_decoder_attn_mask,
                )
        if not self.post_process:
            return torch.cat([encoder, decoder])
        return self._head(decoder, lm_labels)

    def _bias(
        self, table: RelativePositionBias | None, states: Tensor, length: int
    ) -> tuple[Tensor, Tensor | SharedBias | None]:
        """What layers add to scores, and the states that enter the first of them."""
        if table is None:
            return states, None
        drops = self.training and self.config.attention_dropout > 0.0
        if not self._shares_biases or drops or not shared_bias.usable(states, self.model_config.head_size):
            rows = table(length)
            if self.config.recompute_granularity != "selective" or not rows.requires_grad:
                return states, rows
            # megatron-core's checkpoint of attention captures the bias, so each layer would run backward through the
            # table. They add to the gradient of a leaf instead, which the first layer's input hands on.
            leaf = rows.detach().requires_grad_()
            return shared_bias.hand_on_gradient(states, rows, leaf), leaf
        bias = table.shared(length, states.dtype)
        return shared_bias.gather_gradient(states, table, bias), bias

    def _embed(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        return self.embedding(tokens, positions)

    def _run(
        self,
        stack: T5Stack,
        states: Tensor,
        mask: Tensor | None,
        bias: Tensor | SharedBias | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """One stack's layers and its norm, ``[sequence, batch, hidden]`` to the same."""
        checkpoint = self.config.recompute_granularity == "full" and self.training
        shared = bias if isinstance(bias, SharedBias) else None
        rows = None if isinstance(bias, SharedBias) else bias
        for index, layer in enumerate(stack.layers):
            # All tensors that need gradients are arguments, not captured: a captured one would get none from the
            # recomputation.
            def run(
                states: Tensor, rows: Tensor | None, context: Tensor | None, *, layer: torch.nn.Module = layer
            ) -> Tensor:
                output, _ = layer(
                    hidden_states=states,
                    attention_mask=mask,
                    attention_bias=rows if shared is None else shared,
                    context=context,
                    context_mask=context_mask,
                )
                return output

            block = self.config.recompute_method == "block" and index >= self.config.recompute_num_layers
            if checkpoint and not block:
                states = tensor_parallel.checkpoint(run, False, states, rows, context)
            else:
                states = run(states, rows, context)
        if stack.final_layernorm is None:
            return states
        return F.dropout(stack.final_layernorm(states), self.config.hidden_dropout, self.training)

    def _head(self, states: Tensor, labels: Tensor | None) -> Tensor:
        if self.model_config.scale_decoder_output:
            states = states * self.model_config.hidden_size**-0.5
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        if labels is not None:
            return self.losses(states, weight, labels)
        logits, _ = self.output_layer(states, weight=weight)
        return logits.transpose(0, 1).contiguous()
