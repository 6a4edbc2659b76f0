"""Products that overlap with their tokens' way between ranks, and the order of the backward, against one process."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.models.fused import linear
from lightning_megatron.models.fused.exchange import Exchange
from tests.distributed.test_layouts import LAYOUTS
from tests.models.test_fused import LLAMA, train


class Sent:
    """Memory that peers write to, over gloo."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._sends: list[Any] = []
        self.exchanged = 0

    def push(self, slot: int, parts: int, part: int, source: Tensor, peer: int) -> None:
        assert part < parts
        copy = source.clone()
        self._sends.append((dist.isend(copy, group=self._group, group_dst=peer, tag=100 + slot), copy))

    def receive(self, slot: int, parts: int, part: int, like: Tensor, peer: int) -> Tensor:
        assert part < parts
        received = torch.empty_like(like)
        dist.recv(received, group=self._group, group_src=peer, tag=100 + slot)
        self.exchanged += 1
        return received

    def finish(self) -> None:
        """Wait until all has been sent, which the end of this object would cancel."""
        for work, _ in self._sends:
            work.wait()


def train_exchanging(world_size: int, *arguments: Any) -> tuple[list[float], list[float], int]:
    """As :func:`train`, with exchanges; and how many parts arrived."""
    made: dict[str, tuple[Exchange, Sent]] = {}

    def of(group: dist.ProcessGroup) -> tuple[Exchange, None]:
        if group.group_name not in made:
            memory = Sent(group)
            made[group.group_name] = Exchange(group, memory, None), memory
        return made[group.group_name][0], None

    with patch.object(Exchange, "of", of), patch.object(linear, "LEAST_ROWS", 1):
        losses, norms = train(world_size, True, *arguments)
    return losses, norms, sum(memory.exchanged for _, memory in made.values())


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("tp2 sp", {}),
        ("tp2 sp", LLAMA),
        ("tp2 pp2 interleaved sp", {}),
        pytest.param("tp2 sp", {"recompute_granularity": "full", "recompute_method": "uniform",
                                "recompute_num_layers": 1}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_exchanged_products_equal_one_process(ranks: Any, layout: str, model: dict[str, Any]) -> None:
    world_size, strategy = LAYOUTS[layout]
    expected = ranks.run(train, 1, 1, False, {}, model)[0]
    for losses, norms, exchanged in ranks.run(train_exchanging, world_size, world_size, strategy, model):
        assert exchanged > 0
        assert losses == pytest.approx(expected[0], abs=5e-6)
        assert norms == pytest.approx(expected[1], rel=1e-5)


def products_of_ranks(size: int) -> list[float]:
    """Largest differences of both products from those of whole tensors."""
    group = dist.group.WORLD
    assert group is not None
    rank = group.rank()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3 * size, 8, generator=generator)
    matrix, bias = torch.randn(8, 5, generator=generator), torch.randn(5, generator=generator)
    parts = torch.randn(size, 3 * size, 8, generator=generator)
    memory = Sent(group)
    exchange = Exchange(group, memory, None)
    mine = slice(3 * rank, 3 * rank + 3)
    differences = []
    for _ in range(2):
        gathered, out = exchange.gather_product(tokens[mine], matrix, bias)
        total = exchange.start_product_scatter(parts[rank], matrix)
        differences += [
            float((gathered - tokens).abs().max()),
            float((out - (tokens @ matrix + bias)).abs().max()),
            float((total.wait() - (parts.sum(0) @ matrix)[mine]).abs().max()),
        ]
    memory.finish()
    return differences


def products(size: int) -> list[float]:
    """In a process group of the pool."""
    dist.init_process_group("gloo")
    try:
        differences = products_of_ranks(size)
        dist.barrier()
        return differences
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_products_equal_those_of_whole_tensors(ranks: Any, size: int) -> None:
    for differences in ranks.run(products, size, size, timeout=60.0):
        assert max(differences) < 1e-5


def two_in_a_row() -> str:
    """What an exchange says when one of its slots would be written before peers have read it."""
    dist.init_process_group("gloo")
    try:
        group = dist.group.WORLD
        assert group is not None
        memory = Sent(group)
        exchange = Exchange(group, memory, None)
        exchange.gather_product(torch.ones(2, 2), torch.ones(2, 2))
        try:
            exchange.gather_product(torch.ones(2, 2), torch.ones(2, 2))
        except AssertionError as error:
            memory.finish()
            dist.barrier()
            return str(error)
        return ""
    finally:
        dist.destroy_process_group()


def test_a_slot_is_not_written_twice_in_a_row(ranks: Any) -> None:
    assert all("in a row" in said for said in ranks.run(two_in_a_row, 2))
