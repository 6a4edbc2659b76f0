"""A rank that stops: the others raise in time, and say where each was."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_megatron.callbacks import HangError, Heartbeat
from tests.checkpoint.runs import Case, make_module, make_trainer
from tests.helpers import Record, SharedLoader
from tests.ranks import RankPool

TP2 = Case(2, {"tensor_model_parallel_size": 2})
PP2 = Case(2, {"pipeline_model_parallel_size": 2})  # whose receives wait for ever
TIMEOUT = 2.0


class Stop(pl.Callback):
    """Makes one rank stop in its third step: by waiting, or altogether."""

    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how = rank, how

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.global_rank == self.rank:
            time.sleep(1.2)  # so that the others have heard of this step
            if self.how == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)


def _stopped(case: Case, rank: int, how: str) -> tuple[str, float]:
    heartbeat, record = Heartbeat(TIMEOUT, interval=0.5, exit_after=1.0), Record()
    trainer = make_trainer(case, heartbeat, record, Stop(rank, how), max_steps=6)
    module = make_module()
    began = time.monotonic()
    try:
        trainer.fit(module, SharedLoader(module, length=160))
    except HangError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


@pytest.mark.parametrize(
    ("case", "rank", "how"),
    [
        (TP2, 1, "waiting"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((TP2, 0, "frozen"), (PP2, 1, "frozen"), (PP2, 0, "waiting"))
        ),
    ],
    ids=["tp2-waiting", "tp2-frozen", "pp2-frozen", "pp2-waiting"],
)
def test_a_stopped_rank_frees_the_others(ranks: RankPool, case: Case, rank: int, how: str) -> None:
    results, errors = ranks.attempt(_stopped, 2, case, rank, how, timeout=15.0)
    assert set(results) == {1 - rank}
    message, seconds = results[1 - rank]
    assert seconds < TIMEOUT + 12
    assert f"rank {rank}: after step 2, in a training step since" in message
    assert "at on_train_batch_start (test_heartbeat.py:" in message
    if how == "waiting":
        assert "exit code 70" in errors[rank]
    assert f"rank {1 - rank}: after step 2" in message


def _healthy() -> int:
    heartbeat = Heartbeat(TIMEOUT, interval=0.2)
    trainer = make_trainer(TP2, heartbeat, max_steps=4)
    module = make_module()
    trainer.fit(module, SharedLoader(module, length=160))
    time.sleep(TIMEOUT + 1.0)  # a fit that has ended may take its time
    trainer.validate(module, SharedLoader(module, length=16), verbose=False)
    return trainer.global_step


def test_a_fit_that_ends_is_left_alone(ranks: RankPool) -> None:
    assert ranks.run(_healthy, 2) == [4, 4]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="timeout=0"):
        Heartbeat(0)
    with pytest.raises(ValueError, match=r"interval=9 is not between 0 and timeout=5"):
        Heartbeat(5.0, interval=9)
