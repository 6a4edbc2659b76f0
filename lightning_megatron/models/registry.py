"""Which LightningModule a model configuration belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_megatron.models.config import BertConfig, GPTConfig, T5Config, TransformerModelConfig
from lightning_megatron.models.language_module import LanguageModelModule, ReturnLogits
from lightning_megatron.module import MegatronModule
from lightning_megatron.optim.config import OptimizerConfig


def module_for(config: TransformerModelConfig, optimizer: OptimizerConfig | None = None) -> MegatronModule:
    """The module that trains a model of this configuration.

    Raises:
        TypeError: a configuration of no known model.
    """
    from lightning_megatron.models.bert_module import BertModule
    from lightning_megatron.models.gpt_module import GPTModule
    from lightning_megatron.models.t5_module import T5Module

    if isinstance(config, GPTConfig):
        return GPTModule(config, optimizer)
    if isinstance(config, BertConfig):
        return BertModule(config, optimizer)
    if isinstance(config, T5Config):
        return T5Module(config, optimizer)
    raise TypeError(f"{type(config).__name__} is the configuration of no known model.")


def from_pretrained(
    path: str | Path,
    optimizer: OptimizerConfig | None = None,
    *,
    return_logits: ReturnLogits = False,
    tokenizer: Any = None,
    **changes: Any,
) -> LanguageModelModule:
    """The module of a directory of Hugging Face, of the class that its architecture asks for.

    See :meth:`~lightning_megatron.models.language_module.LanguageModelModule.from_pretrained` for arguments.

    Raises:
        CheckpointError: no such directory, one that is incomplete or damaged, or an unsupported architecture.
    """
    from lightning_megatron.interop.hugging_face import HuggingFaceDirectory

    module = module_for(HuggingFaceDirectory.open(path, **changes).config)
    assert isinstance(module, LanguageModelModule)
    return type(module).from_pretrained(path, optimizer, return_logits=return_logits, tokenizer=tokenizer, **changes)
