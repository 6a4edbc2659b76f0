"""GPT as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, override

import torch
from torch import Tensor

from lightning_megatron.errors import DataError
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.models.gpt import GPTChunk
from lightning_megatron.models.transformer_config import BuildContext, transformer_config
from lightning_megatron.module import MegatronModule
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.schedule import Loss

if TYPE_CHECKING:
    from lightning_megatron.generation import Decoder

_IGNORED = -100


class GPTModule(MegatronModule):
    """A GPT language model.

    A batch holds, each ``[batch, sequence]``:

    - ``tokens`` and ``labels``, where a label is the token that follows, with optional ``loss_mask`` (1 where a label
      counts) and ``position_ids``: what :mod:`lightning_megatron.data` and megatron-core's datasets yield; or
    - ``input_ids``, with optional ``labels`` that are *not* shifted and hold -100 where they do not count, and optional
      ``attention_mask`` of padding at the end: what Hugging Face's collators yield; or
    - ``text`` of ``sequence + 1`` tokens, as Megatron-LM's and Accelerate's datasets yield.
    """

    fused: bool | None = None
    """Run layers and loss as fused kernels (:mod:`lightning_megatron.models.fused`); ``None`` means on CUDA."""

    def __init__(self, config: GPTConfig, optimizer: OptimizerConfig | None = None) -> None:
        super().__init__(optimizer)
        self.config = config

    @override
    def build_chunks(self, context: BuildContext) -> list[torch.nn.Module]:
        core_config = transformer_config(self.config, context)
        fused = context.device.type == "cuda" if self.fused is None else self.fused
        return [GPTChunk(self.config, core_config, context, stage, fused=fused) for stage in context.stages]

    @override
    def forward_step(self, chunk: torch.nn.Module, microbatch: dict[str, Any]) -> Tensor:
        """Losses of each token ``[batch, sequence]`` on the last stage, hidden states on others."""
        return chunk(
            input_ids=microbatch["tokens"],
            position_ids=microbatch["position_ids"],
            attention_mask=None,
            labels=microbatch["labels"],
        )

    @override
    def loss(self, output: Tensor, microbatch: dict[str, Any]) -> Loss:
        """The sum of the losses of all tokens that count."""
        mask = microbatch["loss_mask"]
        return Loss((output.float() * mask).sum(), mask.sum())

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
        longest = self.config.max_position_embeddings
        if tokens.size(1) > longest:
            raise DataError(
                f"A sequence of {tokens.size(1)} tokens is longer than max_position_embeddings={longest}. "
                "Shorten the sequences, or raise max_position_embeddings."
            )
        highest = int(torch.maximum(tokens.max(), labels.max())) if tokens.numel() else 0
        if highest >= self.config.vocab_size or int(tokens.min()) < 0:
            raise DataError(
                f"Token ids span {int(tokens.min())} to {highest}, but vocab_size={self.config.vocab_size}. Is the "
                "data from another tokenizer?"
            )
        ignored = labels == _IGNORED
        mask = prepared.get("loss_mask")
        mask = torch.ones(labels.shape) if mask is None else mask.float()
        prepared["loss_mask"] = mask.masked_fill(ignored, 0.0)
        prepared["labels"] = labels.masked_fill(ignored, 0)
        if prepared.get("position_ids") is None:
            prepared["position_ids"] = torch.arange(tokens.size(1)).expand_as(tokens)
        return {key: prepared[key] for key in ("tokens", "labels", "loss_mask", "position_ids")}

    @staticmethod
    def _forms(batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if "tokens" in batch and "labels" in batch:
            return batch
        if "text" in batch:
            text = batch["text"].long()
            return {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": batch.get("loss_mask")}
        if "input_ids" in batch:
            tokens = batch["input_ids"]
            labels = batch.get("labels", tokens).clone()
            if (attention := batch.get("attention_mask")) is not None:
                labels = labels.masked_fill(attention == 0, _IGNORED)
            after = torch.full_like(labels[:, :1], _IGNORED)
            return {"tokens": tokens, "labels": torch.cat([labels[:, 1:], after], dim=1)}
        raise DataError(
            f"A GPT batch needs 'tokens' and 'labels', or 'input_ids', or 'text', but has the keys {sorted(batch)}."
        )

    @override
    def describe(self) -> dict[str, Any]:
        return {"module": "GPTModule", "config": asdict(self.config)}

    @override
    def build_decoder(self) -> Decoder:
        from lightning_megatron.generation.gpt import GPTDecoder

        return GPTDecoder(self.chunks, self.config, self.strategy.build_context.groups)
