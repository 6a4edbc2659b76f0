"""The end of a language model: losses and logits over a vocabulary that tensor-parallel ranks share."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_megatron.backends.core import LanguageModule, tensor_parallel
from lightning_megatron.models.config import TransformerModelConfig
from lightning_megatron.models.fused import FusedLoss, TensorParallel
from lightning_megatron.models.transformer_config import BuildContext


class VocabularyLoss(LanguageModule):
    """Cross entropy over the real vocabulary, and the logits behind it. Mixed into each model's chunk."""

    def set_vocabulary(self, config: TransformerModelConfig, context: BuildContext, *, fused: bool) -> None:
        """Tell how much of this rank's part of the vocabulary is padding; called once by a chunk's constructor.

        Args:
            fused: compute losses without ever holding all logits in float32, unless logits are kept.
        """
        rank, ranks = context.groups.tp.rank(), context.groups.tp.size()
        columns = config.padded_vocab_size(ranks) // ranks
        self._vocab_size = config.vocab_size
        self._real_columns = min(max(config.vocab_size - rank * columns, 0), columns)
        self.kept_logits: list[Tensor] | None = None
        """While a list, the logits of each micro-batch are appended to it, ``[batch, sequence, vocabulary]``."""
        self._fused_loss: FusedLoss | None = None
        if fused:
            parallel = TensorParallel(context.groups.tp, ranks, context.layout.sequence_parallel)
            self._fused_loss = FusedLoss(config.vocab_size, columns * ranks, parallel)

    @property
    def fused_loss(self) -> FusedLoss | None:
        """What computes losses without the logits; ``None`` if layers run unfused, or logits are kept now."""
        return self._fused_loss if self.kept_logits is None else None

    def losses(self, states: Tensor, weight: Tensor | None, labels: Tensor) -> Tensor:
        """Cross entropy of each token.

        Args:
            states: ``[sequence, batch, hidden]``, split along the sequence under sequence parallelism.
            weight: of a tied embedding, ``[padded_vocabulary / tensor_parallel, hidden]``.
            labels: ``[batch, sequence]``

        Returns:
            ``[batch, sequence]``
        """
        fused = self.fused_loss
        if fused is not None:
            return fused(hidden_states=states, output_layer=self.output_layer, output_weight=weight, labels=labels)
        logits, _ = self.output_layer(states, weight=weight)
        return self.compute_language_model_loss(labels, logits)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy of each token.

        Args:
            labels: ``[batch, sequence]``
            logits: ``[sequence, batch, padded_vocabulary / tensor_parallel]``

        Returns:
            ``[batch, sequence]``
        """
        if self.kept_logits is not None:
            self.kept_logits.append(self.whole_logits(logits))  # before the loss, which overwrites logits in place
        if self._real_columns < logits.size(-1):
            # megatron-core lets the padding take part in the softmax, which makes the loss depend on the TP size.
            logits[..., self._real_columns :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary without padding, ``[batch, sequence, vocabulary]``, on every TP rank.

        Args:
            logits: ``[sequence, batch, padded_vocabulary / tensor_parallel]``
        """
        gathered = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        return gathered[..., : self._vocab_size].transpose(0, 1).detach().clone()
