"""What ranks learn of each other: three watches in one process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest import mock

from lightning_megatron.liveness import PeerWatch, watch
from lightning_megatron.liveness.lightning import blame
from lightning_megatron.liveness.watch import Patience

QUICK = Patience(lost=0.1, failed=0.2, saving=0.5, exit=5.0, explanation=1.0)


@contextmanager
def three(**options: object) -> Iterator[tuple[list[PeerWatch], list[threading.Event]]]:
    """Ranks 0, 1 and 2, and whether the collectives of each were aborted."""
    aborted = [threading.Event() for _ in range(3)]
    arguments = {"timeout": 60.0, "step": lambda: 7, "patience": QUICK, **options}
    with mock.patch.object(watch, "_INTERVAL", 0.1), mock.patch.object(watch, "_SILENT", 0.5):
        watches = [PeerWatch(rank, 3, abort=aborted[rank].set, **arguments) for rank in range(3)]  # type: ignore[arg-type]
        endpoint = watches[0].listen("127.0.0.1")
        for other in watches[1:]:
            other.connect(endpoint, 5.0)
        watches[0].wait_until_connected()
        until(lambda: all(peer.step == 7 for peer in watches[0]._peers.values()))
        yield watches, aborted
        for each in watches:
            each.close()
        until(lambda: not any(each._thread.is_alive() for each in watches))


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cut(peer: PeerWatch) -> None:
    """What the kernel does when the process of a rank dies."""
    for known in peer._peers.values():
        if known.connection is not None:
            known.connection._socket.shutdown(socket.SHUT_RDWR)


def test_a_death_reaches_all_others() -> None:
    with three() as (watches, aborted):
        watches[2]._decide = lambda *_, **__: None  # type: ignore[method-assign]  # it is dead
        cut(watches[2])
        for rank in (0, 1):
            assert aborted[rank].wait(5.0)
            assert "Rank 2 has died" in str(watches[rank].verdict)
            assert "last step was 7" in str(watches[rank].verdict)


def test_the_death_of_rank_0_reaches_all_others() -> None:
    with three() as (watches, aborted):
        watches[0]._decide = lambda *_, **__: None  # type: ignore[method-assign]
        cut(watches[0])
        for rank in (1, 2):
            assert aborted[rank].wait(5.0)
            assert "Rank 0 has died" in str(watches[rank].verdict)


def test_ranks_that_leave_at_different_times_disturb_no_one() -> None:
    with three() as (watches, aborted):
        watches[0].close()
        time.sleep(0.5)
        assert watches[1].verdict is None
        watches[2]._decide = lambda *_, **__: None  # type: ignore[method-assign]
        cut(watches[2])  # rank 0 still tells the last one
        assert aborted[1].wait(5.0)
        assert "Rank 2 has died" in str(watches[1].verdict)
    assert not aborted[0].is_set()


def test_an_error_reaches_the_others_while_a_save_is_given_time() -> None:
    with three(is_saving=lambda: True) as (watches, aborted):
        began = time.monotonic()
        blame(KeyError("mine"), watches[1], aborted[1].set, None)
        assert not aborted[1].is_set()
        assert aborted[2].wait(5.0)
        assert time.monotonic() - began > QUICK.failed + QUICK.saving
        failure = RuntimeError("[/home/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
        blame(failure, watches[2], aborted[2].set, None)
        assert str(failure).startswith("Rank 1 failed after step 7: KeyError: 'mine'\n")
        assert "[pair.cc:547] Connection closed by peer" in str(failure)


def test_silence_counts_after_the_timeout() -> None:
    with three(timeout=1.0) as (watches, aborted):
        with watches[1]._peers[0].connection._lock:  # type: ignore[union-attr]  # as SIGSTOP would
            assert aborted[2].wait(5.0)
        assert "No sign of life from rank 1 for 1 s (its last step was 7)" in str(watches[2].verdict)


def test_rank_0_does_not_wait_for_a_rank_that_is_stopped() -> None:
    with three(timeout=1.0) as (watches, aborted), watches[1]._peers[0].connection._lock:  # type: ignore[union-attr]
        assert aborted[0].wait(5.0)
        for rank in (0, 2):
            watches[rank].close()
        until(lambda: not watches[0]._thread.is_alive())
        assert not watches[0].wait_until_left(0.0)  # a process that its launcher has to kill


def test_a_failed_collective_names_the_silent_rank() -> None:
    with three() as (watches, _):
        with watches[1]._peers[0].connection._lock:  # type: ignore[union-attr]
            time.sleep(0.8)
            watches[2].fail("RuntimeError: Timed out waiting 1000ms for recv operation")
            until(lambda: watches[0].verdict is not None)
        assert "No sign of life from rank 1" in str(watches[0].verdict)
        assert "Timed out waiting" in str(watches[0].verdict)


def test_all_ranks_stop_at_the_batch_that_rank_0_chooses() -> None:
    with three() as (watches, _):
        watches[2].stop_requested = True
        until(lambda: watches[0].stop_requested)
        watches[0].choose_stop(11)
        assert [each.stop_at for each in watches] == [12] * 3


def test_strangers_are_not_listened_to() -> None:
    with three() as (watches, _):
        server = watches[0]._server
        assert server is not None
        for text in (b'{"rank": 1, "token": "guess"}\n', b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"x" * 70_000):
            with socket.create_connection(server.getsockname(), timeout=5.0) as stranger:
                stranger.sendall(text)
                with suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
        assert watches[0].verdict is None
