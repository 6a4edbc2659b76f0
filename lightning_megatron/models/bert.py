"""BERT on megatron-core's Transformer block, with the names of its ``BertModel``.

megatron-core's own class takes its head's norm from a module-level name that asserts against sequence parallelism, and
asks which stage it is without regard for interleaving; what it adds to a block is little enough to be said here.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends.core import (
    CoreModule,
    LanguageModelEmbedding,
    LanguageModule,
    ModelType,
    RotaryEmbedding,
    TransformerBlock,
    tensor_parallel,
)
from lightning_megatron.backends.core import TransformerConfig as CoreConfig
from lightning_megatron.models.config import BertConfig
from lightning_megatron.models.norms import TorchNorm
from lightning_megatron.models.specs import bert_block_spec, layer_seed
from lightning_megatron.models.transformer_config import BuildContext, Stage
from lightning_megatron.models.vocabulary import VocabularyLoss, draw_vocabulary, whole_rows


def _linear(config: CoreConfig, outputs: int, *, of_sequence: bool = False) -> torch.nn.Linear:
    """A linear layer that every tensor-parallel rank holds whole."""
    linear = torch.nn.Linear(config.hidden_size, outputs, dtype=config.params_dtype)
    config.init_method(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    if of_sequence:  # each rank sees a part of the sequence, so gradients are summed
        for parameter in linear.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return linear


def _rows(states: Tensor, positions: Tensor) -> Tensor:
    """The states at ``[batch, count]`` positions: ``[sequence, batch, hidden]`` to ``[count, batch, hidden]``."""
    batch = states.size(1)
    rows = positions.t() * batch + torch.arange(batch, device=positions.device)
    return states.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)


class BertLMHead(CoreModule):
    """What comes between the encoder and the vocabulary: a dense layer, the model's activation and a norm."""

    def __init__(self, config: CoreConfig) -> None:
        super().__init__(config)
        self.dense = _linear(config, config.hidden_size, of_sequence=True)
        self.layer_norm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, states: Tensor) -> Tensor:
        """``[sequence, batch, hidden]`` to the same."""
        return self.layer_norm(self.config.activation_func(self.dense(states)))


class BertPooler(CoreModule):
    """A summary of a sequence, made of the state of its first token."""

    def __init__(self, config: CoreConfig) -> None:
        super().__init__(config)
        self.dense = _linear(config, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """``[sequence, batch, hidden]`` to ``[batch, hidden]``."""
        if self.config.sequence_parallel:
            # Every rank pools the same token and gets the same gradient: the parts are not summed, but split.
            states = tensor_parallel.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        return torch.tanh(self.dense(states[0]))


class BertChunk(VocabularyLoss):
    """One chunk of a BERT: all of it, or the layers of one (virtual) pipeline stage."""

    def __init__(
        self, config: BertConfig, core_config: CoreConfig, context: BuildContext, stage: Stage, *, fused: bool = False
    ) -> None:
        super().__init__(config=core_config, pg_collection=context.groups)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = stage.pre_process, stage.post_process, stage.vp_stage
        self._has_vocabulary = config.num_labels is None  # a head of fine-tuning has none
        tied = config.share_embeddings_and_output_weights and self._has_vocabulary
        self.share_embeddings_and_output_weights = tied
        self.has_tokentypes = config.num_tokentypes > 0
        padded = config.padded_vocab_size(context.layout.tensor_model_parallel_size)
        if self.pre_process:
            torch.manual_seed(context.seed)
            self.embedding = LanguageModelEmbedding(
                config=core_config,
                vocab_size=padded,
                max_sequence_length=config.max_position_embeddings,
                position_embedding_type=config.position_embedding_type,
                num_tokentypes=config.num_tokentypes,
                tp_group=context.groups.tp,
            )
            if config.post_layernorm:
                self.embedding.embedding_dropout = torch.nn.Identity()  # comes after the norm
        self.embedding_layernorm: torch.nn.Module | None = None
        if self.pre_process and config.post_layernorm:
            self.embedding_layernorm = TorchNorm(core_config, config.hidden_size, config.layernorm_epsilon)
        self.rotary_pos_emb: RotaryEmbedding | None = None
        if config.position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                kv_channels=config.head_size,
                rotary_percent=1.0,
                use_cpu_initialization=core_config.use_cpu_initialization,
                cp_group=context.groups.cp,
            )
        self.encoder = TransformerBlock(
            config=core_config,
            spec=bert_block_spec(
                core_config,
                context.seed,
                stage.vp_stage,
                post_layernorm=config.post_layernorm,
                fused=fused,
                float8=context.policy.float8,
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            post_layer_norm=not config.post_layernorm,
            pg_collection=context.groups,
            vp_stage=stage.vp_stage,
        )
        self.pooler: BertPooler | None = None
        self.binary_head: torch.nn.Linear | None = None
        self.classification_head: torch.nn.Linear | None = None
        if self.post_process:
            self._build_heads(config, core_config, context, padded)
        if config.num_labels is None and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()
        draw_vocabulary(self, config, context, output_seed=None)
        self.set_vocabulary(config, context, fused=fused)

    def _build_heads(self, config: BertConfig, core_config: CoreConfig, context: BuildContext, padded: int) -> None:
        torch.manual_seed(layer_seed(context.seed, 0) + 3)
        if config.num_labels is not None:
            self.pooler = BertPooler(core_config)
            self.classification_dropout = torch.nn.Dropout(config.classifier_dropout)
            self.classification_head = _linear(core_config, config.num_labels)
            return
        self.lm_head = BertLMHead(core_config)
        if config.add_binary_head:
            self.pooler = BertPooler(core_config)
            self.binary_head = _linear(core_config, 2)
        self.output_layer = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            padded,
            config=core_config,
            init_method=whole_rows(core_config.init_method, config),
            bias=True,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            tp_group=context.groups.tp,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As megatron-core's language models, unless there is no output layer to tie or to pad."""
        if self._has_vocabulary:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        metadata = {"dp_cp_group": self.pg_collection.dp_cp, **(metadata or {})}
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by the schedule with what the stage before sent."""
        self.encoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tokentype_ids: Tensor | None = None,
        lm_labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
    ) -> Any:
        """Run this chunk.

        Args:
            input_ids: ``[batch, sequence]``
            attention_mask: ``[batch, sequence]``, 1 where a token is real; ``None`` if all are.
            tokentype_ids: ``[batch, sequence]``, the segment of each token.
            lm_labels: ``[batch, sequence]``
            masked_positions: ``[batch, count]``, the positions of the tokens whose losses are wanted, filled up with
                the sequence's length; ``None`` wants all. Without labels it has no meaning.

        Returns:
            On the last stage losses ``[batch, sequence]`` (without labels logits ``[batch, sequence, padded_vocabulary
            / tensor_parallel]``) and the logits of the binary head ``[batch, 2]`` or ``None``; in fine-tuning logits
            ``[batch, num_labels]``; on other stages states ``[sequence, batch, hidden]``.
        """
        states = None
        if self.pre_process:
            positions = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
            if self.has_tokentypes and tokentype_ids is None:
                tokentype_ids = torch.zeros_like(input_ids)
            states = self._embed(input_ids, positions, tokentype_ids if self.has_tokentypes else None)
        rotary = None if self.rotary_pos_emb is None else self.rotary_pos_emb(input_ids.size(1))
        keys = None if attention_mask is None else (attention_mask == 0)[:, None, None, :]  # True is hidden
        states = self.encoder(hidden_states=states, attention_mask=keys, rotary_pos_emb=rotary)
        if not self.post_process:
            return states
        pooled = None if self.pooler is None else self.pooler(states)
        if self.classification_head is not None:
            return self.classification_head(self.classification_dropout(pooled))
        binary = None if self.binary_head is None else self.binary_head(pooled)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        if lm_labels is None:
            logits, _ = self.output_layer(self.lm_head(states), weight=weight)
            return logits.transpose(0, 1).contiguous(), binary
        # Under sequence parallelism a rank's part of the states holds an unknown part of the masked tokens.
        whole = masked_positions is None or self.config.sequence_parallel or self.kept_logits is not None
        if whole:
            return self.losses(self.lm_head(states), weight, lm_labels), binary
        assert masked_positions is not None
        length = lm_labels.size(1)
        real = masked_positions.clamp(max=length - 1)
        losses = self.losses(self.lm_head(_rows(states, real)), weight, lm_labels.gather(1, real))
        spread = losses.new_zeros(len(losses), length + 1).scatter(1, masked_positions, losses)
        return spread[:, :length], binary

    def _embed(self, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """``[sequence, batch, hidden]``, split along the sequence under sequence parallelism."""
        states = self.embedding(tokens, positions, types)
        if self.embedding_layernorm is None:
            return states
        states = self.embedding_layernorm(states)
        # Under sequence parallelism each rank drops other tokens.
        with tensor_parallel.get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext():
            return F.dropout(states, self.config.hidden_dropout, self.training)
