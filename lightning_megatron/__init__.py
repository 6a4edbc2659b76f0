"""Megatron parallelism in PyTorch Lightning.

    import lightning as L
    import lightning_megatron as lm

    trainer = L.Trainer(strategy="megatron_tp2_pp2", devices=4, precision="bf16-mixed")
    trainer.fit(lm.GPTModule(lm.GPTConfig.gpt2("small")), lm.data.PretrainingData(...))

Names load when they are first used: importing the package imports neither torch nor megatron-core, and changes nothing
for other strategies.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_megatron.registration import register

if TYPE_CHECKING:
    from lightning_megatron import data as data
    from lightning_megatron.errors import CheckpointError as CheckpointError
    from lightning_megatron.errors import DataError as DataError
    from lightning_megatron.errors import LayoutError as LayoutError
    from lightning_megatron.errors import ModuleError as ModuleError
    from lightning_megatron.layout import ParallelLayout as ParallelLayout
    from lightning_megatron.lora import LoRAConfig as LoRAConfig
    from lightning_megatron.models.bert_module import BertModule as BertModule
    from lightning_megatron.models.collectives import (
        average_losses_across_data_parallel_group as average_losses_across_data_parallel_group,
    )
    from lightning_megatron.models.collectives import (
        gather_across_data_parallel_groups as gather_across_data_parallel_groups,
    )
    from lightning_megatron.models.config import BertConfig as BertConfig
    from lightning_megatron.models.config import GPTConfig as GPTConfig
    from lightning_megatron.models.config import T5Config as T5Config
    from lightning_megatron.models.gpt_module import GPTModule as GPTModule
    from lightning_megatron.models.registry import from_pretrained as from_pretrained
    from lightning_megatron.models.t5_module import T5Module as T5Module
    from lightning_megatron.module import MegatronModule as MegatronModule
    from lightning_megatron.optim.config import OptimizerConfig as OptimizerConfig
    from lightning_megatron.precision import Float8 as Float8
    from lightning_megatron.precision import LossScaling as LossScaling
    from lightning_megatron.precision import MegatronPrecision as MegatronPrecision
    from lightning_megatron.schedule import Loss as Loss
    from lightning_megatron.strategy import MegatronStrategy as MegatronStrategy

__version__ = "0.1.0"

_HOMES = {
    "BertConfig": "models.config",
    "BertModule": "models.bert_module",
    "CheckpointError": "errors",
    "DataError": "errors",
    "Float8": "precision",
    "GPTConfig": "models.config",
    "GPTModule": "models.gpt_module",
    "LayoutError": "errors",
    "LoRAConfig": "lora",
    "Loss": "schedule",
    "LossScaling": "precision",
    "MegatronModule": "module",
    "MegatronPrecision": "precision",
    "MegatronStrategy": "strategy",
    "ModuleError": "errors",
    "OptimizerConfig": "optim.config",
    "ParallelLayout": "layout",
    "RendezvousError": "errors",
    "T5Config": "models.config",
    "T5Module": "models.t5_module",
    "average_losses_across_data_parallel_group": "models.collectives",
    "gather_across_data_parallel_groups": "models.collectives",
    "from_pretrained": "models.registry",
}
_SUBPACKAGES = ("backends", "callbacks", "checkpoint", "compat", "data", "generation", "planner")
__all__ = [*_HOMES, *_SUBPACKAGES]  # noqa: PLE0604  (all are strings)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBPACKAGES})


register()
