"""Numbers for the progress bar that cost no wait for the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class LateScalar:
    """The newest value of a scalar that the host can have without waiting for the device.

    Lightning reads what is logged with ``prog_bar=True`` in every step, whether a bar is there or not. To read a value
    that the device has still to compute would empty its queue each time. On a GPU the value is therefore one of a step
    or two ago; on a CPU it is the present one.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._latest: Tensor | None = None

    def update(self, value: Tensor) -> Tensor | None:
        """Take note of a value, shape ``[]``.

        Returns:
            The newest that has arrived, on the CPU; ``None`` if none has yet.
        """
        if not value.is_cuda:
            return value.detach()
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event))
        while self._pending and self._pending[0][1].query():
            self._latest = self._pending.popleft()[0]
        return self._latest
