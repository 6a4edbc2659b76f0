"""Which LightningModule a model configuration belongs to."""

from __future__ import annotations

from lightning_megatron.models.config import BertConfig, GPTConfig, T5Config, TransformerModelConfig
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
