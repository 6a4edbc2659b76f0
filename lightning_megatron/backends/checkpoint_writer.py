"""megatron-core's checkpoint writer, without the process that it starts for nothing."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_megatron.backends import core  # noqa: F401  (prepares megatron-core)


@contextmanager
def in_process_results() -> Iterator[None]:
    """Let a synchronous save hand its results over in this process.

    Upstream starts a spawned ``multiprocessing.Manager`` for it on every rank, which imports ``__main__`` again (half a
    minute) and outlives a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before
