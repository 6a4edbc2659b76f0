"""Notices a rank that has stopped, and frees the others, which would wait for it."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_megatron.backends.groups import abort_all
from lightning_megatron.backends.rendezvous import serve
from lightning_megatron.liveness.watch import innermost_line

logger = logging.getLogger(__name__)

HUNG = 70
"""``EX_SOFTWARE``: what a process exits with that cannot be freed."""
_SHOWN = 16
_DONE = "done"


class HangError(RuntimeError):
    """A rank has not made progress for too long."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank last said of itself."""

    count: int
    """Grows with every sign of progress of the thread that trains."""
    step: int
    """Optimizer steps so far."""
    doing: str
    where: str = ""
    """The innermost line of Python that the thread is at."""


class _Board:
    """Every rank's last beat, kept by a thread, since a store whose process is stopped blocks whoever asks it."""

    def __init__(self, store: dist.TCPStore, rank: int, size: int, interval: float) -> None:
        self._store, self._rank, self._size, self._interval = store, rank, size, interval
        self._thread = threading.Thread(target=self._exchange, name="heartbeat", daemon=True)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._answered = time.monotonic()
        self._mine = (Beat(0, 0, "starting"), self._answered)
        self._known = dict.fromkeys(range(size), self._mine)
        self._trains = threading.get_ident()

    def start(self) -> None:
        """Begin to tell and to listen."""
        self._post()
        self._thread.start()

    def end(self, *, wait: bool = True) -> None:
        """Tell the last beat, and stop."""
        self._ended.set()
        if wait:
            self._thread.join(2 * self._interval)

    def beat(self, step: int, doing: str) -> None:
        """Note progress of this rank."""
        self._mine = (Beat(self._mine[0].count + 1, step, doing), time.monotonic())

    def ages(self) -> dict[int, tuple[Beat, float]]:
        """The last beat of each rank, and the seconds since it was new."""
        now = time.monotonic()
        beat, since = self._mine
        mine = (Beat(beat.count, beat.step, beat.doing, innermost_line(self._trains)), since)
        with self._lock:
            known = self._known | {self._rank: mine}
        return {rank: (beat, now - since) for rank, (beat, since) in known.items()}

    @property
    def silence(self) -> float:
        """Seconds since rank 0, where beats are kept, last answered."""
        return time.monotonic() - self._answered

    def _post(self) -> None:
        beat = asdict(self._mine[0]) | {"where": innermost_line(self._trains)}
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _exchange(self) -> None:
        keys = [f"beat/{rank}" for rank in range(self._size)]
        while True:
            last = self._ended.wait(self._interval)
            try:
                self._post()
                if last:
                    return
                beats = [Beat(**json.loads(text)) for text in self._store.multi_get(keys)]
            except Exception:  # the store has gone, or does not answer: `silence` tells
                if last:
                    return
                continue
            now = time.monotonic()
            with self._lock:
                self._answered = now
                for rank, beat in enumerate(beats):
                    old, since = self._known[rank]
                    self._known[rank] = (beat, since if old.count == beat.count else now)


class Heartbeat(pl.Callback):
    """While a fit runs, lets every rank raise :class:`HangError` when any has made no progress for ``timeout``.

    Progress is the beginning or the end of a batch, of training or validation, and the beginning of a save. The error
    tells each rank's last step, how long ago that was, and the line it is at. Ranks that wait in a collective are freed
    from it; a process that stays where it is, as the one that hangs may, prints its stacks and exits with code 70.

    Args:
        timeout: longer than the longest step, with what it compiles, and the longest save.
        interval: how often ranks tell each other; ``None`` is a fifth of ``timeout``, at most 10 seconds.
        exit_after: how long after the error a process may stay where it is.
    """

    def __init__(
        self,
        timeout: timedelta | float = timedelta(minutes=10),
        *,
        interval: float | None = None,
        exit_after: float = 60.0,
    ) -> None:
        self.timeout = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        if self.timeout <= 0:
            raise ValueError(f"timeout={timeout!r}, but must be more than no time.")
        self.interval = min(self.timeout / 5, 10.0) if interval is None else interval
        if not 0 < self.interval < self.timeout:
            raise ValueError(f"interval={interval!r} is not between 0 and timeout={self.timeout:g} seconds.")
        self.exit_after = exit_after
        self._board: _Board | None = None
        self._ended = threading.Event()
        self._verdict: str | None = None

    # ------------------------------------------------------------------------------------------------ the watch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Connect the ranks, and begin."""
        if trainer.world_size == 1:
            return
        rank, size = trainer.global_rank, trainer.world_size
        environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        patience = timedelta(seconds=max(self.timeout, 30.0))
        server = serve(environment.main_address, patience) if not rank else None
        port = trainer.strategy.broadcast(server.port if server else 0)
        store = server or dist.TCPStore(environment.main_address, port, is_master=False, timeout=patience)
        self._board = _Board(store, rank, size, self.interval)
        self._ended, self._verdict = threading.Event(), None
        self._beat(trainer, "starting")
        self._board.start()
        threading.Thread(target=self._watch, args=(self._board, self._ended), name="hangs", daemon=True).start()

    def _watch(self, board: _Board, ended: threading.Event) -> None:
        while not ended.wait(self.interval):
            message = self._judge(board, self.timeout)
            if message is None:
                continue
            self._verdict = message
            logger.error(message)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            board.end(wait=False)
            abort_all()
            if not ended.wait(self.exit_after):
                logger.error("This process could not be freed, and ends.")
                os._exit(HUNG)
            return

    def _judge(self, board: _Board, limit: float) -> str | None:
        ages = board.ages()
        stuck = [rank for rank, (beat, age) in ages.items() if age > limit and beat.doing != _DONE]
        if board.silence > limit:
            reason = f"Rank 0 has not answered for {board.silence:.0f} s."
        elif stuck:
            reason = f"No progress for more than {limit:g} s on rank {', '.join(map(str, stuck[:_SHOWN]))}."
        else:
            return None
        oldest_first = sorted(ages.items(), key=lambda item: -item[1][1])
        lines = [
            f"  rank {rank}: after step {beat.step}, {beat.doing} since {age:.1f} s, at {beat.where or 'no known line'}"
            for rank, (beat, age) in oldest_first[:_SHOWN]
        ]
        more = [f"  and {len(oldest_first) - _SHOWN} more ranks"] if len(oldest_first) > _SHOWN else []
        return "\n".join([reason, *lines, *more])

    def _beat(self, trainer: pl.Trainer, doing: str) -> None:
        if self._board is not None:
            self._board.beat(trainer.global_step, doing)

    def _end(self, trainer: pl.Trainer, doing: str) -> None:
        if self._board is not None:
            self._beat(trainer, doing)
            self._ended.set()
            self._board.end()
            self._board = None

    # ------------------------------------------------------------------------------------- signs of progress

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch is there."""
        self._beat(trainer, "in a training step")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """A step is done."""
        self._beat(trainer, "between steps")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch is there."""
        self._beat(trainer, "in a validation step")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """A step is done."""
        self._beat(trainer, "validating")

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        """A save begins."""
        self._beat(trainer, "saving a checkpoint")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing to watch any more."""
        self._end(trainer, _DONE)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say why a collective failed, if this watch is the reason.

        Raises:
            HangError: it is.
        """
        board, message = self._board, self._verdict
        if message is None and board is not None and isinstance(exception, RuntimeError):
            # A rank that has given up already has closed its connections to this one.
            message = self._judge(board, self.timeout / 2)
        self._end(trainer, f"failed with {type(exception).__name__}")
        if message is not None:
            hang = HangError(message)
            trainer.strategy.on_exception(hang)  # which Lightning does not come to after this
            raise hang from exception
