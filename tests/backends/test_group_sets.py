"""Process groups of many fits in one process, and where they listen."""

from __future__ import annotations

import ipaddress
import time
from datetime import timedelta
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

import lightning_megatron as lm
from lightning_megatron.backends.rendezvous import is_loopback, meet
from lightning_megatron.errors import RendezvousError
from tests.checkpoint.runs import make_module
from tests.helpers import SharedLoader, Tokens, quiet_trainer
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
            previous.validate(previous.lightning_module, SharedLoader(previous.lightning_module, length=8), False)
        previous = trainer
        time.sleep(0.1)
        counts.append((process.num_fds(), process.num_threads()))
    return counts, {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}


def check(pool: RankPool, name: str, number: int, directory: Path) -> None:
    world_size, layout = LAYOUTS[name]
    # Of one layout, and of two in turn.
    for index, layouts in enumerate(([layout] * number, [layout, {}] * (number // 2))):
        for counts, addresses in pool.run(fits, world_size, layouts, directory / str(index), timeout=600.0):
            assert counts[-1] == counts[2], counts
            assert addresses
            assert all(ipaddress.ip_address(address).is_loopback for address in addresses)


def test_fits_of_one_process_keep_no_groups(ranks: RankPool, tmp_path: Path) -> None:
    check(ranks, "one", 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_many_fits_keep_no_groups(name: str, ranks: RankPool, tmp_path: Path) -> None:
    check(ranks, name, 12, tmp_path)


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


class TellsDirectory(Tokens):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(index) | {"directory": torch.tensor(list(get_temp_dir().encode()))}


def worker_directory() -> tuple[str, str]:
    found: list[Any] = []

    class Keeps(lm.GPTModule):
        def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            found.append(bytes(batch.pop("directory")[0].tolist()).decode())
            return super().prepare_batch(batch)

    module = Keeps(make_module().config)
    trainer = quiet_trainer(lm.MegatronStrategy(), 1, max_steps=1)
    trainer.fit(module, torch.utils.data.DataLoader(TellsDirectory(), 2, num_workers=1))
    return found[0], get_temp_dir()


def test_workers_have_no_temporary_directory_of_their_own(ranks: RankPool) -> None:
    """One that is killed would leave it."""
    ((of_worker, of_process),) = ranks.run(worker_directory, 1)
    assert of_worker == of_process
    assert not dist.is_initialized()
