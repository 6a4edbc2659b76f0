"""Runs the models of two directories on the same tokens and compares their logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.interop import sharding
from lightning_megatron.interop.core_model import CoreModel
from lightning_megatron.interop.hugging_face import HuggingFaceDirectory
from lightning_megatron.models.config import BertConfig, T5Config, TransformerModelConfig

TOLERANCE = 2e-5
"""Of fp32 logits, relative to the largest of them if that is above one."""
_BATCH, _LENGTH = 2, 16


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models' logits on the same tokens, computed in fp32."""

    largest_difference: float
    largest_logit: float
    tokens: int

    @property
    def tolerance(self) -> float:
        """How large the difference may be."""
        return TOLERANCE * max(1.0, self.largest_logit)

    @property
    def equal(self) -> bool:
        """Whether the models are the same, to rounding."""
        return self.largest_difference <= self.tolerance  # false for NaN


def compare(source: CoreModel, target: CoreModel, dtype: torch.dtype | None = None) -> Comparison:
    """Run both on a CPU, one after the other.

    Args:
        dtype: that the target's weights were rounded to; the source's are rounded likewise, so that only the conversion
            is judged. Logits of tokens that the target has in addition are left out.
    """
    inputs = _inputs(source.identity.config)
    one, other = _logits(source, inputs, dtype), _logits(target, inputs, dtype)
    if target.identity.config.vocab_size > source.identity.config.vocab_size:
        other = other[..., : one.size(-1)]
    difference = (one - other).abs().max()
    return Comparison(float(difference), float(one.abs().max()), inputs["input_ids"].numel())


def _inputs(config: TransformerModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCH, min(_LENGTH, config.max_position_embeddings))
    inputs = {"input_ids": torch.randint(config.vocab_size, shape, generator=generator)}
    if isinstance(config, T5Config):
        inputs["decoder_input_ids"] = torch.randint(config.vocab_size, shape, generator=generator)
    if isinstance(config, BertConfig):
        types = max(config.num_tokentypes, 1)
        inputs["token_type_ids"] = torch.arange(shape[1]).mul(types).floor_divide(shape[1]).repeat(_BATCH, 1)
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
        inputs["attention_mask"][-1, shape[1] // 2 :] = 0
    return inputs


def _logits(model: CoreModel, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    if isinstance(model, HuggingFaceDirectory):
        logits = _theirs(model, inputs, dtype).float()
    else:
        logits = _ours(model, inputs, dtype).float()
    if "attention_mask" in inputs and logits.dim() == 3:
        logits = logits[inputs["attention_mask"] > 0]
    return logits


def _theirs(directory: HuggingFaceDirectory, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    import transformers

    kind = getattr(transformers, directory.architecture.class_name(directory.config))
    model = kind.from_pretrained(directory.path, dtype=dtype or torch.float32).float().eval()
    with torch.no_grad():
        output = model(**inputs)
    logits: Tensor = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
    return logits


class _Weights(Mapping[str, Tensor]):
    """Whole tensors, read when they are asked for."""

    def __init__(self, model: CoreModel, dtype: torch.dtype | None) -> None:
        self._model, self._dtype = model, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._model.read(name)
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._model.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.specs)

    def __len__(self) -> int:
        return len(self._model.specs)


class _One:
    """A loader of one batch."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield self._batch


def _ours(model: CoreModel, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    import lightning.pytorch as pl

    from lightning_megatron.models.registry import module_for
    from lightning_megatron.strategy import MegatronStrategy

    module: Any = module_for(model.identity.config)
    module.return_logits = True

    class Fill(pl.Callback):
        """Weights after the chunks are there."""

        def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            for chunk in pl_module.chunks:
                sharding.fill(chunk, _Weights(model, dtype))

    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    if getattr(model.identity.config, "num_labels", None) is not None:
        labels = torch.zeros(_BATCH, dtype=torch.long)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1,
        strategy=MegatronStrategy(),
        precision="32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Fill()],
    )
    found: Any = trainer.predict(module, _One({**inputs, "labels": labels}))
    logits: Tensor = found[0]["logits"]
    return logits
