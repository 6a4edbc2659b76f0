"""Llama: ``LlamaForCausalLM`` of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_megatron.interop.mapping import QKV, PaddedVocabulary, Stacked, Table, rule
from lightning_megatron.models.config import GPTConfig

_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def ignored(config: GPTConfig) -> tuple[str, ...]:
    """Names that hold nothing of their own."""
    return ("lm_head.weight",) if config.share_embeddings_and_output_weights else ()


def config(theirs: Mapping[str, Any]) -> GPTConfig:
    """Our configuration from a ``LlamaConfig``'s fields.

    Raises:
        ValueError: a choice that this model does not have.
    """
    if theirs["hidden_act"] != "silu":
        raise ValueError(f"hidden_act={theirs['hidden_act']!r}, but only 'silu' is supported.")
    if theirs.get("mlp_bias") or theirs.get("attention_bias"):
        raise ValueError("attention_bias and mlp_bias are not supported for Llama.")
    rope = theirs.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    stretched = kind == "llama3"
    if kind not in ("default", "linear", "llama3") or (stretched and any(rope[k] != v for k, v in _LLAMA_3.items())):
        raise ValueError(f"rope_parameters={dict(rope)} is none that megatron-core's RoPE computes.")
    return GPTConfig.llama(
        num_layers=theirs["num_hidden_layers"],
        hidden_size=theirs["hidden_size"],
        num_attention_heads=theirs["num_attention_heads"],
        num_query_groups=theirs["num_key_value_heads"],
        kv_channels=theirs["head_dim"],
        ffn_hidden_size=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        max_position_embeddings=theirs["max_position_embeddings"],
        layernorm_epsilon=theirs["rms_norm_eps"],
        init_method_std=theirs["initializer_range"],
        attention_dropout=theirs["attention_dropout"],
        rotary_base=rope.get("rope_theta", 10000.0),
        rope_scaling=stretched,
        rope_scaling_factor=rope["factor"] if stretched else 8.0,
        seq_len_interpolation_factor=rope["factor"] if kind == "linear" else None,
        share_embeddings_and_output_weights=theirs["tie_word_embeddings"],
    )


def table(config: GPTConfig) -> Table:
    """Names and transforms of a model of this configuration."""
    n, ours, theirs = config.num_layers, "decoder.layers.{}.", "model.layers.{}."
    qkv = QKV(config.num_attention_heads, config.num_query_groups or config.num_attention_heads)
    vocabulary = PaddedVocabulary(config.vocab_size, config.padded_vocab_size(1))
    projections = tuple(f"{theirs}self_attn.{name}_proj.weight" for name in "qkv")
    untied = rule("output_layer.weight", "lm_head.weight", transform=vocabulary)
    return (
        rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", transform=vocabulary),
        rule(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", layers=n),
        rule(f"{ours}self_attention.linear_qkv.weight", *projections, transform=qkv, layers=n),
        rule(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight", layers=n),
        rule(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", layers=n),
        rule(
            f"{ours}mlp.linear_fc1.weight",
            f"{theirs}mlp.gate_proj.weight",
            f"{theirs}mlp.up_proj.weight",
            transform=Stacked(),
            layers=n,
        ),
        rule(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", layers=n),
        rule("decoder.final_layernorm.weight", "model.norm.weight"),
        *(() if config.share_embeddings_and_output_weights else (untied,)),
    )
