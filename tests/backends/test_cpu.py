"""The CPU stand-ins: the names of megatron-core that they replace, what they do, and that they leave no trace."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_megatron.backends import cpu
from tests.ranks import RankPool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for a machine without CUDA")


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@contextmanager
def uninstalled() -> Iterator[None]:
    """Other tests use these processes after this one."""
    cpu.uninstall()
    try:
        yield
    finally:
        cpu.install()


@uninstalled()
def names_and_signatures() -> None:
    random, *moe, inference, jit = (
        importlib.import_module(f"megatron.core.{name}")
        for name in (
            "tensor_parallel.random",
            "transformer.moe.moe_utils",
            "transformer.moe.token_dispatcher",
            "inference.communication_utils",
            "jit",
        )
    )
    assert {module.__name__ for module in (random, *moe, inference, jit)} == set(cpu.PATCHES)
    assert parameters(random._set_cuda_rng_state) == ["new_state", "device", "graph_safe"]
    assert parameters(random.CudaRNGStatesTracker.fork) == ["self", "name"]
    assert random._MODEL_PARALLEL_RNG_TRACKER_NAME == "model-parallel-rng"
    tracker = random.CudaRNGStatesTracker()
    assert tracker.states_ == {}
    assert hasattr(tracker, "_current_state_name")
    for module in moe:
        assert parameters(module.maybe_move_tensor_to_cpu) == ["tensor", "as_numpy", "record_stream"]
    assert parameters(inference._is_cuda) == ["tensor"]
    assert parameters(jit.disable_jit_fuser) == []
    for module in (random, *moe):
        assert module.torch is torch


@uninstalled()
def install_and_uninstall() -> None:
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    before = layers.torch, random.CudaRNGStatesTracker.fork, torch.Tensor.cuda
    assert before[0] is torch
    for _ in range(2):
        cpu.install()
        cpu.install()
        assert cpu.installed()
        assert layers.torch is not torch
        assert random.CudaRNGStatesTracker.fork is not before[1]
        cpu.uninstall()
        assert (layers.torch, random.CudaRNGStatesTracker.fork, torch.Tensor.cuda) == before


def stand_ins() -> None:
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    inside = layers.torch
    assert inside.empty(2, device="cuda").device.type == "cpu"
    assert inside.zeros(2, device="cuda:1", pin_memory=True).device.type == "cpu"
    assert inside.cuda.current_device() == torch.device("cpu")
    with inside.cuda.stream(inside.cuda.Stream()) as stream:
        assert stream.query()
    assert inside.float32 is torch.float32  # all else is torch's own
    tensor = torch.ones(1)
    with pytest.raises((RuntimeError, AssertionError)):
        tensor.cuda()  # outside megatron-core nothing changes
    inner: dict[str, Any] = {"__name__": "megatron.core.made_up", "tensor": tensor}
    exec("found = tensor.cuda()", inner)
    assert inner["found"] is tensor
    assert tensor.type() == "torch.FloatTensor"
    with cpu.cuda_type_names():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.type(torch.float64).dtype is torch.float64
    assert tensor.type() == "torch.FloatTensor"


def forked_generators() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    tracker = random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("other", 2)
    expected = torch.Generator().manual_seed(1)
    other = torch.Generator().manual_seed(2)
    for _ in range(2):
        with tracker.fork("other"):
            assert torch.equal(torch.rand(3), torch.rand(3, generator=other))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    with (
        pytest.raises(RuntimeError, match="'missing' was never added; known are \\['other'\\]"),
        tracker.fork("missing"),
    ):
        pass


def uneven_collectives(rank_count: int) -> tuple[list[list[float]], list[float]]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    inside = importlib.import_module("megatron.core.tensor_parallel.layers").torch.distributed
    gathered = [torch.zeros(size + 1) for size in range(rank_count)]
    inside.all_gather(gathered, torch.full((rank + 1,), float(rank)))
    mine = torch.zeros(rank + 1)
    inside.reduce_scatter(mine, [torch.full((size + 1,), 1.0 + rank + 10 * size) for size in range(rank_count)])
    return [tensor.tolist() for tensor in gathered], mine.tolist()


def test_names_that_an_upgrade_could_move(ranks: RankPool) -> None:
    ranks.run(names_and_signatures, 1)


def test_nothing_stays_behind(ranks: RankPool) -> None:
    ranks.run(install_and_uninstall, 1)
    ranks.run(stand_ins, 1)
    ranks.run(forked_generators, 1)


def test_tensors_of_unequal_shapes(ranks: RankPool) -> None:
    first, second = ranks.run(uneven_collectives, 2, 2)
    assert first == ([[0.0], [1.0, 1.0]], [3.0])
    assert second == ([[0.0], [1.0, 1.0]], [23.0, 23.0])
