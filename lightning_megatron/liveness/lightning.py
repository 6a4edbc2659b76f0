"""What connects a watch of peers with a Trainer: its opening, its errors, and its signals."""

from __future__ import annotations

import atexit
import re
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_megatron.liveness.watch import PeerWatch, is_of_collective

_ENDING = 10.0
"""Seconds that processes of a failed run have to end by themselves."""


def open_watch(
    strategy: DDPStrategy, *, timeout: timedelta, abort: Callable[[], None], is_saving: Callable[[], bool]
) -> PeerWatch | None:
    """Connect all ranks of a strategy whose default process group exists; ``None`` for one process."""
    if strategy.world_size == 1:
        return None
    environment = strategy.cluster_environment
    assert environment is not None
    rank = strategy.global_rank
    assert strategy.lightning_module is not None
    trainer = strategy.lightning_module.trainer
    watch = PeerWatch(
        rank,
        strategy.world_size,
        timeout=timeout.total_seconds(),
        abort=abort,
        step=lambda: trainer.global_step,
        is_saving=is_saving,
    )
    endpoint = strategy.broadcast(watch.listen(environment.main_address) if rank == 0 else None)
    if endpoint is not None and rank:
        watch.connect(endpoint, min(timeout.total_seconds(), 30.0))
    else:
        # A connection that is accepted while groups are made would be taken for one of theirs, and aborted with them.
        watch.wait_until_connected()
    return watch


def blame(exception: BaseException, watch: PeerWatch, abort: Callable[[], None], launcher: Any) -> None:
    """Tell the other ranks of an exception of this one, or this one's user of the rank that is the reason for it.

    A failed collective's own text says nothing of the reason, so the reason replaces it, and the text follows.
    """
    text = str(exception)
    collective_failed = isinstance(exception, RuntimeError) and is_of_collective(text)
    reason = watch.explain(collective_failed=collective_failed)
    if isinstance(exception, SystemExit) and watch.stop_requested and not exception.code:
        exception.code = 128 + signal.SIGTERM  # a run that a signal has ended did not finish
    if reason is not None:
        abort()  # no other thread of this process waits for a rank that is gone
        if collective_failed:
            exception.args = (f"{reason}\nThis rank's collective failed for that reason: {_first_line(text)}",)
        else:
            exception.add_note(f"Before that: {reason}")
    if isinstance(exception, SystemExit) and watch.stop_at is not None:
        watch.close()  # as all ranks do
    watch.fail(f"{type(exception).__name__}: {text}")
    if watch.rank == 0 and launcher is not None:
        atexit.register(_end_children, watch, launcher)


def _end_children(watch: PeerWatch, launcher: Any) -> None:
    """Kill those processes that this one has started and that do not end, as one that is stopped does not."""
    if not watch.wait_until_left(_ENDING):
        launcher.kill(signal.SIGKILL)


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"\[/\S*/(\w+\.\w+:\d+)\]", r"[\1]", line)


class TogetherOnSignal:
    """Lets SIGTERM, wherever and whenever it meets a rank, end training at the same batch on all ranks.

    Lightning's handler broadcasts as soon as the signal arrives: while one rank waits there for rank 0, rank 0 may wait
    for that rank in the collective of a step. Here the handler notes the signal; rank 0, told by the watch, chooses a
    batch that no rank has begun, and before that batch every rank calls Lightning's handler.

    Lightning broadcasts from rank 0 before each batch, so no rank begins a batch before rank 0 has.
    """

    def __init__(self, watch: PeerWatch) -> None:
        self._watch = watch
        self._batch = 0
        self._handler: Any = None
        current = signal.getsignal(signal.SIGTERM)
        # A callback's handler, such as that of Preemption, has its own way.
        if threading.current_thread() is threading.main_thread() and type(current).__module__.startswith("lightning."):
            self._handler = current
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._watch.stop_requested = True

    def before_batch(self) -> None:
        """Stop all ranks at this batch, if that was chosen."""
        self._batch += 1
        if self._handler is None:
            return
        self._watch.choose_stop(self._batch)
        if self._watch.stop_at is not None and self._batch >= self._watch.stop_at:
            handler, self._handler = self._handler, None
            handler(signal.SIGTERM, None)
