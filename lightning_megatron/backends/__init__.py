"""Where megatron-core runs, and with which kernels. The only part of the package that touches its internals."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_megatron.backends.inventory import Kernel


def report() -> list[Kernel]:
    """Which implementation runs each part of a step on this machine, and why that one.

    Imports the package's models, and so megatron-core.
    """
    from lightning_megatron.backends import inventory  # here, or importing any backend would import what it imports

    return inventory.report()
