"""A finished or running run as one page: what it logged, its configuration, layout and checkpoints."""

from lightning_megatron.reporting.page import render
from lightning_megatron.reporting.run import Run, read_run

__all__ = ["Run", "read_run", "render"]
