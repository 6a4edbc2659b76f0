"""Which LightningModule a model configuration belongs to."""

from __future__ import annotations

from lightning_megatron.models.config import GPTConfig, TransformerModelConfig
from lightning_megatron.module import MegatronModule
from lightning_megatron.optim.config import OptimizerConfig


def module_for(config: TransformerModelConfig, optimizer: OptimizerConfig | None = None) -> MegatronModule:
    """The module that trains a model of this configuration.

    Raises:
        TypeError: a configuration of no known model.
    """
    from lightning_megatron.models.gpt_module import GPTModule

    if isinstance(config, GPTConfig):
        return GPTModule(config, optimizer)
    raise TypeError(f"{type(config).__name__} is the configuration of no known model.")
