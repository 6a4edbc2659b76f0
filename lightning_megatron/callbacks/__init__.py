"""Callbacks for Trainers with a MegatronStrategy."""

from lightning_megatron.callbacks.sample_text import SampleText
from lightning_megatron.callbacks.throughput import Throughput

__all__ = ["SampleText", "Throughput"]
