"""T5 v1.0 and v1.1, and mT5: ``T5ForConditionalGeneration`` and ``MT5ForConditionalGeneration`` of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_megatron.interop.architecture import Architecture, need
from lightning_megatron.interop.config_fields import LABELS, number, rate, size
from lightning_megatron.interop.mapping import KV, QKV, PaddedVocabulary, Rule, Stacked, Table, rule
from lightning_megatron.models.config import T5Config

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}


_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_READS = (
    *("num_layers", "num_hidden_layers", "num_decoder_layers", "d_model", "hidden_size", "num_heads"),
    *("num_attention_heads", "d_kv", "head_dim", "d_ff", "vocab_size", "relative_attention_num_buckets"),
    *("relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "initializer_factor"),
    *("feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs"),
    # No class that is read has a classifier or computes with these.
    *LABELS,
    "n_positions",
)


def config(theirs: Mapping[str, Any], *, tied: bool) -> T5Config:
    """Our configuration from a ``T5Config``'s or ``MT5Config``'s fields.

    Args:
        tied: whether the output layer is the token embedding. Their field ``tie_word_embeddings`` does not tell: recent
            versions set it whatever the checkpoint holds.

    Raises:
        ValueError: a choice that this model does not have.
    """
    kind = str(theirs["feed_forward_proj"]).split("-")
    name = theirs.get("dense_act_fn") or kind[-1]
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"feed_forward_proj={theirs['feed_forward_proj']!r} with dense_act_fn={name!r} is no activation of this "
            f"model, which has {', '.join(_ACTIVATIONS)}."
        )
    gated = theirs.get("is_gated_act")
    return T5Config(
        num_layers=size(theirs, "num_layers"),
        decoder_num_layers=size(theirs, "num_decoder_layers"),
        hidden_size=size(theirs, "d_model"),
        num_attention_heads=size(theirs, "num_heads"),
        kv_channels=size(theirs, "d_kv"),
        ffn_hidden_size=size(theirs, "d_ff"),
        vocab_size=size(theirs, "vocab_size"),
        layernorm_epsilon=number(theirs, "layer_norm_epsilon", above=0),
        activation=_ACTIVATIONS[name],  # type: ignore[arg-type]
        gated_linear_unit=kind[0] == "gated" if gated is None else bool(gated),
        initializer_factor=number({"initializer_factor": 1.0, **theirs}, "initializer_factor", above=-1e-9),
        hidden_dropout=rate(theirs, "dropout_rate"),
        attention_dropout=rate(theirs, "dropout_rate"),
        relative_attention_num_buckets=size(theirs, "relative_attention_num_buckets"),
        relative_attention_max_distance=size(theirs, "relative_attention_max_distance"),
        share_embeddings_and_output_weights=tied,
        scale_decoder_output=bool(theirs.get("scale_decoder_outputs")) and theirs["model_type"] == "t5",
        decoder_start_token_id=_token(theirs, "decoder_start_token_id"),
        pad_token_id=_token(theirs, "pad_token_id"),
    )


def _token(theirs: Mapping[str, Any], name: str) -> int:
    """A special token, which files from before the field leave at 0, as transformers does."""
    number = theirs.get(name)
    return 0 if number is None else int(number)


def fields(config: T5Config) -> dict[str, Any]:
    """A ``T5Config``'s fields from our configuration.

    Raises:
        ValueError: a choice that T5 does not have.
    """
    need(
        config,
        normalization="RMSNorm",
        position_embedding_type="relative",
        add_bias_linear=False,
        scale_attention=False,
        attention_dropout=config.hidden_dropout,
    )
    if config.add_qkv_bias or (config.num_query_groups or config.num_attention_heads) != config.num_attention_heads:
        raise ValueError("T5 has neither biases nor query groups.")
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    gate = "gated-" if config.gated_linear_unit else ""
    # "gated-gelu" means the approximation by tanh, for historical reasons.
    act = "gelu" if gate and config.activation == "gelu_tanh" else names[config.activation]
    if gate and config.activation == "gelu":
        raise ValueError("T5 cannot gate by an exact GELU.")
    return {
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers,
        "d_model": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "d_kv": config.head_size,
        "d_ff": config.ffn_size,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "feed_forward_proj": gate + act,
        "dense_act_fn": names[config.activation],
        "is_gated_act": config.gated_linear_unit,
        "initializer_factor": 1.0 if config.initializer_factor is None else config.initializer_factor,
        "dropout_rate": config.hidden_dropout,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        # transformers before version 5 takes both from the first, version 5 ties unless the files differ.
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "scale_decoder_outputs": config.scale_decoder_output,
        "decoder_start_token_id": config.decoder_start_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _mt5_fields(config: T5Config) -> dict[str, Any]:
    need(config, scale_decoder_output=False)
    return fields(config)


def _read(theirs: Mapping[str, Any], names: Any) -> T5Config:
    for copy in _COPIES:
        if copy in names:
            raise ValueError(f"{copy} differs from shared.weight, but encoder and decoder have one embedding here.")
    return config(theirs, tied="lm_head.weight" not in names)


def table(config: T5Config) -> Table:
    """Names and transforms of a model of this configuration."""
    vocabulary = PaddedVocabulary(config.vocab_size, config.padded_vocab_size(1))
    untied = rule("output_layer.weight", "lm_head.weight", transform=vocabulary)
    return (
        rule("embedding.word_embeddings.weight", "shared.weight", transform=vocabulary),
        *_stack(config, "encoder", config.num_layers),
        *_stack(config, "decoder", config.decoder_layers),
        *(() if config.share_embeddings_and_output_weights else (untied,)),
    )


def _stack(config: T5Config, stack: str, layers: int) -> tuple[Rule, ...]:
    ours, theirs = f"{stack}.layers.{{}}.", f"{stack}.block.{{}}.layer."
    heads, decoder = config.num_attention_heads, stack == "decoder"
    last = 2 if decoder else 1  # a decoder's layer has cross attention between its attention and its MLP
    mlp = f"{theirs}{last}.DenseReluDense."
    attention, cross = f"{theirs}0.SelfAttention.", f"{theirs}1.EncDecAttention."
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    inner = (
        rule(
            f"{ours}mlp.linear_fc1.weight", f"{mlp}wi_0.weight", f"{mlp}wi_1.weight", transform=Stacked(), layers=layers
        )
        if config.gated_linear_unit
        else rule(f"{ours}mlp.linear_fc1.weight", f"{mlp}wi.weight", layers=layers)
    )
    across = (
        rule(f"{ours}pre_cross_attn_layernorm.weight", f"{theirs}1.layer_norm.weight", layers=layers),
        rule(f"{ours}cross_attention.linear_q.weight", f"{cross}q.weight", layers=layers),
        rule(
            f"{ours}cross_attention.linear_kv.weight",
            f"{cross}k.weight",
            f"{cross}v.weight",
            transform=KV(heads),
            layers=layers,
        ),
        rule(f"{ours}cross_attention.linear_proj.weight", f"{cross}o.weight", layers=layers),
    )
    return (
        rule(f"{stack}_position_bias.weight", bias),
        rule(f"{ours}input_layernorm.weight", f"{theirs}0.layer_norm.weight", layers=layers),
        rule(
            f"{ours}self_attention.linear_qkv.weight",
            *(f"{attention}{name}.weight" for name in "qkv"),
            transform=QKV(heads, heads),
            layers=layers,
        ),
        rule(f"{ours}self_attention.linear_proj.weight", f"{attention}o.weight", layers=layers),
        *(across if decoder else ()),
        rule(f"{ours}pre_mlp_layernorm.weight", f"{theirs}{last}.layer_norm.weight", layers=layers),
        inner,
        rule(f"{ours}mlp.linear_fc2.weight", f"{mlp}wo.weight", layers=layers),
        rule(f"{stack}.final_layernorm.weight", f"{stack}.final_layer_norm.weight"),
    )


ARCHITECTURE = Architecture(
    model_type="t5",
    config_type=T5Config,
    read=_read,
    write=fields,
    table=table,
    class_name=lambda config: "T5ForConditionalGeneration",
    classes=("T5ForConditionalGeneration", "T5WithLMHeadModel", "T5Model"),
    reads=_READS,
    only={"is_encoder_decoder": (None, True), "is_decoder": (None, False)},
    ties=tuple((copy, "shared.weight") for copy in (*_COPIES, "lm_head.weight")),
    ignored=lambda config: ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
)

MT5 = replace(
    ARCHITECTURE,
    model_type="mt5",
    write=_mt5_fields,
    class_name=lambda config: "MT5ForConditionalGeneration",
    classes=("MT5ForConditionalGeneration", "MT5Model"),
)
