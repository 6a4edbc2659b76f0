"""BERT as a LightningModule: pre-training, and fine-tuning on whole sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, override

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.errors import DataError
from lightning_megatron.models.bert import BertChunk
from lightning_megatron.models.config import BertConfig
from lightning_megatron.models.language_module import LanguageModelModule, ReturnLogits, check_loss_inputs
from lightning_megatron.models.transformer_config import BuildContext, transformer_config
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.schedule import Batch, Loss
from lightning_megatron.totals import MAIN_TERM

_IGNORED = -100
_SENTENCE_ORDER = "sentence_order"


def _masked_positions(counts: Tensor) -> Tensor | None:
    """Where each sample's tokens are that count, ``[batch, most of a sample]``, filled up with the sequence's length;
    ``None`` if they are most of the tokens."""
    sequence = counts.size(1)
    counted = counts != 0
    most = -8 * (-int(counted.sum(1).max()) // 8)  # few different shapes
    if not 0 < most <= sequence // 2:
        return None
    positions = torch.arange(sequence, device=counts.device).expand_as(counted).masked_fill(~counted, sequence)
    return positions.sort(dim=1).values[:, :most].contiguous()


class BertModule(LanguageModelModule):
    """A BERT. See :class:`~lightning_megatron.models.language_module.LanguageModelModule` for arguments.

    In pre-training the loss is the mean over masked tokens of the global batch, plus the mean over its samples of the
    binary head's, whichever way micro-batches and replicas cut the batch. The vocabulary is computed for masked tokens
    alone where they are at most half of the tokens; the losses of others are 0. A batch holds, ``[batch, sequence]``:

    - ``text``, ``types``, ``labels``, ``loss_mask``, ``padding_mask`` and ``is_random`` ``[batch]``: what
      :mod:`lightning_megatron.data` and megatron-core's datasets yield; or
    - ``input_ids``, ``labels`` (-100 where no token was masked), and optional ``attention_mask``, ``token_type_ids``
      and ``next_sentence_label`` ``[batch]``: what Hugging Face's collators yield.

    With ``BertConfig(num_labels=...)`` a sequence is classified: ``input_ids`` as above, and ``labels`` that are
    ``[batch]`` numbers for regression (``num_labels=1``, mean squared error), ``[batch]`` whole numbers for classes
    (cross entropy), or ``[batch, num_labels]`` for classes that do not exclude each other (binary cross entropy).
    """

    data_on_every_stage = True  # every layer needs the padding mask
    config_type = BertConfig
    fused: bool | None = None
    """Run layers and loss as fused kernels (:mod:`lightning_megatron.models.fused`); ``None`` means on CUDA."""
    config: BertConfig

    def __init__(
        self, config: BertConfig, optimizer: OptimizerConfig | None = None, *, return_logits: ReturnLogits = False
    ) -> None:
        super().__init__(optimizer, return_logits=return_logits)
        self.config = config

    @override
    def build_chunks(self, context: BuildContext) -> list[torch.nn.Module]:
        self.check_layout(context)
        core_config = transformer_config(self.config, context)
        fused = self.runs_fused(self.fused, context)
        return [BertChunk(self.config, core_config, context, stage, fused=fused) for stage in context.stages]

    @override
    def forward_step(self, chunk: torch.nn.Module, microbatch: dict[str, Any]) -> Any:
        """On the last stage losses of each token ``[batch, sequence]`` with the binary head's logits ``[batch, 2]``, or
        logits ``[batch, num_labels]``; hidden states on others."""
        output = chunk(
            microbatch["tokens"],
            microbatch.get("padding_mask"),
            tokentype_ids=microbatch["types"],
            lm_labels=microbatch["lm_labels"] if self.config.num_labels is None else None,
            masked_positions=microbatch.get("masked_positions"),
        )
        last: Any = self.chunks[-1]
        if self.config.num_labels is not None and last.kept_logits is not None and output.dim() == 2:
            last.kept_logits.append(output.detach().clone())
        return output

    @override
    def loss(self, output: Any, microbatch: dict[str, Any]) -> Loss:
        """The losses of masked tokens and of the binary head, each with its own count; in fine-tuning of the labels."""
        if self.config.num_labels is not None:
            return self.finetuning_loss(output, microbatch["labels"])
        losses, binary = output
        masked, num_masked = (losses.float() * microbatch["loss_mask"]).sum(), microbatch["loss_mask"].sum()
        metrics: dict[str, Any] = {"lm_loss": (masked.detach(), num_masked)}
        if binary is None:
            return Loss(masked, num_masked, metrics)
        order = microbatch["sentence_order"]
        sentence = F.cross_entropy(binary.float(), order, ignore_index=_IGNORED, reduction="sum")
        num_sentences = (order != _IGNORED).sum()
        metrics["sop_loss"] = (sentence.detach(), num_sentences)
        return Loss(masked, num_masked, metrics, {_SENTENCE_ORDER: (sentence, num_sentences)})

    @override
    def loss_counts(self, batch: Batch) -> Mapping[str, Tensor | float] | None:
        if self.config.num_labels is not None or not self.config.add_binary_head:
            return None
        return {
            MAIN_TERM: batch["loss_mask"].sum(),
            _SENTENCE_ORDER: (batch["sentence_order"] != _IGNORED).sum(),
        }

    def finetuning_loss(self, logits: Tensor, labels: Tensor) -> Loss:
        """Mean squared error, cross entropy, or binary cross entropy, as the labels ask.

        Args:
            logits: ``[batch, num_labels]``
            labels: ``[batch]``, or ``[batch, num_labels]``. Samples whose labels are NaN do not count.
        """
        logits = logits.float()
        counts = ~labels.float().isnan().view(labels.size(0), -1).any(dim=1)
        if self.config.num_labels == 1:
            squares = F.mse_loss(logits.view(-1), labels.float().view(-1).nan_to_num(), reduction="none")
            return Loss((squares * counts).sum(), counts.sum())
        if labels.dim() == 1 and not labels.is_floating_point():
            counted = (labels != _IGNORED).sum()
            return Loss(F.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="sum"), counted)
        each = F.binary_cross_entropy_with_logits(logits, labels.float().nan_to_num(), reduction="none")
        return Loss((each.mean(dim=1) * counts).sum(), counts.sum())

    @override
    def pipeline_sequence_length(self, batch: Mapping[str, Any]) -> int:
        return batch["tokens"].size(1)

    @override
    def prepare_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``tokens``, ``types``, what the loss needs, and a ``padding_mask`` if there is padding.

        Raises:
            DataError: another form, a sequence longer than the positions, or a token outside the vocabulary.
        """
        tokens = batch["input_ids"] if "input_ids" in batch else batch.get("text")
        if tokens is None or "labels" not in batch:
            raise DataError(
                "A BERT batch needs 'input_ids' and 'labels', or 'text', 'types', 'labels', 'loss_mask' and "
                f"'padding_mask', but has the keys {sorted(batch)}."
            )
        self.check_tokens("input_ids" if "input_ids" in batch else "text", tokens)
        positions = batch.get("position_ids")
        if positions is not None and not bool((positions == torch.arange(tokens.size(1))).all()):
            raise DataError(
                "A BERT numbers the tokens of a batch from 0, but 'position_ids' say otherwise. Leave position_ids out."
            )
        mask = batch.get("attention_mask", batch.get("padding_mask"))
        types = batch.get("token_type_ids", batch.get("types"))
        prepared = {
            "tokens": tokens.long(),
            "types": torch.zeros_like(tokens).long() if types is None else types.long(),
        }
        if mask is not None and not bool(mask.all()):  # without one, attention takes the fastest kernel
            prepared["padding_mask"] = mask.long()
        self._check_types(prepared["types"])
        if self.config.num_labels is not None:
            return prepared | {"labels": self._checked_labels(batch["labels"])}
        prepared |= self._pretraining(batch)
        check_loss_inputs("tokens", prepared, "lm_labels")
        return prepared

    def _pretraining(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        labels = batch["labels"].long()
        counts = (labels >= 0).float()
        if "loss_mask" in batch:
            counts = counts * batch["loss_mask"].float()
        labels = labels.clamp(min=0)
        self.check_tokens("labels", labels)
        order = batch.get("next_sentence_label", batch.get("is_random"))
        if order is None:
            order = torch.full((labels.size(0),), _IGNORED)
        order = order.long().view(-1)
        order = order.masked_fill(order < 0, _IGNORED)
        prepared = {"lm_labels": labels, "loss_mask": counts, "sentence_order": order}
        positions = _masked_positions(counts)
        return prepared if positions is None else prepared | {"masked_positions": positions}

    def _check_types(self, types: Tensor) -> None:
        most = max(self.config.num_tokentypes, 1)
        if int(types.max()) >= most or int(types.min()) < 0:
            raise DataError(f"Token types span {int(types.min())} to {int(types.max())}, but num_tokentypes={most}.")

    def _checked_labels(self, labels: Tensor) -> Tensor:
        many = self.config.num_labels
        if labels.dim() == 2 and labels.size(1) == 1:
            labels = labels.view(-1)
        if labels.dim() == 2 and labels.size(1) != many:
            raise DataError(f"Labels of {labels.size(1)} classes, but num_labels={many}.")
        classes = labels.dim() == 1 and not labels.is_floating_point() and many != 1
        if classes and int(labels.max()) >= (many or 0):
            raise DataError(f"The label {int(labels.max())} is none of num_labels={many} classes.")
        return labels
