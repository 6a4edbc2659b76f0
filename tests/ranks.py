"""A pool of processes, forked once the package is imported, on which distributed tests run.

A test function is a plain function; ``run(function, world_size, *args)`` calls it on that many ranks, with the
environment that torchrun would give, and returns each rank's result.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_RANKS = 4
RUNS_PER_PROCESS = 20
"""Groups that something still refers to keep gloo's threads, which slow down all that follows; so ranks are renewed."""


class RankError(AssertionError):
    """What failed, with the traceback of each rank that did."""


class RankPool:
    """Processes that wait for functions to run."""

    def __init__(self, size: int = MAX_RANKS) -> None:
        self._size = size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._runs = 0

    def start(self) -> None:
        """Fork the processes from a server that has imported the package, and done nothing else.

        Not from this process: tests that made process groups here leave objects whose threads no child has, and a child
        that collects them hangs or crashes.
        """
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def stop(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._connections, self._processes, self._runs = [], [], 0

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """``function(*args)`` on ranks 0 to ``world_size - 1``; the results by rank.

        Raises:
            RankError: a rank raised, died, or did not finish in time.
        """
        results, errors = self.attempt(function, world_size, *args, timeout=timeout)
        if errors:
            raise RankError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())))
        return [results[rank] for rank in range(world_size)]

    def attempt(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        absent: int | None = None,
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """As :meth:`run`, but failures are returned: results and tracebacks by rank.

        Args:
            absent: a rank that gives no result, because the function stops or kills it.
        """
        if self._runs >= RUNS_PER_PROCESS:
            self.stop()
        if not self._processes:
            self.start()
        self._runs += 1
        environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for connection in self._connections[:world_size]:
            connection.send((function, args, environment))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections[:world_size])}
        while set(waiting.values()) - {absent}:
            ready = wait(list(waiting), timeout)
            if not ready:
                for rank in waiting.values():
                    errors[rank] = f"did not finish in {timeout} s\n{self._stack(rank)}"
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    ok, value = connection.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    ok, value = False, f"died with exit code {self._exit_code(rank)}"
                (results if ok else errors)[rank] = value
            if errors:
                timeout = min(timeout, 30.0)  # the others wait for a rank that is gone
        if errors or absent is not None:
            self.stop()
        return results, errors

    def _exit_code(self, rank: int) -> int | None:
        self._processes[rank].join(5)
        return self._processes[rank].exitcode

    def _stack(self, rank: int) -> str:
        path = _stack_file(self._processes[rank].pid)
        os.kill(self._processes[rank].pid, signal.SIGUSR2)
        for _ in range(10):  # a busy machine takes its time
            self._processes[rank].join(0.5)
            if os.path.exists(path) and os.path.getsize(path):
                break
        return Path(path).read_text() if os.path.exists(path) else ""


def _stack_file(pid: int) -> str:
    return os.path.join(tempfile.gettempdir(), f"lightning-megatron-stack-{pid}")


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(connection: Connection, rank: int) -> None:
    # The handler prints where a rank hangs; Lightning's own handlers of other signals stay out of the way.
    stacks = open(_stack_file(os.getpid()), "w")  # noqa: SIM115  (open as long as the process lives)
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            function, args, environment = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", TORCHELASTIC_RUN_ID="tests")
        os.environ["LOCAL_WORLD_SIZE"] = environment["WORLD_SIZE"]
        try:
            result = (True, function(*args))
        except BaseException:
            result = (False, traceback.format_exc())
        _leave_group()
        try:
            connection.send(result)
        except Exception:
            connection.send((False, "the result cannot be sent:\n" + traceback.format_exc()))
        sys.stdout.flush()


def _leave_group() -> None:
    import torch.distributed as dist

    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and state.model_parallel_is_initialized():
        state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # models and strategies hold process groups, and those their threads
