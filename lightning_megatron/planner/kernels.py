"""What two implementations of a Transformer layer make of a GPU: the package's fused layers, and megatron-core's own.

The constants of :data:`FUSED` are fitted to every second of the 26 rows in ``benchmarks/README.md`` (one H100, one and
two H200); the rows left out are within 5%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKernels = Literal["fused", "megatron_core"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Constants of one implementation of a layer."""

    name: LayerKernels
    matmul_efficiency: float
    """Fraction of the peak FLOP/s that matrix products reach."""
    matmul_traffic: bool
    """Add a product's memory traffic to its FLOPs' time. Without it the efficiency is an average over all products."""
    device_seconds_per_layer: float = 0.0
    """Of one layer's forward and backward on one micro-batch, whatever its size: launches, and the last wave of
    each kernel, which leaves most multiprocessors idle."""
    seconds_per_pass: float = 0.0
    """Of a forward or a backward of one chunk of a pipeline, beside its kernels: sends, receives, and the start of
    CUDA graphs."""
    host_seconds_per_layer: float = 0.0
    """To launch one layer's forward and backward on one micro-batch. A stage is never faster than its host."""
    host_seconds_optimizer_per_layer: float = 0.0
    """Of one optimizer step, for one layer's parameters."""
    sequence_parallel_exposed: float = 1.0
    """Part of the sequence-parallel communication that no product hides."""
    data_parallel_exposed: float = 0.1
    """Part of an overlapped gradient reduction and weight gathering that costs time all the same, since NCCL's kernels
    and products share multiprocessors, and the last bucket has nothing to hide behind."""
    context_parallel_hidden: bool = True
    """Whether attention goes on beside the passing of keys and values."""


FUSED = Kernels(
    name="fused",
    matmul_efficiency=0.729,
    matmul_traffic=False,
    device_seconds_per_layer=0.294e-3,
    seconds_per_pass=0.72e-3,
    sequence_parallel_exposed=0.88,
    data_parallel_exposed=0.35,
    context_parallel_hidden=False,
)
MEGATRON_CORE = Kernels(
    name="megatron_core",
    # With the traffic added an 8192^3 product takes the 1.38 ms (798 TFLOP/s) measured on an H100, and GPT-2 large's
    # narrow ones run at 60 to 70% of the peak.
    matmul_efficiency=0.905,
    matmul_traffic=True,
    # 3.3 ms a layer were measured for its modules run eagerly on an H100, and 41 ms an optimizer step for the 36 layers
    # of GPT-2 large, with foreach and fused kernels.
    host_seconds_per_layer=3.3e-3,
    host_seconds_optimizer_per_layer=1.1e-3,
)
KERNELS: dict[LayerKernels, Kernels] = {kernels.name: kernels for kernels in (FUSED, MEGATRON_CORE)}
