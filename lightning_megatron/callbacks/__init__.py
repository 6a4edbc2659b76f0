"""Callbacks for Trainers with a MegatronStrategy."""

from lightning_megatron.callbacks.health import NonFinite, NonFiniteError
from lightning_megatron.callbacks.heartbeat import HangError, Heartbeat
from lightning_megatron.callbacks.initial_weights import InitialWeights
from lightning_megatron.callbacks.preemption import Preemption
from lightning_megatron.callbacks.sample_text import SampleText
from lightning_megatron.callbacks.throughput import Throughput

__all__ = [
    "HangError",
    "Heartbeat",
    "InitialWeights",
    "NonFinite",
    "NonFiniteError",
    "Preemption",
    "SampleText",
    "Throughput",
]
