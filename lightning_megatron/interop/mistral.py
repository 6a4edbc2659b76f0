"""Mistral: ``MistralForCausalLM`` of Hugging Face. Its tensors are Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_megatron.interop import llama
from lightning_megatron.models.config import GPTConfig


def config(theirs: Mapping[str, Any], *, tied: bool | None = None) -> GPTConfig:
    """Our configuration from a ``MistralConfig``'s fields. Sequences may be as long as the window of attention.

    Args:
        tied: as for :func:`llama.config`.

    Raises:
        ValueError: a choice that this model does not have.
    """
    return llama.shared_config(theirs, tied, **llama.sliding_window(theirs))


def fields(config: GPTConfig) -> dict[str, Any]:
    """A ``MistralConfig``'s fields from our configuration.

    Raises:
        ValueError: a choice that Mistral does not have.
    """
    shared = {name: value for name, value in llama.fields(config).items() if not name.endswith("_bias")}
    return {**shared, "sliding_window": None}


ARCHITECTURE = replace(
    llama.ARCHITECTURE,
    model_type="mistral",
    read=lambda theirs, names: config(theirs, tied=llama.is_tied(theirs, names)),
    write=fields,
    class_name=lambda config: "MistralForCausalLM",
    classes=("MistralForCausalLM", "MistralModel"),
    reads=(*llama.READS, "sliding_window"),
)
