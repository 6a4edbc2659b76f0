"""Checkpoints: one directory each, in megatron-core's distributed format, which any layout can load."""
