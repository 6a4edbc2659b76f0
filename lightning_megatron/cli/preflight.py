"""What can be said against a run before its processes start, once and not on each rank."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from lightning_megatron.data.datamodule import GlobalBatchDataModule, PretrainingData
from lightning_megatron.data.finetuning import FineTuningData
from lightning_megatron.errors import CheckpointError, DataError
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.models.language_module import LanguageModelModule
from lightning_megatron.module import MegatronModule
from lightning_megatron.strategy import MegatronStrategy

_NAMES = ("best", "last", "hpc")
"""Checkpoints that Lightning finds."""


def preflight(
    trainer: pl.Trainer,
    module: MegatronModule,
    data: pl.LightningDataModule,
    *,
    stage: str = "fit",
    ckpt_path: str | Path | None = None,
) -> None:
    """Check the layout against the model, and that files are there.

    Raises:
        LayoutError: a layout that the model or the number of processes does not fit.
        DataError: files that are missing, or sequences longer than the model's positions.
        CheckpointError: no checkpoint at ``ckpt_path``.
    """
    if isinstance(trainer.strategy, MegatronStrategy) and isinstance(module, LanguageModelModule):
        module.config.check_layout(trainer.strategy.layout)
    if isinstance(data, GlobalBatchDataModule):
        data.check_files(stage)
    if isinstance(data, (PretrainingData, FineTuningData)) and isinstance(module, LanguageModelModule):
        longest = module.config.max_position_embeddings
        if isinstance(module.config, GPTConfig) and data.seq_length > longest:
            raise DataError(
                f"data.seq_length={data.seq_length} is longer than the model's max_position_embeddings={longest}. "
                f"Set data.seq_length={longest} or less."
            )
    named = ckpt_path is None or str(ckpt_path) in _NAMES or "://" in str(ckpt_path)
    if not named and not Path(str(ckpt_path)).exists():
        raise CheckpointError(f"There is no checkpoint at ckpt_path={ckpt_path}.")
