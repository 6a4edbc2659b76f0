"""Random states: seeded as Megatron-LM does, and saved per rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_megatron.backends.core import (
    ShardedObject,
    initialize_rng_tracker,
    model_parallel_cuda_manual_seed,
    tensor_parallel,
)


def seed(value: int, pipeline_rank: int) -> None:
    """Seed every generator of this rank.

    Pipeline stages draw different numbers. Tensor-parallel ranks draw the same ones by default, so that replicated
    weights and dropouts agree, and different ones inside the tracker's model-parallel state. Data-parallel ranks draw
    the same.
    """
    value += 100 * pipeline_rank
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    initialize_rng_tracker(force_reset=True)
    model_parallel_cuda_manual_seed(value)
    if not torch.cuda.is_available():
        # On a CPU both of megatron-core's default states are torch's one generator; seed it last.
        torch.manual_seed(value)


def sharded_state() -> ShardedObject:
    """All generators of this rank, as an object of a checkpoint that has one for each rank."""
    return ShardedObject("rng", _capture(), (dist.get_world_size(),), (dist.get_rank(),))


def _capture() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore(state: dict[str, Any]) -> None:
    """Set all generators of this rank."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
