"""Qwen2 and Qwen2.5: ``Qwen2ForCausalLM`` of Hugging Face. Llama's tensors, and biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_megatron.interop import llama
from lightning_megatron.models.config import GPTConfig


def config(theirs: Mapping[str, Any]) -> GPTConfig:
    """Our configuration from a ``Qwen2Config``'s fields. Sequences may be as long as a window of attention.

    Raises:
        ValueError: a choice that this model does not have.
    """
    window = llama.sliding_window(theirs) if theirs.get("use_sliding_window") else {}
    return llama.shared_config(theirs, add_qkv_bias=True, **window)


def fields(config: GPTConfig) -> dict[str, Any]:
    """A ``Qwen2Config``'s fields from our configuration.

    Raises:
        ValueError: a choice that Qwen2 does not have.
    """
    if not config.add_qkv_bias or config.head_size * config.num_attention_heads != config.hidden_size:
        raise ValueError("Qwen2 has add_qkv_bias=True, and heads that share the hidden size.")
    return {**llama.shared_fields(config), "use_sliding_window": False}


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    model_type="qwen2",
    read=lambda theirs, names: config(theirs),
    write=fields,
    class_name=lambda config: "Qwen2ForCausalLM",
)
