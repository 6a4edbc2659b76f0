"""Process groups of many fits in one process, and where they listen."""

from __future__ import annotations

import gc
import ipaddress
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

import lightning_megatron as lm
from lightning_megatron.backends.rendezvous import is_loopback, meet
from lightning_megatron.errors import RendezvousError
from tests.checkpoint.runs import make_module
from tests.helpers import SharedLoader, quiet_trainer
from tests.ranks import RankPool, free_port

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}), "dp2": (2, {}), "tp2": (2, TP2), "pp2": (2, PP2), "tp2_pp2": (4, TP2 | PP2)
}  # fmt: skip


def fits(world_size: int, layouts: list[dict[str, int]], directory: Path) -> tuple[list[tuple[int, int]], set[str]]:
    """Descriptors and threads after each of many fits, every one of which is used once more; addresses listened at."""
    process, counts, previous = psutil.Process(), [], None
    for number, layout in enumerate(layouts):
        module = make_module()
        trainer = quiet_trainer(lm.MegatronStrategy(**layout, micro_batch_size=2, seed=7), world_size, max_steps=1)
        trainer.fit(module, SharedLoader(module, length=16))
        if previous is not None:
            previous.save_checkpoint(directory / f"{number}.ckpt")  # after another Trainer has run
            previous.validate(
                previous.lightning_module, SharedLoader(previous.lightning_module, length=8), verbose=False
            )
        previous = trainer
        while any(thread.name == "peers" for thread in threading.enumerate()):
            time.sleep(0.01)  # until rank 0 has heard that the others are done
        counts.append((process.num_fds(), process.num_threads()))
    return counts, {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}


def check(pool: RankPool, name: str, number: int, directory: Path) -> None:
    world_size, layout = LAYOUTS[name]
    # Of one layout, and of two in turn.
    for index, layouts in enumerate(([layout] * number, [layout, {}] * (number // 2))):
        for counts, addresses in pool.run(fits, world_size, world_size, layouts, directory / str(index), timeout=600.0):
            assert counts[-1][0] <= counts[2][0], counts
            assert counts[-1][1] <= counts[2][1], counts
            assert addresses
            assert all(ipaddress.ip_address(address).is_loopback for address in addresses)


def test_fits_of_one_process_keep_no_groups(ranks: RankPool, tmp_path: Path) -> None:
    check(ranks, "one", 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_many_fits_keep_no_groups(name: str, ranks: RankPool, tmp_path: Path) -> None:
    check(ranks, name, 12, tmp_path)


def kept_on_one_rank(world_size: int) -> list[int]:
    """Steps of fits of which rank 0 keeps the Trainers, and so their groups, and the other lets them go."""
    kept, steps = [], []
    for layout in ({}, TP2, {}, TP2):
        module = make_module()
        trainer = quiet_trainer(lm.MegatronStrategy(**layout, micro_batch_size=2, seed=7), world_size, max_steps=1)
        trainer.fit(module, SharedLoader(module, length=8))
        steps.append(trainer.global_step)
        if trainer.global_rank == 0:
            kept.append(trainer)
        del trainer, module
        gc.collect()
    return steps


def test_ranks_agree_on_the_groups_that_they_take(ranks: RankPool) -> None:
    """When a Trainer goes that nothing refers to is up to each process's garbage collector."""
    assert ranks.run(kept_on_one_rank, 2, 2, timeout=60.0) == [[1, 1, 1, 1]] * 2


def test_rank_0_that_does_not_listen_is_named() -> None:
    port, began = free_port(), time.monotonic()
    with pytest.raises(
        RendezvousError, match=rf"Rank 1 found no rank 0 at 127\.0\.0\.1:{port} within 1 s\. Check MASTER"
    ):
        meet("127.0.0.1", port, 1, 2, timeout=timedelta(minutes=10), connect_timeout=timedelta(seconds=1))
    assert time.monotonic() - began < 10


def test_loopback_addresses() -> None:
    assert [is_loopback(text) for text in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_loopback(text) for text in ("10.0.0.1", "node7", "0.0.0.0")] == [False] * 3


WORKER_IS_KILLED = """
import os, signal
from multiprocessing.util import get_temp_dir
from torch.utils.data import DataLoader
import lightning_megatron as lm
from tests.checkpoint.runs import make_module
from tests.helpers import Tokens, quiet_trainer


class Deadly(Tokens):
    def __getitem__(self, index):
        assert os.listdir(os.environ["TMPDIR"]) == [os.path.basename(get_temp_dir())]
        os.kill(os.getpid(), signal.SIGKILL)


quiet_trainer(lm.MegatronStrategy(), 1, max_steps=1).fit(make_module(), DataLoader(Deadly(), 2, num_workers=1))
"""


@pytest.mark.slow
def test_a_killed_worker_leaves_no_temporary_directory(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WORKER_IS_KILLED],
        cwd=Path(__file__).parents[2], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert "killed by signal: Killed" in ended.stderr
    assert list(tmp_path.iterdir()) == []
