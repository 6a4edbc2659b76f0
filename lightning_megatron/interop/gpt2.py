"""GPT-2: ``GPT2LMHeadModel`` of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_megatron.interop.architecture import Architecture, need
from lightning_megatron.interop.config_fields import LABELS, number, rate, size
from lightning_megatron.interop.mapping import FusedQKV, PaddedVocabulary, Table, Transposed, rule
from lightning_megatron.models.config import GPTConfig

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def config(theirs: Mapping[str, Any], *, tied: bool = True) -> GPTConfig:
    """Our configuration from a ``GPT2Config``'s fields.

    Args:
        tied: whether the output layer is the token embedding.

    Raises:
        ValueError: a choice that this model does not have.
    """
    if theirs["activation_function"] not in _ACTIVATIONS:
        raise ValueError(f"activation_function={theirs['activation_function']!r} is none of {sorted(_ACTIVATIONS)}.")
    if theirs.get("scale_attn_by_inverse_layer_idx") or not theirs.get("scale_attn_weights", True):
        raise ValueError(
            f"scale_attn_weights={theirs.get('scale_attn_weights')!r} and scale_attn_by_inverse_layer_idx="
            f"{theirs.get('scale_attn_by_inverse_layer_idx')!r}: only attention that is scaled by the root of the "
            "head's width, in all layers alike, is supported."
        )
    need(theirs, add_cross_attention=False)
    if theirs["embd_pdrop"] != theirs["resid_pdrop"]:
        raise ValueError(
            f"embd_pdrop={theirs['embd_pdrop']!r} differs from resid_pdrop={theirs['resid_pdrop']!r}, but one "
            "hidden_dropout is for both here. Give both fields of config.json the same value."
        )
    hidden = size(theirs, "n_embd")
    return GPTConfig(
        num_layers=size(theirs, "n_layer"),
        hidden_size=hidden,
        num_attention_heads=size(theirs, "n_head"),
        ffn_hidden_size=4 * hidden if theirs.get("n_inner") is None else size(theirs, "n_inner"),
        vocab_size=size(theirs, "vocab_size"),
        max_position_embeddings=size(theirs, "n_positions"),
        layernorm_epsilon=number(theirs, "layer_norm_epsilon", above=0),
        activation=_ACTIVATIONS[theirs["activation_function"]],  # type: ignore[arg-type]
        hidden_dropout=rate(theirs, "resid_pdrop"),
        attention_dropout=rate(theirs, "attn_pdrop"),
        init_method_std=number(theirs, "initializer_range", above=-1e-9),
        share_embeddings_and_output_weights=tied,
    )


def fields(config: GPTConfig) -> dict[str, Any]:
    """A ``GPT2Config``'s fields from our configuration.

    Raises:
        ValueError: a choice that GPT-2 does not have.
    """
    need(
        config,
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        gated_linear_unit=False,
        add_bias_linear=True,
        num_moe_experts=None,
    )
    if config.add_qkv_bias is False or config.activation == "silu":
        raise ValueError("GPT-2 has biases everywhere and no silu.")
    need(config, num_query_groups=config.num_query_groups and config.num_attention_heads)
    need(config, kv_channels=config.kv_channels and config.hidden_size // config.num_attention_heads)
    return {
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_size,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
    }


def table(config: GPTConfig) -> Table:
    """Names and transforms of a model of this configuration."""
    n, ours, theirs = config.num_layers, "decoder.layers.{}.", "transformer.h.{}."
    qkv = FusedQKV(config.num_attention_heads)
    vocabulary = PaddedVocabulary(config.vocab_size, config.padded_vocab_size(1))
    linears = (
        ("self_attention.linear_proj", "attn.c_proj"),
        ("mlp.linear_fc1", "mlp.c_fc"),
        ("mlp.linear_fc2", "mlp.c_proj"),
    )
    norms = (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2"))
    untied = rule("output_layer.weight", "lm_head.weight", transform=vocabulary)
    return (
        rule("embedding.word_embeddings.weight", "transformer.wte.weight", transform=vocabulary),
        rule("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        rule(f"{ours}self_attention.linear_qkv.weight", f"{theirs}attn.c_attn.weight", transform=qkv, layers=n),
        rule(f"{ours}self_attention.linear_qkv.bias", f"{theirs}attn.c_attn.bias", transform=qkv, layers=n),
        *(rule(f"{ours}{a}.weight", f"{theirs}{b}.weight", transform=Transposed(), layers=n) for a, b in linears),
        *(rule(f"{ours}{a}.bias", f"{theirs}{b}.bias", layers=n) for a, b in linears),
        *(rule(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}", layers=n) for a, b in norms for kind in ("weight", "bias")),
        rule("decoder.final_layernorm.weight", "transformer.ln_f.weight"),
        rule("decoder.final_layernorm.bias", "transformer.ln_f.bias"),
        *(() if config.share_embeddings_and_output_weights else (untied,)),
    )


ARCHITECTURE = Architecture(
    model_type="gpt2",
    config_type=GPTConfig,
    read=lambda theirs, names: config(
        theirs, tied=bool(theirs["tie_word_embeddings"]) and "lm_head.weight" not in names
    ),
    write=fields,
    table=table,
    class_name=lambda config: "GPT2LMHeadModel",
    classes=("GPT2LMHeadModel", "GPT2Model"),
    reads=(
        *("n_layer", "num_hidden_layers", "n_embd", "hidden_size", "n_head", "num_attention_heads", "n_inner"),
        *("vocab_size", "n_positions", "max_position_embeddings", "layer_norm_epsilon", "activation_function"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "tie_word_embeddings"),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        # No class that is read has a classifier or computes with these.
        *LABELS,
        *("n_ctx", "reorder_and_upcast_attn", "is_decoder", "afn"),
    ),
    only={"is_encoder_decoder": (None, False)},
    ties=(("lm_head.weight", "transformer.wte.weight"),),
    prefix="transformer.",
    heads=("lm_head.*",),
    # Masks were buffers once.
    ignored=lambda config: ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
)
