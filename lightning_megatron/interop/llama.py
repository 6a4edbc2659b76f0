"""Llama: ``LlamaForCausalLM`` of Hugging Face, and what Mistral and Qwen2 share with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_megatron.interop.architecture import Architecture, need
from lightning_megatron.interop.config_fields import LABELS, number, rate, size
from lightning_megatron.interop.mapping import QKV, PaddedVocabulary, Stacked, Table, rule
from lightning_megatron.models.config import GPTConfig

_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


_ROPE_FIELDS = {"default": (), "linear": ("factor",), "llama3": ("factor", *_LLAMA_3)}
READS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("attention_dropout", "hidden_act", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings"),
    # No class that is read has a classifier or computes with these.
    *LABELS,
    *("pretraining_tp", "is_decoder"),
)
"""Fields that Llama, Mistral and Qwen2 share."""


def config(theirs: Mapping[str, Any], *, tied: bool | None = None) -> GPTConfig:
    """Our configuration from a ``LlamaConfig``'s fields.

    Args:
        tied: whether the output layer is the token embedding; ``None`` is what ``tie_word_embeddings`` says.

    Raises:
        ValueError: a choice that this model does not have.
    """
    if theirs.get("mlp_bias") or theirs.get("attention_bias"):
        raise ValueError("attention_bias and mlp_bias are not supported for Llama.")
    return shared_config(theirs, tied)


def is_tied(theirs: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether the output layer is the token embedding; ``names`` of tensors are without copies."""
    return bool(theirs["tie_word_embeddings"]) and "lm_head.weight" not in names


def shared_config(theirs: Mapping[str, Any], tied: bool | None = None, **changes: Any) -> GPTConfig:
    """Our configuration from the fields that Llama, Mistral and Qwen2 share.

    Args:
        tied: whether the output layer is the token embedding; ``None`` is what ``tie_word_embeddings`` says.
        changes: fields of ours that one of them sets otherwise.

    Raises:
        ValueError: a choice that this model does not have.
    """
    if theirs["hidden_act"] != "silu":
        raise ValueError(f"hidden_act={theirs['hidden_act']!r}, but only 'silu' is supported.")
    rope = theirs.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    stretched = kind == "llama3"
    if kind not in _ROPE_FIELDS or (stretched and any(rope.get(k) != v for k, v in _LLAMA_3.items())):
        raise ValueError(f"rope_parameters={dict(rope)} is none that megatron-core's RoPE computes.")
    known = ("rope_type", "type", "rope_theta", *_ROPE_FIELDS[kind])
    unknown = {name: value for name, value in rope.items() if name not in known and value is not None}
    if unknown.get("partial_rotary_factor") == 1.0:
        del unknown["partial_rotary_factor"]
    if unknown:
        raise ValueError(
            f"rope_parameters has {unknown}, which megatron-core's RoPE of type {kind!r} does not compute."
        )
    hidden, heads = size(theirs, "hidden_size"), size(theirs, "num_attention_heads")
    if heads % size(theirs, "num_key_value_heads"):
        raise ValueError(
            f"num_key_value_heads={theirs['num_key_value_heads']} must be a divisor of num_attention_heads={heads}."
        )
    return GPTConfig.llama(
        num_layers=size(theirs, "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=size(theirs, "num_key_value_heads"),
        kv_channels=hidden // heads if theirs.get("head_dim") is None else size(theirs, "head_dim"),
        ffn_hidden_size=size(theirs, "intermediate_size"),
        vocab_size=size(theirs, "vocab_size"),
        max_position_embeddings=size(theirs, "max_position_embeddings"),
        layernorm_epsilon=number(theirs, "rms_norm_eps", above=0),
        init_method_std=number(theirs, "initializer_range", above=-1e-9),
        attention_dropout=rate(theirs, "attention_dropout"),
        rotary_base=number({"rope_theta": 10000.0, **rope}, "rope_theta", above=0),
        rope_scaling=stretched,
        rope_scaling_factor=number(rope, "factor", above=0) if stretched else 8.0,
        seq_len_interpolation_factor=number(rope, "factor", above=0) if kind == "linear" else None,
        share_embeddings_and_output_weights=bool(theirs["tie_word_embeddings"]) if tied is None else tied,
    ).replace(**changes)


def sliding_window(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Our change for attention to the last ``sliding_window`` tokens alone.

    Up to that length it is full attention; longer sequences are refused.
    """
    window, longest = theirs.get("sliding_window"), theirs["max_position_embeddings"]
    return {} if window is None or window >= longest else {"max_position_embeddings": window}


def fields(config: GPTConfig) -> dict[str, Any]:
    """A ``LlamaConfig``'s fields from our configuration.

    Raises:
        ValueError: a choice that Llama does not have.
    """
    if config.add_qkv_bias:
        raise ValueError("add_qkv_bias=True, where only False is possible.")
    return {**shared_fields(config), "head_dim": config.head_size, "attention_bias": False, "mlp_bias": False}


def shared_fields(config: GPTConfig) -> dict[str, Any]:
    """The fields that Llama, Mistral and Qwen2 share, from our configuration.

    Raises:
        ValueError: a choice that none of them has.
    """
    need(
        config,
        normalization="RMSNorm",
        position_embedding_type="rope",
        activation="silu",
        gated_linear_unit=True,
        add_bias_linear=False,
        rotary_percent=1.0,
        num_moe_experts=None,
    )
    rope: dict[str, Any] = {"rope_theta": config.rotary_base, "rope_type": "default"}
    if config.rope_scaling:
        rope |= {"rope_type": "llama3", "factor": config.rope_scaling_factor, **_LLAMA_3}
    elif config.seq_len_interpolation_factor is not None:
        rope |= {"rope_type": "linear", "factor": config.seq_len_interpolation_factor}
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        "initializer_range": config.init_method_std,
        "attention_dropout": config.attention_dropout,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def table(config: GPTConfig) -> Table:
    """Names and transforms of a model of this configuration."""
    n, ours, theirs = config.num_layers, "decoder.layers.{}.", "model.layers.{}."
    qkv = QKV(config.num_attention_heads, config.num_query_groups or config.num_attention_heads)
    vocabulary = PaddedVocabulary(config.vocab_size, config.padded_vocab_size(1))
    kinds = ("weight", "bias") if config.add_qkv_bias else ("weight",)
    untied = rule("output_layer.weight", "lm_head.weight", transform=vocabulary)
    return (
        rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", transform=vocabulary),
        rule(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", layers=n),
        *(
            rule(
                f"{ours}self_attention.linear_qkv.{kind}",
                *(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv"),
                transform=qkv,
                layers=n,
            )
            for kind in kinds
        ),
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


ARCHITECTURE = Architecture(
    model_type="llama",
    config_type=GPTConfig,
    read=lambda theirs, names: config(theirs, tied=is_tied(theirs, names)),
    write=fields,
    table=table,
    class_name=lambda config: "LlamaForCausalLM",
    classes=("LlamaForCausalLM", "LlamaModel"),
    reads=(*READS, "attention_bias", "mlp_bias"),
    only={"is_encoder_decoder": (None, False)},
    ties=(("lm_head.weight", "model.embed_tokens.weight"),),
    prefix="model.",
    heads=("lm_head.*",),
    ignored=lambda config: ("*.rotary_emb.inv_freq",),
)
