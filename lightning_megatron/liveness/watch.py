"""Watch the other ranks of a run, and free this one from its collectives when one of them is gone.

Every rank keeps one TCP connection to rank 0. The kernel closes the connection of a process that dies, however it
dies, so rank 0 learns of it at once and tells the others; if rank 0 dies, all of them see it. A rank that raises
announces its error before it leaves. Only a closed connection, an announced error, or silence for as long as a
collective may wait count: a rank that compiles or stands in a debugger keeps its connection, and its thread answers.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import secrets
import selectors
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.util import get_temp_dir
from typing import Any

from lightning_megatron.liveness.wire import Connection, Endpoint, listen

logger = logging.getLogger(__name__)

EXIT_CODE = 70
"""``EX_SOFTWARE``: what a process exits with that could not be freed from a collective."""
_SHOWN = 16
_INTERVAL = 1.0
"""Seconds between two signs of life."""
_SILENT = 6.0
"""Seconds after which a rank counts as the one that does not answer, once a collective has failed."""
_CONNECTING = 45.0
"""Seconds in which every rank must have connected to rank 0."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that the parts of an orderly end may take; together less than a minute."""

    lost: float = 1.0
    """After the death of a rank, until this one is freed: its own collective may fail first."""
    failed: float = 5.0
    """After an announced error, which other ranks may raise as well."""
    saving: float = 25.0
    """After an announced error, while a checkpoint is being written in the background."""
    exit: float = 20.0
    """After this rank was freed, until its process is ended."""
    explanation: float = 3.0
    """That a failed collective waits to learn which rank is gone."""


@dataclass(slots=True)
class _Peer:
    """What is known of another rank."""

    heard: float
    connection: Connection | None = None
    step: int = 0
    where: str = ""
    acknowledged: bool = False
    left: bool = False
    silent: bool = False
    """Reported as one that does not answer."""


def innermost_line(thread: int) -> str:
    """The function and line of Python that a thread is at."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    code = frame.f_code
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"


class PeerWatch:
    """The connections of this rank, and the thread that reads them.

    Args:
        timeout: seconds of silence after which a rank counts as stopped, as for a collective.
        abort: makes the collectives of this process fail.
        step: optimizer steps so far.
        is_saving: whether this process writes a checkpoint in the background.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        timeout: float,
        abort: Callable[[], None],
        step: Callable[[], int] = lambda: 0,
        is_saving: Callable[[], bool] = lambda: False,
        patience: Patience | None = None,
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.patience = patience or Patience()
        self.stop_requested = False
        """Set by a signal handler of any rank: all ranks are to stop at the same step."""
        self.stop_at: int | None = None
        """The batch at which all ranks stop, once rank 0 has chosen it."""
        self.verdict: str | None = None
        """Which rank is gone, and why."""
        self._abort, self._step, self._is_saving = abort, step, is_saving
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._token = ""
        self._unknown: dict[Connection, float] = {}
        now = time.monotonic()
        ranks = range(1, world_size) if rank == 0 else (0,)
        self._peers = {peer: _Peer(heard=now) for peer in ranks}
        self._owner = threading.get_ident()
        self._leaving, self._decided, self._all_left = threading.Event(), threading.Event(), threading.Event()
        self._requested_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    # ------------------------------------------------------------------ connecting

    def listen(self, host: str) -> Endpoint:
        """Accept connections from now on; on rank 0."""
        self._server = listen(host)
        self._token = secrets.token_hex(16)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread.start()
        return Endpoint(host, self._server.getsockname()[1], self._token)

    def connect(self, endpoint: Endpoint, timeout: float) -> None:
        """Connect to rank 0; on the others.

        Raises:
            OSError: rank 0 does not answer.
        """
        connection = Connection.open(endpoint, timeout)
        connection.send({"rank": self.rank, "token": endpoint.token})
        self._peers[0].connection = connection
        self._selector.register(connection, selectors.EVENT_READ)
        self._thread.start()

    def wait_until_connected(self) -> None:
        """On rank 0, until all others have connected, or one that never does is given up."""
        while not all(peer.connection or peer.left for peer in self._peers.values()):
            time.sleep(0.005)

    # --------------------------------------------------------------------- leaving

    def fail(self, text: str) -> None:
        """Announce that this rank has failed, and leave."""
        if not self._leaving.is_set():
            self._tell({"failed": {"rank": self.rank, "text": text, "step": self._step()}})
        self.close()

    def close(self) -> None:
        """Leave: the end of this rank means nothing to the others from now on."""
        if self._leaving.is_set():
            return
        self._tell({"bye": True})
        last = self._step()
        # Rank 0's thread goes on, and must not keep the Trainer, whose modules refer to the process groups.
        self._step, self._is_saving = (lambda: last), (lambda: False)
        self._leaving.set()
        if self.rank:
            self._thread.join(2 * _INTERVAL)  # rank 0's goes on until all have left

    def wait_until_left(self, timeout: float) -> bool:
        """Whether all other ranks leave or die within ``timeout`` seconds; on rank 0."""
        return self._all_left.wait(timeout)

    def explain(self, *, collective_failed: bool) -> str | None:
        """Why the collectives of this rank fail, if another rank is the reason.

        Args:
            collective_failed: one has, so the reason may be about to arrive.
        """
        if collective_failed and not self._leaving.is_set():
            self._decided.wait(self.patience.explanation)
        return self.verdict

    # ----------------------------------------------------------- stopping together

    def choose_stop(self, batch: int) -> None:
        """On rank 0, before ``batch``: let all ranks stop at the next, if any was asked to."""
        if self.rank or not self.stop_requested or self.stop_at is not None:
            return
        self.stop_at = batch + 1
        self._tell({"stop": self.stop_at})
        deadline = time.monotonic() + self.patience.failed
        while time.monotonic() < deadline and not all(peer.acknowledged or peer.left for peer in self._peers.values()):
            time.sleep(0.01)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        ticked = 0.0
        while not self._finished():
            for key, _ in self._selector.select(0.05 if self._leaving.is_set() else _INTERVAL / 4):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
            if time.monotonic() - ticked >= _INTERVAL:
                ticked = time.monotonic()
                self._tick(ticked)
        for connection in [*self._unknown, *(peer.connection for peer in self._peers.values())]:
            if connection is not None:
                connection.close()
        if self._server is not None:
            self._server.close()
        self._selector.close()

    def _finished(self) -> bool:
        if not self._leaving.is_set():
            return False
        if all(peer.left for peer in self._peers.values()):
            self._all_left.set()
        # A rank that was reported as silent may be stopped for ever; if it goes on, the closed connection tells it.
        return bool(self.rank) or all(peer.left or peer.silent for peer in self._peers.values())

    def _accept(self) -> None:
        assert self._server is not None
        try:
            connection = Connection(self._server.accept()[0])
        except OSError:
            return
        self._unknown[connection] = time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: Connection) -> None:
        messages, is_open = connection.receive()
        if connection in self._unknown and messages and not self._welcome(connection, messages.pop(0)):
            is_open, messages = False, []
        rank = next((rank for rank, peer in self._peers.items() if peer.connection is connection), None)
        for message in messages if rank is not None else ():
            self._handle(rank, message)  # type: ignore[arg-type]
        if not is_open:
            self._selector.unregister(connection)
            self._unknown.pop(connection, None)
            connection.close()
            if rank is not None:
                self._closed(rank)

    def _welcome(self, connection: Connection, message: dict[str, Any]) -> bool:
        del self._unknown[connection]
        peer = self._peers.get(message.get("rank", -1))
        if peer is None or peer.connection or not secrets.compare_digest(str(message.get("token")), self._token):
            return False
        peer.connection, peer.heard = connection, time.monotonic()
        return True

    def _handle(self, rank: int, message: dict[str, Any]) -> None:
        peer = self._peers[rank]
        peer.heard = time.monotonic()
        if "step" in message:
            peer.step, peer.where = message["step"], message["where"]
        if message.get("stop_requested"):
            self.stop_requested = True
        if "stop" in message:
            self.stop_at = message["stop"]
            self._tell({"acknowledged": True})
        if message.get("acknowledged"):
            peer.acknowledged = True
        if message.get("bye"):
            peer.left = True
        if "failed" in message:
            failed = message["failed"]
            self._decide(self._describe(**failed), announced=True)
        if "lost" in message:
            self._decide(message["lost"], announced=message["announced"])

    def _closed(self, rank: int) -> None:
        peer = self._peers[rank]
        peer.connection = None
        if not peer.left:
            peer.left = True
            self._decide(
                f"Rank {rank} has died: its process ended without an error. Its last step was {peer.step}. Look at "
                "that rank's own output, and for a kill by the system (out of memory) or the scheduler.",
                announced=False,
            )

    def _tick(self, now: float) -> None:
        beat = {"step": self._step(), "where": innermost_line(self._owner), "stop_requested": self.stop_requested}
        for peer in self._peers.values():
            if peer.connection is not None and not self._leaving.is_set():
                peer.connection.send(beat, droppable=True)
        for connection in [known for known, since in self._unknown.items() if now - since > _SILENT]:
            self._selector.unregister(connection)
            del self._unknown[connection]
            connection.close()
        silent = [
            rank
            for rank, peer in self._peers.items()
            if not peer.left and now - peer.heard > (self.timeout if peer.connection else _CONNECTING)
        ]
        if silent:
            self._decide(self._silence(silent), announced=False)
            for rank in silent:  # who has never connected never says goodbye
                self._peers[rank].silent = True
                self._peers[rank].left |= self._peers[rank].connection is None
        if self.stop_requested and not self._leaving.is_set():
            self._requested_since = self._requested_since or now
            if now - self._requested_since > self.patience.saving:
                self._decide(
                    f"A signal asked the run to stop, but no batch ended for {self.patience.saving:g} s. "
                    f"The last step was {self._step()}.",
                    announced=False,
                )

    # ----------------------------------------------------------------- the verdict

    def _describe(self, rank: int, text: str, step: int) -> str:
        """What a failure means that a rank announced: its own, or of a collective in which another did not answer."""
        told = f"Rank {rank} failed after step {step}: {text}"
        if not is_of_collective(text):
            return told
        now = time.monotonic()
        silent = [peer for peer, known in self._peers.items() if not known.left and now - known.heard > _SILENT]
        if silent:
            return f"{self._silence(silent)}\n{told}"
        return "\n".join([told, *self._table()])

    def _silence(self, ranks: list[int]) -> str:
        now = time.monotonic()
        each = ", ".join(
            f"rank {rank} for {now - self._peers[rank].heard:.0f} s (its last step was {self._peers[rank].step})"
            for rank in ranks[:_SHOWN]
        )
        return f"No sign of life from {each}: the process is stopped, or its machine cannot be reached."

    def _table(self) -> list[str]:
        mine = f"  rank {self.rank}: after step {self._step()}, at {innermost_line(self._owner)}"
        known = sorted(self._peers.items())[:_SHOWN]
        return [mine, *(f"  rank {rank}: after step {peer.step}, at {peer.where}" for rank, peer in known)]

    def _decide(self, verdict: str, *, announced: bool) -> None:
        if self.rank == 0:
            self._tell({"lost": verdict, "announced": announced})
        if self.verdict is not None or self._leaving.is_set():
            return
        self.verdict = verdict
        self._decided.set()
        logger.error("Rank %d: %s", self.rank, verdict)
        threading.Thread(target=self._free, args=(announced,), name="abort", daemon=True).start()

    def _free(self, announced: bool) -> None:
        """Make this rank's collectives fail, unless it leaves by itself; end the process if that does not help."""
        if self._leaving.wait(self.patience.failed if announced else self.patience.lost):
            return
        deadline = time.monotonic() + self.patience.saving
        while announced and self._is_saving() and time.monotonic() < deadline:
            if self._leaving.wait(0.2):
                return
        self._abort()
        if self._leaving.wait(self.patience.exit):
            return
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        logger.error("Rank %d could not be freed from what it waits for, and ends.", self.rank)
        shutil.rmtree(get_temp_dir(), ignore_errors=True)  # what a process that exits in the ordinary way removes
        os._exit(EXIT_CODE)

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            if peer.connection is not None:
                peer.connection.send(message)


_OF_COLLECTIVES = ("gloo", "nccl", "connection", "timed out", "timeout", "process group", "socket", "broken pipe")


def is_of_collective(text: str) -> bool:
    """Whether an error reads like that of a collective, whose reason is another rank."""
    return any(word in text.lower() for word in _OF_COLLECTIVES)
