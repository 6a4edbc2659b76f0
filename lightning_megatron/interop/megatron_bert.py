"""Megatron-BERT: ``MegatronBertForPreTraining`` of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_megatron.interop.mapping import QKV, PaddedVocabulary, Table, rule
from lightning_megatron.models.config import BertConfig

IGNORED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids")
"""Tied to the token embedding and to ``cls.predictions.bias``; and a buffer that is a range."""


def config(theirs: Mapping[str, Any]) -> BertConfig:
    """Our configuration from a ``MegatronBertConfig``'s fields.

    Raises:
        ValueError: a choice that this model does not have.
    """
    activations = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
    if theirs["hidden_act"] not in activations:
        raise ValueError(f"hidden_act={theirs['hidden_act']!r} is none of {sorted(activations)}.")
    return BertConfig(
        num_layers=theirs["num_hidden_layers"],
        hidden_size=theirs["hidden_size"],
        num_attention_heads=theirs["num_attention_heads"],
        ffn_hidden_size=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        max_position_embeddings=theirs["max_position_embeddings"],
        num_tokentypes=theirs["type_vocab_size"],
        layernorm_epsilon=theirs["layer_norm_eps"],
        activation=activations[theirs["hidden_act"]],  # type: ignore[arg-type]
        hidden_dropout=theirs["hidden_dropout_prob"],
        attention_dropout=theirs["attention_probs_dropout_prob"],
        init_method_std=theirs["initializer_range"],
    )


def table(config: BertConfig) -> Table:
    """Names and transforms of a model of this configuration, with its pre-training heads."""
    n, ours, theirs = config.num_layers, "encoder.layers.{}.", "bert.encoder.layer.{}."
    qkv = QKV(config.num_attention_heads, config.num_attention_heads)
    vocabulary = PaddedVocabulary(config.vocab_size, config.padded_vocab_size(1))
    each_layer = (
        ("input_layernorm", "attention.ln"),
        ("self_attention.linear_proj", "attention.output.dense"),
        ("pre_mlp_layernorm", "ln"),
        ("mlp.linear_fc1", "intermediate.dense"),
        ("mlp.linear_fc2", "output.dense"),
    )
    once = (
        ("encoder.final_layernorm", "bert.encoder.ln"),
        ("lm_head.dense", "cls.predictions.transform.dense"),
        ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
        *((("pooler.dense", "bert.pooler.dense"),) if config.add_binary_head else ()),
        *((("binary_head", "cls.seq_relationship"),) if config.add_binary_head else ()),
    )
    kinds = ("weight", "bias")
    attention = f"{theirs}attention.self."
    return (
        rule("embedding.word_embeddings.weight", "bert.embeddings.word_embeddings.weight", transform=vocabulary),
        rule("embedding.position_embeddings.weight", "bert.embeddings.position_embeddings.weight"),
        rule("embedding.tokentype_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"),
        *(
            rule(
                f"{ours}self_attention.linear_qkv.{kind}",
                *(f"{attention}{name}.{kind}" for name in ("query", "key", "value")),
                transform=qkv,
                layers=n,
            )
            for kind in kinds
        ),
        *(rule(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}", layers=n) for a, b in each_layer for kind in kinds),
        *(rule(f"{a}.{kind}", f"{b}.{kind}") for a, b in once for kind in kinds),
        rule("output_layer.bias", "cls.predictions.bias", transform=vocabulary),
    )
