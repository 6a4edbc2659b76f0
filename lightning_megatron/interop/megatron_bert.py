"""Megatron-BERT: ``MegatronBertForPreTraining`` of Hugging Face, and its kin with fewer heads or a classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_megatron.interop.architecture import Architecture, need
from lightning_megatron.interop.config_fields import number, rate, size
from lightning_megatron.interop.mapping import QKV, CopiedVocabulary, PaddedVocabulary, Rule, Table, rule
from lightning_megatron.models.config import BertConfig

IGNORED = ("bert.embeddings.position_ids",)
"""A buffer that is a range."""

READS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_act", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", "initializer_range", "tie_word_embeddings", "is_decoder"),
    *("id2label", "label2id", "num_labels", "problem_type"),
)
"""Fields that Megatron-BERT and BERT share."""

_WEIGHT, _BIAS, _OWN_BIAS = (f"cls.predictions.{name}" for name in ("decoder.weight", "decoder.bias", "bias"))
KINDS = ("weight", "bias")
CLASSES = ("ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "Model")
"""Classes that are read, without the prefix of a kind of BERT."""
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
    dropout = rate(theirs, "hidden_dropout_prob")
    return BertConfig(
        num_layers=size(theirs, "num_hidden_layers"),
        hidden_size=size(theirs, "hidden_size"),
        num_attention_heads=size(theirs, "num_attention_heads"),
        ffn_hidden_size=size(theirs, "intermediate_size"),
        vocab_size=size(theirs, "vocab_size"),
        max_position_embeddings=size(theirs, "max_position_embeddings"),
        num_tokentypes=size(theirs, "type_vocab_size"),
        layernorm_epsilon=number(theirs, "layer_norm_eps", above=0),
        activation=_ACTIVATIONS[theirs["hidden_act"]],  # type: ignore[arg-type]
        hidden_dropout=dropout,
        attention_dropout=rate(theirs, "attention_probs_dropout_prob"),
        init_method_std=number(theirs, "initializer_range", above=-1e-9),
        **{"classifier_dropout": dropout, **_heads_of(theirs, names), **changes},
    )


def _heads_of(theirs: Mapping[str, Any], names: Collection[str] | None) -> dict[str, Any]:
    """Our fields for the heads whose tensors are there, without copies of tied ones."""
    if names is None:
        return {}
    if "classifier.weight" not in names:
        untied = _WEIGHT in names or not theirs["tie_word_embeddings"]
        return {
            "add_binary_head": "cls.seq_relationship.weight" in names,
            "share_embeddings_and_output_weights": not untied,
        }
    if "bert.pooler.dense.weight" not in names:
        raise ValueError(
            "there is a classifier without a pooler, as BertForTokenClassification has it; only a classifier of "
            "sequences can be read."
        )
    labels = len(theirs.get("id2label") or (0, 1))
    problem = theirs.get("problem_type")
    if problem not in (None, "regression" if labels == 1 else "single_label_classification"):
        raise ValueError(
            f"problem_type={problem!r} with {labels} labels has a loss that this package does not compute; one label "
            "is a regression, several are one choice."
        )
    return {"add_binary_head": False, "num_labels": labels}


def arrange(tensors: dict[str, Any], tied: bool) -> None:
    """Name the bias of the output layer as the table does: transformers adds ``decoder.bias``, which is tied to
    ``cls.predictions.bias`` with the weights."""
    untied = _WEIGHT in tensors or not tied
    bias = tensors.pop(_BIAS, tensors.get(_OWN_BIAS) if tied else None)
    if bias is not None:
        tensors[_OWN_BIAS] = bias
        if untied:
            tensors[_BIAS] = bias


def fields(config: BertConfig) -> dict[str, Any]:
    """A ``MegatronBertConfig``'s fields from our configuration.

    Raises:
        ValueError: a choice that Megatron-BERT does not have.
    """
    need(config, post_layernorm=False)
    if config.num_labels is not None:
        need(config, classifier_dropout=config.hidden_dropout)
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
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
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
    named = tuple(rule(f"{a}.{kind}", f"{b}.{kind}") for a, b in pairs for kind in KINDS)
    if config.share_embeddings_and_output_weights:
        return (*named, rule("output_layer.bias", _OWN_BIAS, transform=vocabulary))
    copied = CopiedVocabulary(config.vocab_size, config.padded_vocab_size(1))
    return (
        *named,
        rule("output_layer.bias", _BIAS, _OWN_BIAS, transform=copied),
        rule("output_layer.weight", _WEIGHT, transform=vocabulary),
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
    classes=tuple(f"MegatronBert{kind}" for kind in CLASSES),
    reads=READS,
    only={"is_encoder_decoder": (None, False), "position_embedding_type": (None, "absolute")},
    ties=((_WEIGHT, "bert.embeddings.word_embeddings.weight"), (_BIAS, _OWN_BIAS)),
    arrange=arrange,
    prefix="bert.",
    heads=("cls.*", "classifier.*"),
    ignored=unneeded,
    generates=False,
)
