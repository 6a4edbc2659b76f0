"""Process groups as torch keeps them."""

from __future__ import annotations

from torch.distributed import distributed_c10d


def abort_all() -> None:
    """Make every collective of this process fail at once, those that other threads wait in included.

    torch lists the groups of a process in a private table alone, and a thread that hangs may be in any of them.
    """
    for group in list(distributed_c10d._world.pg_map):
        group.abort()
