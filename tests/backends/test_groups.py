"""When NCCL's communicators are made, by what Lightning tells torch, and how gloo's groups end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

import lightning_megatron as lm
from lightning_megatron.backends import core, groups
from lightning_megatron.backends.groups import connected_when_used
from tests.helpers import SharedLoader, quiet_trainer, tiny_config
from tests.ranks import RankPool

BOUND = torch.device("cuda", 0)


class Bound(lm.MegatronStrategy):
    """On a CPU as Lightning does it on a GPU: the default group is bound to a device, and with it each new group."""

    def setup_distributed(self) -> None:
        super().setup_distributed()
        dist.group.WORLD.bound_device_id = BOUND  # type: ignore[union-attr]

    def setup_environment(self) -> None:
        super().setup_environment()
        assert self._replica is not None
        groups = (dist.group.WORLD, core.parallel_state.get_tensor_model_parallel_group(), self._replica.all)
        self.found = [group.bound_device_id for group in groups]  # type: ignore[union-attr]
        dist.group.WORLD.bound_device_id = None  # type: ignore[union-attr]  # or a barrier would ask for CUDA


def set_up() -> list[torch.device | None]:
    """What the default group, one of megatron-core's and one of the host's are bound to when all are made."""
    module, strategy = lm.GPTModule(tiny_config()), Bound(tensor_model_parallel_size=2)
    quiet_trainer(strategy, 2, max_steps=1).fit(module, SharedLoader(module))
    return strategy.found


def one_group() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1)
    default = dist.group.WORLD
    assert default is not None
    default.bound_device_id = BOUND
    assert dist.new_group().bound_device_id == BOUND  # what torch takes for "connect"
    with connected_when_used():
        assert dist.new_group().bound_device_id is None
    assert default.bound_device_id == BOUND
    with pytest.raises(KeyError), connected_when_used():
        raise KeyError
    assert default.bound_device_id == BOUND
    default.bound_device_id = None


ENDS_WHILE_A_THREAD_HOLDS_A_TENSOR = """
import time

import torch

import lightning_megatron as lm
from lightning_megatron.backends import core, groups
from tests.helpers import SharedLoader, quiet_trainer, tiny_config


class Slow(torch.Tensor):
    def __del__(self):
        time.sleep({seconds})


def main():
    module = lm.GPTModule(tiny_config())
    trainer = quiet_trainer(lm.MegatronStrategy(), 1, max_steps=1)
    trainer.fit(module, SharedLoader(module))
    group = core.parallel_state.get_tensor_model_parallel_group()
    group.allreduce([torch.ones(1).as_subclass(Slow)])
    return trainer


{end}
"""


@pytest.mark.parametrize(
    ("seconds", "end"),
    [(0.5, "main()"), pytest.param(1.5, "groups._LETTING_GO = 3.0; kept = main()", marks=pytest.mark.slow)],
    ids=["local", "kept"],
)
def test_a_process_ends_after_its_threads_of_gloo(seconds: float, end: str) -> None:
    """One of which lets go of a tensor late; the exit code was -6, ``terminate called``."""
    code = ENDS_WHILE_A_THREAD_HOLDS_A_TENSOR.format(seconds=seconds, end=end)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]


class Fails(pl.Callback):
    def on_train_batch_start(self, *_: object) -> None:
        raise KeyError("not ours")


def at_exit(fails: bool) -> set[str]:
    """Names of what this process would do at its end after a fit."""
    planned: set[Any] = set()
    with mock.patch.object(groups, "atexit", mock.Mock(register=planned.add, unregister=planned.discard)):
        module = lm.GPTModule(tiny_config())
        trainer = quiet_trainer(lm.MegatronStrategy(), 1, max_steps=1, callbacks=[Fails()] if fails else [])
        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            trainer.fit(module, SharedLoader(module))
    return {function.__name__ for function in planned}


def test_only_a_failure_leaves_the_groups_as_they_are(ranks: RankPool) -> None:
    assert ranks.run(at_exit, 1, False) == [{"_leave"}]
    assert ranks.run(at_exit, 1, True) == [set()]


def test_groups_are_not_connected_before_they_are_used(ranks: RankPool) -> None:
    ranks.run(one_group, 1)
    assert ranks.run(set_up, 2) == [[BOUND, None, None]] * 2
