"""GPT on megatron-core. The only file that builds its ``GPTModel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.core import GPTModel
from lightning_megatron.backends.core import TransformerConfig as CoreConfig
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.models.fused import FusedLoss, TensorParallel
from lightning_megatron.models.specs import gpt_block_spec
from lightning_megatron.models.transformer_config import BuildContext, Stage


class GPTChunk(GPTModel):
    """One chunk of a GPT: all of it, or the layers of one (virtual) pipeline stage."""

    def __init__(
        self, config: GPTConfig, core_config: CoreConfig, context: BuildContext, stage: Stage, *, fused: bool
    ) -> None:
        padded = config.padded_vocab_size(context.layout.tensor_model_parallel_size)
        torch.manual_seed(context.seed)  # the first and the last stage draw the same tied embedding
        super().__init__(
            core_config,
            gpt_block_spec(core_config, context.seed, stage.vp_stage, fused=fused),
            vocab_size=padded,
            max_sequence_length=config.max_position_embeddings,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            pg_collection=context.groups,
            vp_stage=stage.vp_stage,
        )
        rank, ranks = context.groups.tp.rank(), context.groups.tp.size()
        columns = padded // ranks
        self._real_columns = min(max(config.vocab_size - rank * columns, 0), columns)
        self._fused_loss = None
        if fused:
            parallel = TensorParallel(context.groups.tp, ranks, context.layout.sequence_parallel)
            self._fused_loss = FusedLoss(config.vocab_size, padded, parallel)

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As megatron-core's; with ``labels``, the loss of each token without ever holding all logits in float32."""
        if labels is not None and self._fused_loss is not None:
            kwargs["output_processor"] = self._fused_loss
        return super().forward(*args, labels=labels, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of each token over the real vocabulary.

        Args:
            labels: ``[batch, sequence]``
            logits: ``[sequence, batch, padded_vocabulary / tensor_parallel]``

        Returns:
            ``[batch, sequence]``
        """
        if self._real_columns < logits.size(-1):
            # megatron-core lets the padding take part in the softmax, which makes the loss depend on the TP size.
            logits[..., self._real_columns :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)
