"""Model presets by name: GPT-2, GPT-3, the Megatron papers' models, and Llama's sizes."""

from __future__ import annotations

from typing import Any, Literal

from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.hardware import lookup


def _megatron(layers: int, hidden: int, heads: int) -> GPTConfig:
    # The papers' vocabulary, 51200, is already padded; arXiv:2104.04473 table 1 and arXiv:2205.05198 table 3.
    return GPTConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        vocab_size=51200,
        max_position_embeddings=2048,
    )


def _llama(
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    *,
    groups: int | None = None,
    vocab: int = 32000,
    positions: int = 4096,
    **changes: Any,
) -> GPTConfig:
    return GPTConfig.llama(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        max_position_embeddings=positions,
        **changes,
    )


def _gpt2(size: Literal["small", "medium", "large", "xl"]) -> GPTConfig:
    return GPTConfig.gpt2(size)


MODELS: dict[str, GPTConfig] = {
    "gpt2_small": _gpt2("small"),
    "gpt2_medium": _gpt2("medium"),
    "gpt2_large": _gpt2("large"),
    "gpt2_xl": _gpt2("xl"),
    "gpt3_175b": _megatron(96, 12288, 96),
    "megatron_22b": _megatron(48, 6144, 64),
    "megatron_530b": _megatron(105, 20480, 128),
    "megatron_1t": _megatron(128, 25600, 160),
    "llama_1b": _llama(16, 2048, 32, 8192, groups=8, rotary_base=500000.0),
    "tinyllama_1b": _llama(22, 2048, 32, 5632, groups=4, positions=2048),  # arXiv:2401.02385
    "llama_7b": _llama(32, 4096, 32, 11008),
    "llama_13b": _llama(40, 5120, 40, 13824),
    "llama_70b": _llama(80, 8192, 64, 28672, groups=8),
    "llama3_1b": _llama(
        16, 2048, 32, 8192, groups=8, vocab=128256, positions=8192, share_embeddings_and_output_weights=True
    ),
    "llama3_8b": _llama(32, 4096, 32, 14336, groups=8, vocab=128256, positions=8192, rotary_base=500000.0),
    "llama3_70b": _llama(80, 8192, 64, 28672, groups=8, vocab=128256, positions=8192, rotary_base=500000.0),
    "llama3_405b": _llama(126, 16384, 128, 53248, groups=8, vocab=128256, positions=8192, rotary_base=500000.0),
}


def model_preset(name: str, **changes: Any) -> GPTConfig:
    """The configuration called ``name``, with some fields changed.

    Raises:
        ValueError: no preset has this name (the nearest ones are named), or the changed fields do not fit.
    """
    return lookup("model", name, MODELS).replace(**changes)
