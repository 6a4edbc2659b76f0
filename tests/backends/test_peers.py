"""Memory that GPUs of one host share: where there is none, and that what the package calls of torch is there."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.backends import peer_sum
from lightning_megatron.backends.groups import release_before_groups_end, release_recorded
from lightning_megatron.backends.peer_memory import reason_without_peer_memory


def sums() -> tuple[str, float, bool]:
    """Why ranks of gloo have no such memory; a sum without it; whether a product is left to the caller."""
    dist.init_process_group("gloo")
    try:
        group = dist.group.WORLD
        assert group is not None
        peer_sum.connect(group)
        total = peer_sum.all_reduce(torch.full((2,), dist.get_rank() + 1.0), group)
        product = peer_sum.product(torch.ones(1, 8), torch.ones(8, 8), group)
        dist.barrier()
        return reason_without_peer_memory(group) or "", float(total.sum()), product is None
    finally:
        dist.destroy_process_group()


def test_gloo_sums_as_ever(ranks: Any) -> None:
    for reason, total, left in ranks.run(sums, 2):
        assert "gloo" in reason
        assert total == 6.0
        assert left


def test_torch_has_what_is_called() -> None:
    """Fails when an upgrade of torch moves its symmetric memory, which has no public interface yet."""
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed._symmetric_memory import rendezvous

    assert list(inspect.signature(rendezvous).parameters) == ["tensor", "group"]
    for name in ("empty_strided_p2p", "get_buffer", "put_signal", "wait_signal"):
        assert hasattr(_SymmetricMemory, name)
    assert hasattr(torch.ops.symm_mem, "one_shot_all_reduce")


class Owner:
    """Of graphs."""

    released = 0

    def release(self) -> None:
        self.released += 1


def test_graphs_end_before_groups() -> None:
    owner = Owner()
    release_before_groups_end(owner)
    release_recorded()
    release_recorded()
    assert owner.released == 2
