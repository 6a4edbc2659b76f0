"""What :mod:`lightning_megatron.auto` is told of a run: its module and data, its devices, and what a user has set."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_megatron.auto import Devices, Work
from lightning_megatron.backends import core
from lightning_megatron.errors import LayoutError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import TransformerModelConfig
from lightning_megatron.planner.settings import Constraints


def work_of(module: pl.LightningModule | None, precision: Any) -> Work:
    """A module's model, and its data module's batch.

    Raises:
        LayoutError: a module without a model's configuration.
    """
    config = getattr(module, "config", None)
    if not isinstance(config, TransformerModelConfig):
        raise LayoutError(
            f"{type(module).__name__} has no `config` of a known kind, such as GPTConfig, by which to plan. Give "
            "the sizes instead of 'auto'."
        )
    assert module is not None
    data = getattr(module.trainer, "datamodule", None)
    return Work(
        model=config,
        precision=precision,
        global_batch_size=getattr(data, "global_batch_size", None),
        seq_length=getattr(data, "seq_length", None),
        context_parallel=bool(getattr(module, "supports_context_parallel", False)),
    )


def devices_of(device: torch.device, count: int, per_node: int) -> Devices:
    """``count`` devices like ``device``; on a CPU, shares of its memory."""
    name, memory = core.device_name_and_memory(device)
    shares = per_node if name == "cpu" else 1
    return Devices(name=name, memory=memory / shares, count=count, per_node=per_node)


def constraints_of(
    layout: ParallelLayout, *, micro_batch_size: int | None, use_distributed_optimizer: bool
) -> Constraints:
    """Sizes and switches that are not at their defaults."""
    sizes = {
        name: size
        for name, size in layout.as_dict().items()
        if name in Constraints.__dataclass_fields__ and size != ParallelLayout.__dataclass_fields__[name].default
    }
    return Constraints(
        **sizes,  # type: ignore[arg-type]
        micro_batch_size=micro_batch_size,
        use_distributed_optimizer=True if use_distributed_optimizer else None,
    )
