"""The tensors and shapes that a configuration asks for, and whether those of a file are the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop.core_model import VOCABULARY, CoreSpec
from lightning_megatron.models.config import BertConfig, T5Config, TransformerModelConfig


def core_names(config: TransformerModelConfig) -> Iterator[str]:
    """The tensors of a whole dense model, in megatron-core's form."""
    options: Any = config  # fields of GPT's, BERT's or T5's configuration, by the names that belong to it
    yield "embedding.word_embeddings.weight"
    if config.position_embedding_type == "learned_absolute":  # type: ignore[attr-defined]
        yield "embedding.position_embeddings.weight"
    if isinstance(config, BertConfig) and config.num_tokentypes:
        yield "embedding.tokentype_embeddings.weight"
    post = isinstance(config, BertConfig) and config.post_layernorm
    if post:
        yield from _norm(config, "embedding_layernorm")
    stacks = {"encoder" if isinstance(config, BertConfig) else "decoder": config.num_layers}
    if isinstance(config, T5Config):
        stacks = {"encoder": config.num_layers, "decoder": config.decoder_layers}
        if config.position_embedding_type == "relative":
            yield from (f"{stack}_position_bias.weight" for stack in stacks)
    for stack, layers in stacks.items():
        cross = isinstance(config, T5Config) and stack == "decoder"
        for layer in range(layers):
            yield from _layer(config, f"{stack}.layers.{layer}.", post=post, cross=cross)
        if not post:
            yield from _norm(config, f"{stack}.final_layernorm")
    if isinstance(config, BertConfig):
        yield from _bert_heads(config)
    if not options.share_embeddings_and_output_weights and getattr(config, "num_labels", None) is None:
        yield "output_layer.weight"


def _norm(config: TransformerModelConfig, name: str) -> Iterator[str]:
    yield f"{name}.weight"
    if config.normalization == "LayerNorm":
        yield f"{name}.bias"


def _layer(config: TransformerModelConfig, prefix: str, *, post: bool, cross: bool) -> Iterator[str]:
    norms = ["post_self_attn_layernorm", "post_mlp_layernorm"] if post else ["input_layernorm", "pre_mlp_layernorm"]
    linears = ["self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    projections = ["self_attention.linear_qkv"]
    if cross:
        norms.append("pre_cross_attn_layernorm")
        linears.append("cross_attention.linear_proj")
        projections += ["cross_attention.linear_q", "cross_attention.linear_kv"]
    for norm in norms:
        yield from _norm(config, f"{prefix}{norm}")
    biased = config.add_bias_linear
    for linear in linears + projections:
        yield f"{prefix}{linear}.weight"
        if config.add_qkv_bias if linear in projections and config.add_qkv_bias is not None else biased:
            yield f"{prefix}{linear}.bias"


def _bert_heads(config: BertConfig) -> Iterator[str]:
    classifier = config.num_labels is not None
    modules = ["classification_head"] if classifier else ["lm_head.dense", "lm_head.layer_norm"]
    if classifier or config.add_binary_head:
        modules.append("pooler.dense")
    if not classifier and config.add_binary_head:
        modules.append("binary_head")
    for module in modules:
        if module != "lm_head.layer_norm" or config.normalization == "LayerNorm":
            yield f"{module}.bias"
        yield f"{module}.weight"
    if not classifier:
        yield "output_layer.bias"


def core_shape(config: TransformerModelConfig, name: str) -> tuple[int, ...] | None:
    """The shape of a whole tensor in megatron-core's form, its vocabulary padded for one rank; ``None`` for a name that
    no dense model of this package has."""
    sizes: Any = config  # fields of GPT's, BERT's or T5's configuration, by the names that belong to it
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_size
    keys = (config.num_query_groups or config.num_attention_heads) * config.head_size
    inner = config.ffn_size * (2 if config.gated_linear_unit else 1)
    module, _, kind = name.rpartition(".")
    stem = module.rpartition(".")[2]
    if module == "embedding.position_embeddings":
        return config.max_position_embeddings, hidden
    if module == "embedding.tokentype_embeddings":
        return getattr(sizes, "num_tokentypes", 0), hidden
    if module.endswith("_position_bias"):
        return getattr(sizes, "relative_attention_num_buckets", 0), config.num_attention_heads
    matrices = {
        "word_embeddings": (config.padded_vocab_size(1), hidden),
        "output_layer": (config.padded_vocab_size(1), hidden),
        "linear_qkv": (queries + 2 * keys, hidden),
        "linear_q": (queries, hidden),
        "linear_kv": (2 * queries, hidden),
        "linear_proj": (hidden, queries),
        "linear_fc1": (inner, hidden),
        "linear_fc2": (hidden, config.ffn_size),
        "dense": (hidden, hidden),
        "binary_head": (2, hidden),
        "classification_head": (getattr(sizes, "num_labels", None) or 2, hidden),
    }
    if stem in matrices:
        return matrices[stem] if kind == "weight" else matrices[stem][:1]
    return (hidden,) if stem.endswith(("layernorm", "layer_norm")) else None


def check_type(dtype: torch.dtype, name: str, path: Any) -> None:
    """Check that a weight is a floating-point tensor.

    Raises:
        CheckpointError: it is not.
    """
    if not dtype.is_floating_point:
        raise CheckpointError(
            f"{name} in {path} is of the type {str(dtype).removeprefix('torch.')}, but weights are floating-point. "
            "Take the files of a model that is not quantized, or fetch them again."
        )


def check_stored(
    made: Iterable[tuple[Sequence[str], Sequence[Sequence[int]]]], stored: Mapping[str, Any], path: Any
) -> None:
    """Check the shape of every tensor of a directory of Hugging Face against its configuration, before any is read.

    Args:
        made: for each tensor in megatron-core's form the names of those that make it, and the shapes that these must
            have.
        stored: the tensors that are there, by name.
        path: what to call the place in the message.

    Raises:
        CheckpointError: some have other shapes; all of them are counted, the first five are named.
    """
    wrong = [
        _said(name, stored[name], str(list(shape)))
        for names, shapes in made
        for name, shape in zip(names, shapes, strict=True)
        if tuple(stored[name].shape) != tuple(shape)
    ]
    _refuse(wrong, f"{path} is not the model that its config.json describes", "config.json")


def check_specs(config: TransformerModelConfig, specs: Mapping[str, CoreSpec], path: Any, told_by: str) -> None:
    """Check whole tensors in megatron-core's form. Vocabularies may be padded, but not short.

    Args:
        told_by: where the configuration comes from, for the message.

    Raises:
        CheckpointError: tensors are missing, surplus, or of other shapes.
    """
    _check_layers(config, specs, path, told_by)
    names = dict.fromkeys(core_names(config))
    missing, surplus = [n for n in names if n not in specs], [n for n in specs if n not in names]
    if missing or surplus:
        raise CheckpointError(
            f"{path} does not have the tensors of the model that {told_by} describes. Missing: {_some(missing)}. "
            f"Surplus: {_some(surplus)}. Take the files of one model."
        )
    wrong: list[str] = []
    for name, spec in specs.items():
        shape = core_shape(config, name) or ()
        if name in VOCABULARY:
            if spec.shape[:1] < (config.vocab_size,) or spec.shape[1:] != shape[1:]:
                rows = [f"at least {config.vocab_size}", *map(str, shape[1:])]
                wrong.append(_said(name, spec, f"[{', '.join(rows)}]"))
        elif spec.shape != shape:
            wrong.append(_said(name, spec, str(list(shape))))
    _refuse(wrong, f"{path} is not the model that {told_by} describes", told_by)


def _said(name: str, found: Any, wanted: str) -> str:
    return f"{name} is of the shape {list(found.shape)}, but the configuration says {wanted}"


def _check_layers(config: TransformerModelConfig, names: Collection[str], path: Any, told_by: str) -> None:
    """Refuse a count of layers that could not be listed, let alone be there."""
    if config.pipeline_layers > len(names):
        raise CheckpointError(
            f"{told_by} of {path} says num_layers={config.num_layers}, but there are only {len(names)} tensors. Take "
            "the files of one model."
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more


def _refuse(wrong: Sequence[str], what: str, told_by: str) -> None:
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{what}: {'; '.join(wrong[:5])}{more}. Correct the sizes in {told_by}, or take the one of this model."
        )
