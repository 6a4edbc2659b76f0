"""BERT: ``BertForPreTraining`` of Hugging Face, and its kin with fewer heads or a classifier.

Its norms come after the residuals (``BertConfig(post_layernorm=True)``), and one after the embedding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lightning_megatron.interop import megatron_bert
from lightning_megatron.interop.architecture import need
from lightning_megatron.interop.config_fields import rate
from lightning_megatron.interop.mapping import Table, rule
from lightning_megatron.interop.megatron_bert import KINDS
from lightning_megatron.models.config import BertConfig


def config(theirs: Mapping[str, Any], names: Collection[str] | None = None) -> BertConfig:
    """Our configuration from a Hugging Face ``BertConfig``'s fields.

    Raises:
        ValueError: a choice that this model does not have.
    """
    own = theirs.get("classifier_dropout") is not None
    dropout = rate(theirs, "classifier_dropout" if own else "hidden_dropout_prob")
    return megatron_bert.config(theirs, names, post_layernorm=True, classifier_dropout=dropout)


def fields(config: BertConfig) -> dict[str, Any]:
    """A Hugging Face ``BertConfig``'s fields from our configuration.

    Raises:
        ValueError: a choice that BERT does not have.
    """
    need(config, post_layernorm=True)
    return {**megatron_bert.shared_fields(config), "classifier_dropout": config.classifier_dropout}


def table(config: BertConfig) -> Table:
    """Names and transforms of a model of this configuration, with its heads."""
    n, ours, theirs = config.num_layers, "encoder.layers.{}.", "bert.encoder.layer.{}."
    each_layer = (
        ("self_attention.linear_proj", "attention.output.dense"),
        ("post_self_attn_layernorm", "attention.output.LayerNorm"),
        ("mlp.linear_fc1", "intermediate.dense"),
        ("mlp.linear_fc2", "output.dense"),
        ("post_mlp_layernorm", "output.LayerNorm"),
    )
    return (
        *megatron_bert.embedding(config),
        *(rule(f"embedding_layernorm.{kind}", f"bert.embeddings.LayerNorm.{kind}") for kind in KINDS),
        *megatron_bert.qkv(config),
        *(rule(f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}", layers=n) for a, b in each_layer for kind in KINDS),
        *megatron_bert.heads(config),
    )


ARCHITECTURE = replace(
    megatron_bert.ARCHITECTURE,
    model_type="bert",
    read=config,
    write=fields,
    table=table,
    class_name=lambda config: f"Bert{megatron_bert.class_name(config)}",
    classes=tuple(f"Bert{kind}" for kind in megatron_bert.CLASSES),
    reads=(*megatron_bert.READS, "classifier_dropout"),
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)
