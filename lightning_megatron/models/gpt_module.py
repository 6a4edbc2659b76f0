"""GPT as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, override

import torch
from torch import Tensor

from lightning_megatron.errors import DataError
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.models.gpt import GPTChunk, gpt_core_config
from lightning_megatron.models.language_module import LanguageModelModule, ReturnLogits, check_loss_inputs
from lightning_megatron.models.moe_metrics import ExpertMetrics
from lightning_megatron.models.rotary import in_order
from lightning_megatron.models.transformer_config import BuildContext
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.schedule import Batch, Loss
from lightning_megatron.totals import MAIN_TERM, ROUTER_TERM

if TYPE_CHECKING:
    from lightning_megatron.generation import Decoder

_IGNORED = -100


class GPTModule(LanguageModelModule):
    """A GPT language model. See :class:`~lightning_megatron.models.language_module.LanguageModelModule` for arguments.

    A batch holds, each ``[batch, sequence]``:

    - ``tokens`` and ``labels``, where a label is the token that follows, with optional ``loss_mask`` (1 where a label
      counts) and ``position_ids``: what :mod:`lightning_megatron.data` and megatron-core's datasets yield; or
    - ``input_ids``, with optional ``labels`` that are *not* shifted and hold -100 where they do not count, and optional
      ``attention_mask`` of padding on either side: what Hugging Face's collators yield; or
    - ``text`` of ``sequence + 1`` tokens, as Megatron-LM's and Accelerate's datasets yield.

    With any of them, ``document_ids`` number the documents of a sample, which attention then does not look beyond; or
    an ``attention_mask`` of ``[batch, sequence, sequence]`` or ``[batch, 1, sequence, sequence]``, ``True`` where a key
    is hidden, hides more than the future. Every layer needs these two, so with more than two pipeline stages they need
    ``data_on_every_stage=True``; so do ``position_ids`` of a model with rotary embeddings, unless they are the order of
    the tokens of each document. Layers with such positions run unfused.
    """

    fused: bool | None = None
    """Run layers and loss as fused kernels (:mod:`lightning_megatron.models.fused`); ``None`` means on CUDA."""

    supports_context_parallel = True
    config_type = GPTConfig
    config: GPTConfig

    def __init__(
        self,
        config: GPTConfig,
        optimizer: OptimizerConfig | None = None,
        *,
        return_logits: ReturnLogits = False,
        data_on_every_stage: bool = False,
    ) -> None:
        super().__init__(optimizer, return_logits=return_logits, data_on_every_stage=data_on_every_stage)
        self.config = config
        self._expert_metrics = ExpertMetrics(config) if config.num_moe_experts is not None else None

    @override
    def build_chunks(self, context: BuildContext) -> list[torch.nn.Module]:
        self.check_layout(context)
        core_config = gpt_core_config(self.config, context)
        fused = self.runs_fused(self.fused, context)
        return [GPTChunk(self.config, core_config, context, stage, fused=fused) for stage in context.stages]

    @override
    def forward_step(self, chunk: torch.nn.Module, microbatch: dict[str, Any]) -> Tensor:
        """Losses of each token ``[batch, sequence]`` on the last stage, hidden states on others."""
        if self._expert_metrics is not None:
            self._expert_metrics.count_forward()
        documents = microbatch.get("document_ids")
        return chunk(
            input_ids=microbatch["tokens"],
            position_ids=microbatch["position_ids"],
            attention_mask=microbatch.get("attention_mask") if documents is None else documents,
            labels=microbatch["labels"],
            rotary_positions=microbatch.get("rotary_positions"),
        )

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self._expert_metrics is not None:
            means = self._expert_metrics.collect(len(self.chunks))
            self.log_dict({f"train_{name}": value for name, value in means.items()}, batch_size=1)
        return loss

    @override
    def loss(self, output: Tensor, microbatch: dict[str, Any]) -> Loss:
        """The sum of the losses of all tokens that count."""
        mask = microbatch["loss_mask"]
        return Loss((output.float() * mask).sum(), mask.sum())

    @override
    def loss_counts(self, batch: Batch) -> Mapping[str, Tensor | float] | None:
        """With experts, the tokens that count, and all tokens: those that routers' auxiliary losses are means over."""
        if self.config.num_moe_experts is None:
            return None
        return {MAIN_TERM: batch["loss_mask"].sum(), ROUTER_TERM: batch["tokens"].numel()}

    @override
    def pipeline_sequence_length(self, batch: Mapping[str, Any]) -> int:
        return batch["tokens"].size(1)

    @override
    def prepare_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, from any of the three forms of a batch.

        Raises:
            DataError: another form, a sequence longer than the positions, or a token outside the vocabulary.
        """
        prepared = dict(self._forms(batch))
        tokens, labels = prepared["tokens"], prepared["labels"]
        ignored = labels == _IGNORED
        labels = labels.masked_fill(ignored, 0)
        self.check_tokens("tokens", tokens)
        self.check_tokens("labels", labels)
        mask = prepared.get("loss_mask")
        mask = torch.ones(labels.shape) if mask is None else mask.float()
        position_ids = prepared.get("position_ids")
        ready = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask.masked_fill(ignored, 0.0),
            "position_ids": torch.arange(tokens.size(1)).expand_as(tokens) if position_ids is None else position_ids,
        }
        check_loss_inputs("tokens", ready)
        ready |= self._boundaries(batch, prepared)
        return ready | self._positions(batch, ready)

    def _positions(self, batch: Mapping[str, Any], ready: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions for every layer, if the batch gives some that are not the order of the tokens.

        Raises:
            DataError: every layer needs them but some stages get no data, or the model cannot tell positions apart.
        """
        kind = self.config.position_embedding_type
        given = batch.get("position_ids")
        if given is None or kind == "learned_absolute" or in_order(given, ready.get("document_ids")):
            return {}
        if kind != "rope":
            raise DataError(
                f"The position_ids of a batch are not the order of its tokens, but position_embedding_type={kind!r} "
                "knows no other positions. Leave position_ids out, or tell documents apart by document_ids."
            )
        self._need_data_everywhere("position_ids")
        return {"rotary_positions": given.long()}

    def _need_data_everywhere(self, name: str) -> None:
        if not self.data_on_every_stage and self.strategy.layout.pipeline_model_parallel_size > 2:
            raise DataError(
                f"{name!r} is needed by every layer, but middle pipeline stages get no data. Build the "
                "module with data_on_every_stage=True."
            )

    def _boundaries(self, batch: Mapping[str, Any], prepared: Mapping[str, Any]) -> dict[str, Tensor]:
        """What attention needs to know besides the order of tokens, if anything."""
        found: dict[str, Tensor] = {}
        documents = batch.get("document_ids", prepared.get("document_ids"))
        mask = batch.get("attention_mask")
        if documents is not None:
            found["document_ids"] = documents
        elif mask is not None and mask.dim() > 2:
            mask = mask if mask.dim() == 4 else mask[:, None]
            found["attention_mask"] = mask if mask.dtype == torch.bool else mask > 0.5
        if found:
            self._need_data_everywhere(next(iter(found)))
        return found

    @staticmethod
    def _forms(batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if "tokens" in batch and "labels" in batch:
            return batch
        if "text" in batch:
            text = batch["text"].long()
            return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": batch.get("loss_mask")}
        if "input_ids" in batch:
            return _hugging_face_form(batch)
        raise DataError(
            f"A GPT batch needs 'tokens' and 'labels', or 'input_ids', or 'text', but has the keys {sorted(batch)}."
        )

    @override
    def build_decoder(self) -> Decoder:
        from lightning_megatron.generation.gpt import GPTDecoder

        return GPTDecoder(list(self.chunks), self.config, self.strategy.build_context.groups)


def _hugging_face_form(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    tokens, attention = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("labels", tokens)
    padding: Tensor | None = attention if attention is not None and attention.dim() == 2 else None
    if padding is not None:
        labels = labels.masked_fill(padding == 0, _IGNORED)
    after = torch.full_like(labels[:, :1], _IGNORED)
    labels = torch.cat([labels[:, 1:], after], dim=1)
    if padding is not None:
        labels = labels.masked_fill(padding == 0, _IGNORED)  # nor is anything predicted from padding
    form = {"tokens": tokens, "labels": labels}
    if "position_ids" in batch:
        form["position_ids"] = batch["position_ids"]
    if padding is not None and bool((padding[:, 1:] > padding[:, :-1]).any()):
        # Padding before the text: real tokens must not see it, and count their positions from the first of them, as
        # Hugging Face's generation does. Padding after it is in the future, where nothing looks.
        form["document_ids"] = padding.long()
        form.setdefault("position_ids", (padding.long().cumsum(dim=1) - 1).clamp(min=0))
    return form
