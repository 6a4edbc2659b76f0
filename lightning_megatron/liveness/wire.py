"""Lines of JSON over TCP connections that never block the thread that sends."""

from __future__ import annotations

import json
import os
import socket
import threading
import weakref
from dataclasses import dataclass
from typing import Any

_MAX_LINE = 1 << 16
_OPEN: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    for connection in list(_OPEN):
        connection.close()


# A forked worker of a DataLoader would keep the connection of a killed process open.
os.register_at_fork(after_in_child=_close_in_child)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where rank 0 listens, and the token that a connection must present."""

    host: str
    port: int
    token: str


def listen(host: str) -> socket.socket:
    """A socket that listens on a free port of ``host``, or of all interfaces where ``host`` is not an address of this
    machine (a network that translates addresses)."""
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    try:
        server = socket.create_server((host, 0), family=family, backlog=1024)
    except OSError:
        server = socket.create_server(("", 0), backlog=1024)
    server.setblocking(False)
    _OPEN.add(server)
    return server


class Connection:
    """One TCP connection; any thread may send, one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        _OPEN.add(connection)
        self._socket = connection
        self._lock = threading.Lock()
        self._outgoing = bytearray()
        self._incoming = bytearray()

    @classmethod
    def open(cls, endpoint: Endpoint, timeout: float) -> Connection:
        """Connect to an endpoint.

        Raises:
            OSError: nothing answers there within ``timeout`` seconds.
        """
        return cls(socket.create_connection((endpoint.host, endpoint.port), timeout=timeout))

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any], *, droppable: bool = False) -> None:
        """Send, or queue what the kernel does not take now. A ``droppable`` message is not queued behind others."""
        with self._lock:
            if droppable and self._outgoing:
                self._flush()
                if self._outgoing:
                    return
            self._outgoing += json.dumps(message).encode() + b"\n"
            self._flush()

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError:  # closed by the peer, which `receive` reports
            self._outgoing.clear()

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have arrived, and whether the connection is still open."""
        is_open = True
        try:
            while data := self._socket.recv(1 << 16):
                self._incoming += data
            is_open = False
        except BlockingIOError:
            pass
        except OSError:
            is_open = False
        *lines, rest = bytes(self._incoming).split(b"\n")
        self._incoming = bytearray(rest)
        if len(rest) > _MAX_LINE:
            return [], False
        try:
            messages = [json.loads(line) for line in lines if line]
        except ValueError:  # not one of our processes
            return [], False
        return [message for message in messages if isinstance(message, dict)], is_open

    def close(self) -> None:
        """Close the connection; what was sent still arrives."""
        _OPEN.discard(self._socket)
        self.receive()  # closing with unread data would reset the connection
        self._socket.close()
