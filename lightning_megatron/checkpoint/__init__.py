"""Checkpoints: directories that any layout writes and any other reads."""

from lightning_megatron.checkpoint.integrity import verify
from lightning_megatron.checkpoint.saver import CheckpointOptions
from lightning_megatron.checkpoint.single_file import average, consolidate, expand

__all__ = ["CheckpointOptions", "average", "consolidate", "expand", "verify"]
