"""T5 as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, override

import torch
from torch import Tensor

from lightning_megatron.errors import DataError
from lightning_megatron.models.config import T5Config
from lightning_megatron.models.language_module import LanguageModelModule, ReturnLogits, check_loss_inputs
from lightning_megatron.models.t5 import T5Chunk, t5_core_config
from lightning_megatron.models.transformer_config import BuildContext
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.schedule import Loss

if TYPE_CHECKING:
    from lightning_megatron.generation import Decoder

_IGNORED = -100
_MEGATRON = {"text_enc", "text_dec", "labels", "loss_mask", "enc_mask", "dec_mask"}


class T5Module(LanguageModelModule):
    """A T5. See :class:`~lightning_megatron.models.language_module.LanguageModelModule` for arguments.

    A batch holds, sequences first after the batch:

    - ``input_ids``, ``labels`` (-100 where they do not count), and optional ``attention_mask``,
      ``decoder_input_ids`` and ``decoder_attention_mask``: what Hugging Face's collators yield. Without
      ``decoder_input_ids`` labels are shifted right, from the configuration's ``decoder_start_token_id``; or
    - ``text_enc``, ``text_dec``, ``labels``, ``loss_mask``, and ``enc_mask``, ``dec_mask`` of ones where tokens are
      real: what :mod:`lightning_megatron.data` and megatron-core's datasets yield. Masks of all pairs of tokens,
      ``[batch, sequence, sequence]``, are reduced to the tokens that any query may see.

    Encoder and decoder sequences may differ in length, the same for all samples of a batch.
    """

    data_on_every_stage = True  # every layer needs the padding mask
    config_type = T5Config
    fused: bool | None = None
    """Run layers and loss as fused kernels (:mod:`lightning_megatron.models.fused`); ``None`` means on CUDA."""
    config: T5Config

    def __init__(
        self, config: T5Config, optimizer: OptimizerConfig | None = None, *, return_logits: ReturnLogits = False
    ) -> None:
        super().__init__(optimizer, return_logits=return_logits)
        self.config = config

    @override
    def build_chunks(self, context: BuildContext) -> list[torch.nn.Module]:
        self.check_layout(context)
        core_config = t5_core_config(self.config, context)
        fused = self.runs_fused(self.fused, context)
        return [T5Chunk(self.config, core_config, context, stage, fused=fused) for stage in context.stages]

    @override
    def forward_step(self, chunk: torch.nn.Module, microbatch: dict[str, Any]) -> Tensor:
        """Losses of each token of the decoder ``[batch, sequence]`` on the last stage, states on others."""
        encoder_keys = _hidden_keys(microbatch.get("encoder_mask"))
        return chunk(
            microbatch["encoder_tokens"],
            microbatch["decoder_tokens"],
            encoder_keys,
            _hidden_keys(microbatch.get("decoder_mask")),
            encoder_keys,
            lm_labels=microbatch["labels"],
        )

    @override
    def loss(self, output: Tensor, microbatch: dict[str, Any]) -> Loss:
        """The sum of the losses of all tokens that count."""
        mask = microbatch["loss_mask"]
        return Loss((output.float() * mask).sum(), mask.sum())

    @override
    def pipeline_sequence_length(self, batch: Mapping[str, Any]) -> int:
        """Encoder and decoder states travel as one tensor."""
        encoder, decoder = batch["encoder_tokens"].size(1), batch["decoder_tokens"].size(1)
        for length in (encoder, decoder):
            self.strategy.layout.check_sequence(length)
        return encoder + decoder

    @override
    def prepare_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``encoder_tokens``, ``decoder_tokens``, ``labels`` and ``loss_mask``; ``encoder_mask`` and ``decoder_mask``
        if there is padding that a token which counts would see.

        Raises:
            DataError: another form, a sequence longer than the positions, or a token outside the vocabulary.
        """
        if "text_enc" in batch:
            prepared = _megatron_form(batch)
        elif "input_ids" in batch and "labels" in batch:
            prepared = _hugging_face_form(batch, self.config)
        else:
            raise DataError(
                "A T5 batch needs 'input_ids' and 'labels', or "
                f"{', '.join(map(repr, sorted(_MEGATRON)))}, but has the keys {sorted(batch)}."
            )
        for name in ("encoder_tokens", "decoder_tokens", "labels"):
            self.check_tokens(name, prepared[name])
        check_loss_inputs("decoder_tokens", prepared)
        # Without a mask, attention takes the fastest kernel.
        if bool(prepared["encoder_mask"].all()):
            del prepared["encoder_mask"]
        if not _is_seen(prepared["decoder_mask"], prepared["loss_mask"]):
            del prepared["decoder_mask"]
        return prepared

    @override
    def build_decoder(self) -> Decoder:
        from lightning_megatron.generation.t5 import T5Decoder

        return T5Decoder(list(self.chunks), self.config, self.strategy.build_context.groups)


def _hidden_keys(mask: Tensor | None) -> Tensor | None:
    """``[batch, 1, 1, sequence]``, ``True`` where a key is hidden, from ``[batch, sequence]`` with 1 at real tokens."""
    return None if mask is None else (mask == 0)[:, None, None, :]


def _is_seen(mask: Tensor, counts: Tensor) -> bool:
    """Whether a token of the decoder that counts comes after padding, or is padding."""
    return bool((((mask == 0).cumsum(dim=1) > 0) & (counts != 0)).any())


def _real_tokens(mask: Tensor) -> Tensor:
    """``[batch, sequence]`` of ones at real tokens, from such a mask or one of all pairs of tokens."""
    if mask.dim() > 2:
        hidden = mask if mask.dtype == torch.bool else mask < 0.5
        mask = ~hidden.flatten(1, -2).all(dim=1) if mask.dim() == 4 else ~hidden.all(dim=1)
    return mask.long()


def _megatron_form(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    missing = _MEGATRON - {"dec_mask"} - set(batch)
    if missing:
        raise DataError(f"A T5 batch with 'text_enc' misses {sorted(missing)}.")
    decoder_mask = batch.get("dec_mask")
    return {
        "encoder_tokens": batch["text_enc"].long(),
        "decoder_tokens": batch["text_dec"].long(),
        "encoder_mask": _real_tokens(batch["enc_mask"]),
        "decoder_mask": torch.ones_like(batch["text_dec"]) if decoder_mask is None else _real_tokens(decoder_mask),
        "labels": batch["labels"].long().clamp(min=0),
        "loss_mask": batch["loss_mask"].float().masked_fill(batch["labels"] < 0, 0.0),
    }


def _hugging_face_form(batch: Mapping[str, Any], config: T5Config) -> dict[str, Tensor]:
    tokens, labels = batch["input_ids"], batch["labels"]
    ignored = labels == _IGNORED
    decoder = batch.get("decoder_input_ids")
    if decoder is None:
        start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        decoder = torch.cat([start, labels.masked_fill(ignored, config.pad_token_id)[:, :-1]], dim=1)
    labels = labels.masked_fill(ignored, 0)
    mask, decoder_mask = batch.get("attention_mask"), batch.get("decoder_attention_mask")
    return {
        "encoder_tokens": tokens,
        "decoder_tokens": decoder,
        "encoder_mask": torch.ones_like(tokens) if mask is None else mask.long(),
        "decoder_mask": torch.ones_like(decoder) if decoder_mask is None else decoder_mask.long(),
        "labels": labels,
        "loss_mask": (~ignored).float(),
    }
