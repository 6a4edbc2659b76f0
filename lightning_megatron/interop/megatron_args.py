"""Megatron-LM's arguments, which its checkpoints carry, and our configurations."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop.core_model import CoreSpec, Identity, module_name
from lightning_megatron.interop.generation_settings import check_generation
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.lora import LoRAConfig
from lightning_megatron.models.config import BertConfig, GPTConfig, T5Config, TransformerModelConfig

CONFIGS: dict[str, type[TransformerModelConfig]] = {
    "GPTModule": GPTConfig,
    "BertModule": BertConfig,
    "T5Module": T5Config,
}
OURS = "lightning_megatron"
"""The argument under which our configuration is kept whole, since Megatron-LM has no words for all of it."""


def described(model: Mapping[str, Any], where: Any) -> Identity:
    """The model that a checkpoint of ours says it holds.

    Raises:
        CheckpointError: one that this version does not know.
    """
    kind = CONFIGS.get(str(model.get("module")))
    if kind is None:
        raise CheckpointError(
            f"{where} holds a {model.get('module')}; only {', '.join(CONFIGS)} can be converted. Load another."
        )
    known = {field.name for field in fields(kind)}
    if not isinstance(model.get("config"), Mapping):
        raise CheckpointError(f"{where} is damaged: its model has no configuration. Load another checkpoint.")
    unknown = sorted(set(model["config"]) - known)
    if unknown:
        raise CheckpointError(
            f"{where} has the fields {unknown}, which this version's {kind.__name__} does not. Upgrade "
            "lightning_megatron, or load another checkpoint."
        )
    try:
        config = kind.from_checkpoint(model["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is damaged: its configuration is none: {error}. Load another.") from error
    hugging_face = model.get("hugging_face", {})
    if not isinstance(hugging_face, Mapping):
        raise CheckpointError(f"{where} is damaged: its hugging_face has no fields. Load another checkpoint.")
    generation = model.get("generation", {})
    try:
        check_generation(generation)
        if "lora" in model:
            LoRAConfig(**model["lora"])
    except (AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{where} is damaged: its generation settings or adapters: {error}. Load another."
        ) from error
    return Identity(config, hugging_face, generation=generation)


def to_args(
    identity: Identity, layout: ParallelLayout, *, data_parallel_size: int, dtype: torch.dtype, **more: Any
) -> argparse.Namespace:
    """The arguments with which Megatron-LM would have trained this model."""
    config: Any = identity.config
    gpt, t5 = isinstance(config, GPTConfig), isinstance(config, T5Config)
    groups = config.num_query_groups
    rope = config.position_embedding_type == "rope"
    ours = {"module": module_name(config), "config": config.as_dict(), "hugging_face": dict(identity.hugging_face)}
    if identity.generation:
        ours["generation"] = dict(identity.generation)
    args: dict[str, Any] = {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "decoder_num_layers": config.decoder_layers if t5 else None,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_size,
        "group_query_attention": groups is not None and groups != config.num_attention_heads,
        "num_query_groups": groups or config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "encoder_seq_length": config.max_position_embeddings,
        "position_embedding_type": config.position_embedding_type,
        "add_position_embedding": config.position_embedding_type == "learned_absolute",
        "use_rotary_position_embeddings": rope,
        "rotary_base": int(config.rotary_base) if gpt else 10000,
        "rotary_percent": config.rotary_percent if gpt else 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": config.seq_len_interpolation_factor if gpt else None,
        "use_rope_scaling": gpt and config.rope_scaling,
        "rope_scaling_factor": config.rope_scaling_factor if gpt else 8.0,
        "normalization": config.normalization,
        "norm_epsilon": config.layernorm_epsilon,
        "layernorm_epsilon": config.layernorm_epsilon,
        "apply_layernorm_1p": False,
        "swiglu": config.gated_linear_unit and config.activation == "silu",
        "squared_relu": False,
        "openai_gelu": config.activation == "gelu_tanh",
        "bias_gelu_fusion": False,
        "add_bias_linear": config.add_bias_linear,
        "add_qkv_bias": bool(config.add_qkv_bias),
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "init_method_std": config.init_method_std,
        "bert_binary_head": isinstance(config, BertConfig) and config.add_binary_head,
        "relative_attention_num_buckets": config.relative_attention_num_buckets if t5 else 32,
        "relative_attention_max_distance": config.relative_attention_max_distance if t5 else 128,
        # Converters of transformers ask for it; the tokenizer's files are not in the checkpoint.
        "tokenizer_type": "BertWordPieceLowerCase" if isinstance(config, BertConfig) else "GPT2BPETokenizer",
        "vocab_size": config.vocab_size,
        "orig_vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size(layout.tensor_model_parallel_size),
        "make_vocab_size_divisible_by": config.make_vocab_size_divisible_by,
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": None,
        "data_parallel_size": data_parallel_size,
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "iteration": identity.iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        OURS: ours,
    }
    return argparse.Namespace(**args, **more)


def from_args(args: Any, specs: Mapping[str, CoreSpec], vocab_size: int | None, where: Any) -> Identity:
    """The model of a checkpoint of Megatron-LM.

    Args:
        args: its arguments, a namespace; ``None`` if it has none.
        specs: its tensors.
        vocab_size: of the tokenizer, if known: without it padding of the vocabulary cannot be told from tokens.

    Raises:
        CheckpointError: no arguments, or a choice that this package does not have.
    """
    if args is None:
        raise CheckpointError(
            f"{where} has no 'args', so the number of heads and much else cannot be known. Add them with "
            "--model-config FILE, a JSON of a GPTConfig, BertConfig or T5Config."
        )
    values = vars(args) if hasattr(args, "__dict__") else dict(args)
    word = specs.get("embedding.word_embeddings.weight")
    if word is None or len(word.shape) != 2:
        raise CheckpointError(f"{where} holds no language model: it has no matrix embedding.word_embeddings.weight.")
    rows = word.shape[0]
    if OURS in values:
        found = described(values[OURS], where)
        return replace(found, iteration=_number(values.get("iteration")))
    if vocab_size is not None and vocab_size > rows:
        raise CheckpointError(f"The tokenizer has {vocab_size} tokens, but the embedding in {where} only {rows} rows.")
    for name in ("squared_relu", "apply_layernorm_1p", "num_experts", "rotary_interleaved", "multi_latent_attention"):
        if values.get(name):
            raise CheckpointError(
                f"{where} was trained with {name}={values[name]!r}, which this package does not have."
            )
    try:
        config = _config(values, specs, vocab_size)
    except KeyError as error:
        raise CheckpointError(f"The 'args' in {where} lack {error}. Add it, or give --model-config FILE.") from error
    except (TypeError, ValueError) as error:  # values of another type
        raise CheckpointError(
            f"The 'args' in {where} describe no model: {error}. Give the sizes with --model-config FILE."
        ) from error
    return Identity(config, iteration=_number(values.get("iteration")))


def _config(values: dict[str, Any], specs: Mapping[str, CoreSpec], vocab_size: int | None) -> TransformerModelConfig:
    rows = specs["embedding.word_embeddings.weight"].shape[0]
    vocabulary = vocab_size or values.get("orig_vocab_size") or values.get("vocab_size") or rows
    linear_bias = bool(values.get("add_bias_linear", not values.get("disable_bias_linear", False)))
    swiglu = bool(values.get("swiglu"))
    tanh = values.get("bias_gelu_fusion") or values.get("openai_gelu")
    rope = values.get("position_embedding_type") == "rope" or values.get("use_rotary_position_embeddings")
    heads = values["num_attention_heads"]
    groups = values.get("num_query_groups") if values.get("group_query_attention") else None
    shared: dict[str, Any] = {
        "num_layers": values.get("num_layers") or values["encoder_num_layers"],
        "hidden_size": values["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": groups if groups != heads else None,
        "kv_channels": values.get("kv_channels"),
        "ffn_hidden_size": values.get("ffn_hidden_size"),
        "vocab_size": min(int(vocabulary), rows),
        "make_vocab_size_divisible_by": values.get("make_vocab_size_divisible_by") or 128,
        "max_position_embeddings": values["max_position_embeddings"],
        "normalization": values.get("normalization") or "LayerNorm",
        "layernorm_epsilon": values.get("norm_epsilon") or values.get("layernorm_epsilon") or 1e-5,
        "activation": "silu" if swiglu else "gelu_tanh" if tanh else "gelu",
        "gated_linear_unit": swiglu,
        "add_bias_linear": linear_bias,
        "add_qkv_bias": True if values.get("add_qkv_bias") and not linear_bias else None,
        "hidden_dropout": values.get("hidden_dropout") or 0.0,
        "attention_dropout": values.get("attention_dropout") or 0.0,
        "init_method_std": values.get("init_method_std") or 0.02,
    }
    stacks = {name.split(".")[0] for name in specs if ".layers." in name}
    if stacks == {"encoder"}:
        types = specs.get("embedding.tokentype_embeddings.weight")
        return BertConfig(
            **shared,
            position_embedding_type="rope" if rope else "learned_absolute",
            num_tokentypes=0 if types is None else types.shape[0],
            add_binary_head="binary_head.weight" in specs,
            share_embeddings_and_output_weights=not values.get("untie_embeddings_and_output_weights"),
        )
    if stacks == {"encoder", "decoder"}:
        return T5Config(
            **shared,
            decoder_num_layers=values.get("decoder_num_layers"),
            position_embedding_type="relative" if "encoder_position_bias.weight" in specs else "learned_absolute",
            relative_attention_num_buckets=values.get("relative_attention_num_buckets") or 32,
            relative_attention_max_distance=values.get("relative_attention_max_distance") or 128,
            scale_attention=True,
            initializer_factor=None,
            scale_decoder_output=False,
            share_embeddings_and_output_weights=not values.get("untie_embeddings_and_output_weights"),
        )
    kind: Any = "rope" if rope else values.get("position_embedding_type") or "learned_absolute"
    return GPTConfig(
        **shared,
        position_embedding_type=kind,
        rotary_base=float(values.get("rotary_base") or 10000),
        rotary_percent=values.get("rotary_percent") or 1.0,
        rope_scaling=bool(values.get("use_rope_scaling")),
        rope_scaling_factor=values.get("rope_scaling_factor") or 8.0,
        seq_len_interpolation_factor=values.get("rotary_seq_len_interpolation_factor"),
        share_embeddings_and_output_weights=not values.get("untie_embeddings_and_output_weights"),
    )


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
