"""Callbacks for Trainers with a MegatronStrategy."""

from lightning_megatron.callbacks.experts import ExpertBalance
from lightning_megatron.callbacks.health import NonFinite, NonFiniteError
from lightning_megatron.callbacks.heartbeat import HangError, Heartbeat
from lightning_megatron.callbacks.initial_weights import InitialWeights
from lightning_megatron.callbacks.memory import MemoryByRank
from lightning_megatron.callbacks.norms import Norms
from lightning_megatron.callbacks.parameters import ParametersByRank
from lightning_megatron.callbacks.preemption import Preemption
from lightning_megatron.callbacks.sample_text import SampleText
from lightning_megatron.callbacks.throughput import Throughput

__all__ = [
    "ExpertBalance",
    "HangError",
    "Heartbeat",
    "InitialWeights",
    "MemoryByRank",
    "NonFinite",
    "NonFiniteError",
    "Norms",
    "ParametersByRank",
    "Preemption",
    "SampleText",
    "Throughput",
]
