"""Qwen2 and Qwen2.5: ``Qwen2ForCausalLM`` of Hugging Face. Llama's tensors, and biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_megatron.interop import llama
from lightning_megatron.models.config import GPTConfig


def config(theirs: Mapping[str, Any], *, tied: bool | None = None) -> GPTConfig:
    """Our configuration from a ``Qwen2Config``'s fields. Sequences may be as long as a window of attention.

    Args:
        tied: as for :func:`llama.config`.

    Raises:
        ValueError: a choice that this model does not have.
    """
    kinds = theirs.get("layer_types") or []
    unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"layer_types has {unknown}, which no layer here computes.")
    if "sliding_attention" in kinds and theirs.get("sliding_window") is None:
        raise ValueError("layer_types has 'sliding_attention', but sliding_window or use_sliding_window is not set.")
    window = llama.sliding_window(theirs) if "sliding_attention" in kinds else {}
    return llama.shared_config(theirs, tied, add_qkv_bias=True, **window)


def fields(config: GPTConfig) -> dict[str, Any]:
    """A ``Qwen2Config``'s fields from our configuration.

    Raises:
        ValueError: a choice that Qwen2 does not have.
    """
    if not config.add_qkv_bias:
        raise ValueError("Qwen2 has add_qkv_bias=True.")
    shared = config.head_size * config.num_attention_heads == config.hidden_size
    # transformers reads head_dim, which is no field of its configuration.
    width = {} if shared else {"head_dim": config.head_size}
    return {**llama.shared_fields(config), "use_sliding_window": False, **width}


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    model_type="qwen2",
    read=lambda theirs, names: config(theirs, tied=llama.is_tied(theirs, names)),
    write=fields,
    class_name=lambda config: "Qwen2ForCausalLM",
    classes=("Qwen2ForCausalLM", "Qwen2Model"),
    reads=(*llama.READS, "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
)
