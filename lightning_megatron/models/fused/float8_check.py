"""Whether FP8 reaches every layer of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch.nn import Module

from lightning_megatron.backends.core import TransformerLayer
from lightning_megatron.models.fused.layer import FusedTransformerLayer


def check_float8(chunks: Iterable[Module]) -> None:
    """Refuse models in which FP8 would not reach every layer.

    Raises:
        ValueError: a layer that does not run fused, or no layers.
    """
    layers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TransformerLayer)]
    other = next((m for m in layers if not (isinstance(m, FusedTransformerLayer) and m.float8 is not None)), None)
    if other is not None or not layers:
        found = "no Transformer layers" if other is None else f"layers that run unfused ({type(other).__name__})"
        raise ValueError(
            f"fp8 is for models of fused Transformer layers, but this one has {found}. Use GPTModule or BertModule "
            "without fused=False, lora or post_layernorm, or leave out MegatronPrecision(fp8=...)."
        )
