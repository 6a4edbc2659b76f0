"""Megatron-BERT: ``MegatronBertForPreTraining`` of Hugging Face, and its kin with fewer heads or a classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_megatron.interop.architecture import Architecture, need
from lightning_megatron.interop.mapping import QKV, PaddedVocabulary, Rule, Table, rule
from lightning_megatron.models.config import BertConfig

IGNORED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids")
"""Tied to the token embedding and to ``cls.predictions.bias``; and a buffer that is a range."""

KINDS = ("weight", "bias")
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


def config(theirs: Mapping[str, Any], names: Collection[str] | None = None, **changes: Any) -> BertConfig:
    """Our configuration from a ``MegatronBertConfig``'s fields.

    Args:
        names: of the tensors, which tell the heads; ``None`` is those of pre-training.
        changes: fields of ours to set otherwise.

    Raises:
        ValueError: a choice that this model does not have.
    """
    if theirs["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={theirs['hidden_act']!r} is none of {sorted(_ACTIVATIONS)}.")
    need(theirs, is_decoder=False, add_cross_attention=False)
    heads: dict[str, Any] = {}
    if names is not None:
        heads["add_binary_head"] = "cls.seq_relationship.weight" in names
        if "classifier.weight" in names:
            heads["num_labels"] = len(theirs.get("id2label") or (0, 1))
    return BertConfig(
        num_layers=theirs["num_hidden_layers"],
        hidden_size=theirs["hidden_size"],
        num_attention_heads=theirs["num_attention_heads"],
        ffn_hidden_size=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        max_position_embeddings=theirs["max_position_embeddings"],
        num_tokentypes=theirs["type_vocab_size"],
        layernorm_epsilon=theirs["layer_norm_eps"],
        activation=_ACTIVATIONS[theirs["hidden_act"]],  # type: ignore[arg-type]
        hidden_dropout=theirs["hidden_dropout_prob"],
        attention_dropout=theirs["attention_probs_dropout_prob"],
        init_method_std=theirs["initializer_range"],
        **{**heads, **changes},
    )


def fields(config: BertConfig) -> dict[str, Any]:
    """A ``MegatronBertConfig``'s fields from our configuration.

    Raises:
        ValueError: a choice that Megatron-BERT does not have.
    """
    need(config, post_layernorm=False)
    return shared_fields(config)


def shared_fields(config: BertConfig) -> dict[str, Any]:
    """The fields that Megatron-BERT and BERT share, from our configuration.

    Raises:
        ValueError: a choice that neither has.
    """
    need(
        config,
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        gated_linear_unit=False,
        add_bias_linear=True,
        share_embeddings_and_output_weights=True,
    )
    if config.add_qkv_bias is False or config.activation == "silu" or config.num_tokentypes < 1:
        raise ValueError("BERT has biases everywhere, token types, and no silu.")
    need(config, num_query_groups=config.num_query_groups and config.num_attention_heads)
    need(config, kv_channels=config.kv_channels and config.hidden_size // config.num_attention_heads)
    labels = {str(label): f"LABEL_{label}" for label in range(config.num_labels or 2)}
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.num_tokentypes,
        "layer_norm_eps": config.layernorm_epsilon,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_method_std,
        **({"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}} if config.num_labels else {}),
    }


def table(config: BertConfig) -> Table:
    """Names and transforms of a model of this configuration, with its heads."""
    n, ours, theirs = config.num_layers, "encoder.layers.{}.", "bert.encoder.layer.{}."
    each_layer = (
        ("input_layernorm", "attention.ln"),
        ("self_attention.linear_proj", "attention.output.dense"),
        ("pre_mlp_layernorm", "ln"),
        ("mlp.linear_fc1", "intermediate.dense"),
        ("mlp.linear_fc2", "output.dense"),
    )
    return (
        *embedding(config),
        *qkv(config),
        *(rule(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}", layers=n) for a, b in each_layer for kind in KINDS),
        *(rule(f"encoder.final_layernorm.{kind}", f"bert.encoder.ln.{kind}") for kind in KINDS),
        *heads(config),
    )


def embedding(config: BertConfig) -> tuple[Rule, ...]:
    """Tokens, positions and token types."""
    vocabulary = PaddedVocabulary(config.vocab_size, config.padded_vocab_size(1))
    return (
        rule("embedding.word_embeddings.weight", "bert.embeddings.word_embeddings.weight", transform=vocabulary),
        rule("embedding.position_embeddings.weight", "bert.embeddings.position_embeddings.weight"),
        rule("embedding.tokentype_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"),
    )


def qkv(config: BertConfig) -> tuple[Rule, ...]:
    """Queries, keys and values of each layer."""
    heads = QKV(config.num_attention_heads, config.num_attention_heads)
    attention = "bert.encoder.layer.{}.attention.self."
    return tuple(
        rule(
            f"encoder.layers.{{}}.self_attention.linear_qkv.{kind}",
            *(f"{attention}{name}.{kind}" for name in ("query", "key", "value")),
            transform=heads,
            layers=config.num_layers,
        )
        for kind in KINDS
    )


def heads(config: BertConfig) -> tuple[Rule, ...]:
    """The heads of pre-training, or the one of fine-tuning, which a pre-trained model may lack."""
    pooler = ("pooler.dense", "bert.pooler.dense")
    if config.num_labels is not None:
        pairs = (pooler, ("classification_head", "classifier"))
        return tuple(rule(f"{a}.{kind}", f"{b}.{kind}", optional=True) for a, b in pairs for kind in KINDS)
    vocabulary = PaddedVocabulary(config.vocab_size, config.padded_vocab_size(1))
    pairs = (
        ("lm_head.dense", "cls.predictions.transform.dense"),
        ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
        *((pooler, ("binary_head", "cls.seq_relationship")) if config.add_binary_head else ()),
    )
    return (
        *(rule(f"{a}.{kind}", f"{b}.{kind}") for a, b in pairs for kind in KINDS),
        rule("output_layer.bias", "cls.predictions.bias", transform=vocabulary),
    )


def unneeded(config: BertConfig) -> tuple[str, ...]:
    """Patterns of the names that a model of this configuration has no place for."""
    if config.num_labels is not None:
        return (*IGNORED, "cls.*")
    return IGNORED if config.add_binary_head else (*IGNORED, "bert.pooler.*")


def class_name(config: BertConfig) -> str:
    """Of BERT's classes, without the prefix of a kind of BERT."""
    if config.num_labels is not None:
        return "ForSequenceClassification"
    return "ForPreTraining" if config.add_binary_head else "ForMaskedLM"


ARCHITECTURE = Architecture(
    model_type="megatron-bert",
    config_type=BertConfig,
    read=config,
    write=fields,
    table=table,
    class_name=lambda config: f"MegatronBert{class_name(config)}",
    prefix="bert.",
    heads=("cls.*", "classifier.*"),
    ignored=unneeded,
    generates=False,
)
