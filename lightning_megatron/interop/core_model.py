"""A whole model in megatron-core's form, wherever it is: what every conversion reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_megatron.models.config import TransformerModelConfig

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
"""Tensors whose rows are padded to a number that depends on the layout."""


class CoreSpec(NamedTuple):
    """A whole tensor. Vocabularies have the rows of their source, with or without padding."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Identity:
    """Which model it is."""

    config: TransformerModelConfig
    hugging_face: Mapping[str, Any] = field(default_factory=dict)
    """The ``config.json`` that it came from, if any: it has fields that our configuration does not."""
    files: Path | None = None
    """A directory with its tokenizer and its generation configuration, if any."""
    iteration: int = 0
    """Optimizer steps so far."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """The ``generation_config.json`` that it came with, if any."""


class CoreModel(Protocol):
    """Whole tensors by the names of ``chunk.state_dict()`` without parallelism, read one at a time."""

    @property
    def identity(self) -> Identity:
        """Which model it is."""
        ...

    @property
    def specs(self) -> Mapping[str, CoreSpec]:
        """All tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, not to be written to."""
        ...


def module_name(config: TransformerModelConfig) -> str:
    """The LightningModule that has this configuration."""
    return f"{type(config).__name__.removesuffix('Config')}Module"
