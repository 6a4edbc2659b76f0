"""Callbacks for Trainers with a MegatronStrategy."""

from lightning_megatron.callbacks.throughput import Throughput

__all__ = ["Throughput"]
