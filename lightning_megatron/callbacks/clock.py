"""Moments of a device's work, compared without making the host wait for it."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Moment(Protocol):
    """A point in the order of a device's work."""

    def reached(self) -> bool:
        """Whether the device has come here."""
        ...

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier moment, once both are reached."""
        ...


class _HostMoment:
    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def reached(self) -> bool:
        return True

    def since(self, earlier: Moment) -> float:
        assert isinstance(earlier, _HostMoment)
        return self._seconds - earlier._seconds


class _CudaMoment:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def reached(self) -> bool:
        return self._event.query()

    def since(self, earlier: Moment) -> float:
        assert isinstance(earlier, _CudaMoment)
        return earlier._event.elapsed_time(self._event) / 1e3


def now(device: torch.device) -> Moment:
    """This moment on ``device``: of CUDA's current stream, or of the host for a CPU."""
    return _CudaMoment() if device.type == "cuda" else _HostMoment()
