"""Model presets by name, those of ``conf/model``: what can be planned can be trained under the same name."""

from __future__ import annotations

from typing import Any, Literal

from lightning_megatron.models.config import BertConfig, GPTConfig, T5Config, TransformerModelConfig
from lightning_megatron.planner.equivalent import dense_equivalent
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


_TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 128,
}

PRESETS: dict[str, TransformerModelConfig] = {
    "gpt_tiny": GPTConfig(**_TINY, activation="gelu_tanh"),
    "llama_tiny": GPTConfig.llama(**_TINY, num_query_groups=2, ffn_hidden_size=384),
    "moe_tiny": GPTConfig.llama(
        **_TINY, num_query_groups=2, ffn_hidden_size=384, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=192
    ),
    "bert_tiny": BertConfig(**_TINY),
    "bert_345m": BertConfig.megatron("345m", vocab_size=30522),
    "t5_tiny": T5Config(**{**_TINY, "num_layers": 2}),
    "t5_v1_1_base": T5Config.v1_1(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        kv_channels=64,
        ffn_hidden_size=2048,
        vocab_size=32128,
        max_position_embeddings=512,
    ),
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
        16,
        2048,
        32,
        8192,
        groups=8,
        vocab=128256,
        positions=8192,
        rotary_base=500000.0,
        share_embeddings_and_output_weights=True,
    ),
    "llama3_8b": _llama(32, 4096, 32, 14336, groups=8, vocab=128256, positions=8192, rotary_base=500000.0),
    "llama3_70b": _llama(80, 8192, 64, 28672, groups=8, vocab=128256, positions=8192, rotary_base=500000.0),
    "llama3_405b": _llama(126, 16384, 128, 53248, groups=8, vocab=128256, positions=8192, rotary_base=500000.0),
}


MODELS: dict[str, GPTConfig] = {name: dense_equivalent(config) for name, config in PRESETS.items()}
"""What the planner's formulas take for each preset: BERT, T5 and experts as dense decoders of their sizes."""


def preset(name: str, **changes: Any) -> TransformerModelConfig:
    """The configuration called ``name``, with some fields changed.

    Raises:
        ValueError: no preset has this name (the nearest ones are named), or the changed fields do not fit.
    """
    return lookup("model", name, PRESETS).replace(**changes)


def model_preset(name: str, **changes: Any) -> GPTConfig:
    """What the planner takes for the configuration called ``name``, with some fields changed; see :func:`preset`."""
    return dense_equivalent(preset(name, **changes))
