"""The process groups of this process: when they connect, and how all of them end at once."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_megatron.backends.core import parallel_state
from lightning_megatron.backends.rendezvous import meet_again

_INTERNET = (socket.AF_INET, socket.AF_INET6)
_CONNECTIONS: set[int] = set()
"""Inodes of the sockets that the process groups of this process have opened: torch has no list of them."""
_LETTING_GO = 0.1
"""Seconds in which a thread gets the interpreter's lock on a busy machine too."""


@contextmanager
def recorded() -> Iterator[None]:
    """Record the connections of the groups that are made inside, for :func:`abort_all`.

    What another thread of this process connects meanwhile is taken for one of them.
    """
    before = _internet_sockets()
    try:
        yield
    finally:
        now = _internet_sockets()
        _CONNECTIONS.intersection_update(now)  # those of groups that are gone
        _CONNECTIONS.update(now.keys() - before.keys())


def _internet_sockets() -> dict[int, int]:
    """Inode and descriptor of every TCP connection or listener of this process."""
    found: dict[int, int] = {}
    for name in os.listdir("/dev/fd"):
        try:
            status = os.fstat(int(name))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in _INTERNET and connection.type == socket.SOCK_STREAM:
                    found[status.st_ino] = int(name)
        except OSError:  # closed by now
            continue
    return found


@contextmanager
def connected_when_used() -> Iterator[None]:
    """Groups that are made inside connect their NCCL communicators with their first collective, those never used never.

    Lightning binds the default group to its device, after which torch connects each new group at once. megatron-core
    makes twenty for any layout, most of them unused, and each communicator takes 0.4 GiB of an H100 that torch does not
    account for (8.2 GiB before the first step of a run, now 0.6) and a second at the end of the process.

    Also for groups of the host: while the default group is bound, ranks outside of a new group take part in a split of
    its NCCL communicator (torch 2.11), which those in a group of gloo never join.
    """
    default = dist.group.WORLD
    assert default is not None
    bound, default.bound_device_id = default.bound_device_id, None
    try:
        yield
    finally:
        default.bound_device_id = bound


def leave_at_exit() -> None:
    """End the groups of gloo once the process is done, while there still is an interpreter.

    A thread of gloo lets go of a tensor after the collective has returned, for which it needs the interpreter's lock.
    On a busy machine that can be when the interpreter ends, and C++ calls it a crash: "terminate called without an
    active exception", exit code -6, after everything went well (https://github.com/pytorch/pytorch/pull/179291, torch
    2.11). A group that nothing refers to waits for its threads before it goes.
    """
    stay_at_exit()
    atexit.register(_leave)


def stay_at_exit() -> None:
    """After a failure: other ranks may never join what a thread waits in, and learn of it as this process ends."""
    atexit.unregister(_leave)


def _leave() -> None:
    if not dist.is_initialized():
        return
    groups = [weakref.ref(group) for group in distributed_c10d._world.pg_map]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()  # a Trainer and its modules refer to each other, and to the groups
    if any(group() is not None for group in groups):  # a script's own variable keeps its Trainer
        time.sleep(_LETTING_GO)


def all_arrive(event: str, timeout: timedelta) -> bool:
    """Whether all ranks say within ``timeout`` that they have come to ``event``, a name that no other call has.

    Without a collective, in which a rank would go on waiting: torch's monitored barrier has a time-out on rank 0 alone
    (torch 2.11). The store of the default group, of which torch has no public name, lets each rank stop waiting.
    """
    store = distributed_c10d._get_default_store()
    keys = [f"lightning_megatron/{event}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], "here")
    try:
        store.wait(keys, timeout)
    except dist.DistError:
        return False
    return True


def abort_all() -> None:
    """Make every collective of this process fail, those included that a thread waits in. Nothing works after that.

    torch lists the groups of a process in a private table alone, and a thread that hangs may be in any of them. NCCL's
    can be aborted; gloo's say so too, but go on waiting (torch 2.11), and a receive has no time-out either. What does
    end them is the end of their connections, so those that were made inside :func:`recorded` are shut, and no other.
    """
    for group in list(distributed_c10d._world.pg_map):
        group.abort()
    for inode, descriptor in _internet_sockets().items():
        if inode in _CONNECTIONS:
            _shut(descriptor)


def end_all(address: str, port: int) -> None:
    """End all groups of this process after a failure, so that its next run makes new ones at the same address.

    A rank may have failed between the two halves of an exchange, of which another run would then take the rest for its
    own. Ranks that have not failed notice by :func:`all_are_connected`.
    """
    release_recorded()
    store = distributed_c10d._get_default_store()
    abort_all()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    _CONNECTIONS.clear()
    stay_at_exit()
    meet_again(address, port, store)


def all_are_connected() -> bool:
    """Whether the default group still works on every rank; all of them ask at the same time.

    NCCL's has no connections that a failed rank would have closed: there it is true.
    """
    if dist.get_backend() != "gloo":
        return True
    try:
        dist.barrier()
    except RuntimeError:
        return False
    return True


def _shut(descriptor: int) -> None:
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
    except OSError:  # no socket, or closed by now
        return
    with connection:
        try:
            connection.getpeername()
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # a socket that only listens
            return


class Releasable(Protocol):
    """What holds collectives in CUDA graphs."""

    def release(self) -> None:
        """Drop the graphs."""
        ...


_recorded: weakref.WeakSet[Releasable] = weakref.WeakSet()


def release_before_groups_end(owner: Releasable) -> None:
    """Have the graphs of ``owner`` dropped at the end of the process, or by :func:`release_recorded` before.

    NCCL's communicators wait for graphs that hold their kernels (https://github.com/pytorch/pytorch/issues/115388).
    Lightning ends the groups at the end of the process by a function that it registered before; later ones run earlier.
    """
    if not _recorded:
        atexit.unregister(release_recorded)
        atexit.register(release_recorded)
    _recorded.add(owner)


def release_recorded() -> None:
    """Drop every CUDA graph that holds a collective; call it before ending the process groups."""
    owners = list(_recorded)
    if owners and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    for owner in owners:
        owner.release()
