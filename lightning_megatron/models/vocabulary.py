"""The end of a language model: losses and logits over a vocabulary that tensor-parallel ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends.core import LanguageModule, tensor_parallel
from lightning_megatron.models.config import TransformerModelConfig
from lightning_megatron.models.fused import FusedLoss, TensorParallel
from lightning_megatron.models.transformer_config import BuildContext


def whole_rows(init_method: Callable[[Tensor], Any], config: TransformerModelConfig) -> Callable[[Tensor], Any]:
    """Draw the ``[padded_vocabulary, hidden]`` weight of any tensor-parallel size as that of one rank.

    The vocabulary is padded to a multiple of the tensor-parallel size, and megatron-core draws the padding too, so that
    its weights, and all that are drawn after them, depend on that size. Here the rows of one rank are drawn, padding
    included, and those that more ranks add are zero.
    """

    def draw(weight: Tensor) -> None:
        rows = config.padded_vocab_size(1)
        with torch.no_grad():
            weight[rows:] = 0
        init_method(weight[:rows])

    return draw


def draw_vocabulary(chunk: Any, config: TransformerModelConfig, context: BuildContext, output_seed: int | None) -> None:
    """Draw the embeddings of a new chunk again as one rank would, where the padding of more ranks has moved them.

    On a CPU alone, where weights are drawn whole and then cut: on a GPU each rank draws its own.

    Args:
        output_seed: of an output layer that is not the embedding and that megatron-core draws after the layers; those
            of a stage without layers would be others. ``None`` leaves it as it is.
    """
    if not context.perform_initialization or context.device.type != "cpu":
        return
    tp, core = context.groups.tp, chunk.config
    moved = config.padded_vocab_size(tp.size()) != config.padded_vocab_size(1)
    if chunk.pre_process and moved:
        torch.manual_seed(context.seed)
        _draw_part(chunk.embedding.word_embeddings.weight, whole_rows(core.embedding_init_method, config), tp)
        for name in ("position_embeddings", "tokentype_embeddings"):
            table = getattr(chunk.embedding, name, None)
            if table is not None:
                fresh = torch.nn.Embedding(*table.weight.shape)  # whose own draws megatron-core's precede
                core.embedding_init_method(fresh.weight)
                with torch.no_grad():
                    table.weight.copy_(fresh.weight)
    output = getattr(chunk, "output_layer", None) if chunk.post_process else None
    if output is None or output.weight is None:
        return
    if chunk.share_embeddings_and_output_weights:
        if moved:  # the last stage's copy
            torch.manual_seed(context.seed)
            _draw_part(output.weight, whole_rows(core.embedding_init_method, config), tp)
    elif output_seed is not None and (moved or not len(chunk.decoder.layers)):
        torch.manual_seed(output_seed)
        _draw_part(output.weight, whole_rows(core.init_method, config), tp)


@torch.no_grad()
def _draw_part(weight: Tensor, init_method: Callable[[Tensor], Any], tp: dist.ProcessGroup) -> None:
    """Draw a whole weight and keep this rank's rows of it."""
    whole = torch.empty(weight.size(0) * tp.size(), weight.size(1), dtype=torch.float32)
    init_method(whole)
    weight.copy_(whole.chunk(tp.size())[tp.rank()])


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
