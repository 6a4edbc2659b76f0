"""Random states: seeded as Megatron-LM does, and saved per rank."""

from __future__ import annotations

import math
import random

import numpy as np
import torch

from lightning_megatron.backends.core import initialize_rng_tracker, model_parallel_cuda_manual_seed, tensor_parallel

_TRACKED = "tracked."


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


def capture() -> dict[str, torch.Tensor]:
    """All generators of this rank, as tensors: a checkpoint holds no objects that only pickle could bring back."""
    _, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _number(gauss),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([numpy["state"]["pos"], numpy["has_gauss"]]),
        "numpy_gauss": _number(numpy["gauss"]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return state | {_TRACKED + name: value for name, value in tracked.items()}


def restore(state: dict[str, torch.Tensor]) -> None:
    """Set all generators of this rank."""
    gauss = float(state["python_gauss"])
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    position, has_gauss = state["numpy_position"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracked = {name.removeprefix(_TRACKED): value for name, value in state.items() if name.startswith(_TRACKED)}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


def _number(value: float | None) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value], dtype=torch.float64)
