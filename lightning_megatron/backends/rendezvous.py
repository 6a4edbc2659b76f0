"""Where the ranks of a run meet: no port for one process, the loopback for one machine."""

from __future__ import annotations

import atexit
import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lightning_megatron.errors import RendezvousError

_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class _Ended:
    """What is left of a run whose process groups have ended by a failure."""

    meetings: int
    """How often its ranks have met at this address."""
    server: dist.Store | None
    """The store that this process serves there. It stays: a rank that is early would reach a server that is about to
    end."""


_ended: dict[tuple[str, int], _Ended] = {}


def meet(
    address: str, port: int, rank: int, world_size: int, *, timeout: timedelta, connect_timeout: timedelta
) -> dist.Store:
    """The store through which the process groups of this run are made; for more than one process.

    torch's own server listens on all interfaces. For a loopback address, rank 0 gives it a socket that listens there
    alone. Under torchrun the store is the agent's. After :func:`meet_again` the server is the one before, and the keys
    are others.

    Args:
        timeout: how long rank 0 waits for the others, and what asks the store later waits.
        connect_timeout: how long the others try to reach rank 0.

    Raises:
        RendezvousError: nothing answers at the address, or other ranks do not come.
    """
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    before = _ended.get((address, port))
    store: dist.Store
    try:
        if rank == 0 and not of_agent and before is None:
            listener = _loopback_listener(address, port)
            if listener is None:
                store = next(rendezvous(f"tcp://{_in_url(address)}:{port}", rank, world_size, timeout=timeout))[0]
            else:
                store = dist.TCPStore(
                    address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach()
                )
        else:
            store = dist.TCPStore(address, port, world_size, is_master=False, timeout=min(timeout, connect_timeout))
    except RuntimeError as error:
        if rank == 0:
            raise RendezvousError(
                f"Rank 0 waited at {address}:{port} for the {world_size} ranks of this run: {error} Start all of them, "
                "with the same address and port, or raise the strategy's timeout."
            ) from error
        raise RendezvousError(
            f"Rank {rank} found no rank 0 at {address}:{port} within {min(timeout, connect_timeout).total_seconds():g} "
            "s. Check MASTER_ADDR and MASTER_PORT, that rank 0 has started, and that no firewall is between the two; "
            "where ranks start further apart, raise the strategy's connect_timeout."
        ) from error
    store.set_timeout(timeout)
    return store if before is None else dist.PrefixStore(f"meeting {before.meetings}", store)


def meet_again(address: str, port: int, store: dist.Store) -> None:
    """Let the ranks of this process's next run meet at the same address, after their groups have ended.

    Args:
        store: through which those groups were made; the server is kept by it.
    """
    ended = _ended.pop((address, port), None)
    if ended is None and _ended:
        _ended.clear()  # of runs at other addresses
    if ended is None:
        ended = _Ended(0, store)
        atexit.register(_ended.clear)
    ended.meetings += 1
    _ended[address, port] = ended


def serve(address: str, timeout: timedelta) -> dist.TCPStore:
    """A store on a free port, besides that of the run; on the loopback alone if ``address`` is one."""
    listener = _loopback_listener(address, 0)
    if listener is None:
        return dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
    )


def stay_on_loopback(address: str | None) -> None:
    """Let gloo's groups listen on the loopback interface, if all ranks meet there (``None`` is one process).

    Otherwise gloo looks this machine's name up, and listens on the address that it finds. ``GLOO_SOCKET_IFNAME``, the
    variable that torch reads for this, stays as the user has set it.
    """
    if _INTERFACE in os.environ or not (address is None or is_loopback(address)):
        return
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ[_INTERFACE] = names[0]


def is_loopback(address: str) -> bool:
    """Whether an address or a host name is of this machine alone."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a host name, which may reach other machines
        return False


def _loopback_listener(address: str, port: int) -> socket.socket | None:
    if not is_loopback(address):
        return None
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=2048)
    except OSError:  # a store of this process that is still in use there, which torch shares
        return None


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address
