"""Writes tensors to one file, sums them once, and reads them back while writing goes on."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from lightning_megatron.errors import CheckpointError

_LARGE = 1 << 16


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of shards: its size, its checksum, and where each shard of it lies, in order."""

    name: str
    size: int
    crc32: int
    ends: tuple[int, ...]
    """End of each shard; the first starts at 0."""
    crcs: tuple[int, ...]
    """CRC-32 of the values of each shard."""


def write_file(path: Path, tensors: Iterable[Tensor]) -> WrittenFile:
    """Write tensors one after the other, to the disk and not only to its cache, and read them back.

    Raises:
        CheckpointError: they read back differently.
    """
    ends, crcs = [], []
    with ExitStack() as stack:
        file = _VerifiedFile(path, stack)
        # torch would sum all values too. The switch is the process's: a file that another thread saves meanwhile may
        # lack the sums inside it, which torch.load does not look at.
        stack.callback(set_crc32_options, get_crc32_options())
        set_crc32_options(False)
        for tensor in tensors:
            torch.save(_alone(tensor), file)  # type: ignore[arg-type]
            ends.append(file.size)
            crcs.append(zlib.crc32(_bytes(tensor)) if file.values is None else file.values)
            file.values = None
        file.finish()
        return WrittenFile(path.name, file.size, file.crc32, tuple(ends), tuple(crcs))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in host memory of its own: torch.save writes all memory that a view looks at."""
    tensor = tensor.detach()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return (
        tensor if whole and tensor.device.type == "cpu" else tensor.cpu().clone(memory_format=torch.contiguous_format)
    )


def _bytes(tensor: Tensor) -> bytes:
    return _alone(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()


class _VerifiedFile:
    """A file to write to. A second thread sums and reads back what the first writes.

    Both threads are outside of Python most of the time, so that with two cores verification costs little.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.size = 0
        self.crc32 = 0
        self.values: int | None = None
        """Sum of the last large piece, which is the values of a tensor."""
        self._path = path
        self._file = stack.enter_context(open(path, "wb", buffering=0))  # noqa: SIM115
        self._reader = stack.enter_context(open(path, "rb", buffering=0))  # noqa: SIM115
        self._follower = stack.enter_context(ThreadPoolExecutor(1))
        self._buffer = memoryview(bytearray(1 << 20))
        self._read = 0
        self._read_crc32 = 0

    def write(self, data: Any) -> int:
        """Write all of ``data``, whose memory is the caller's again afterwards."""
        data = memoryview(data).cast("B")
        if len(data) < _LARGE:
            self.crc32 = zlib.crc32(data, self.crc32)
            self._write(data)
        else:
            following = self._follower.submit(self._follow, data, self.size)
            try:
                self._write(data)
            finally:
                following.result()
        return len(data)

    def flush(self) -> None:
        """Nothing: there is no buffer."""

    def _write(self, data: memoryview) -> None:
        while data:  # the system writes at most 2 GiB at a time
            written = self._file.write(data)
            self.size += written
            data = data[written:]

    def _follow(self, data: memoryview, until: int) -> None:
        self.values = zlib.crc32(data)
        self.crc32 = crc32_of_both(self.crc32, self.values, len(data))
        self._read_back(until)

    def _read_back(self, until: int) -> None:
        while self._read < until:
            count = self._reader.readinto(self._buffer[: until - self._read])
            if not count:
                return
            self._read_crc32 = zlib.crc32(self._buffer[:count], self._read_crc32)
            self._read += count

    def finish(self) -> None:
        """Let it reach the disk.

        Raises:
            CheckpointError: it reads back differently from what was written.
        """
        os.fsync(self._file.fileno())
        self._read_back(self.size)
        if (self._read, self._read_crc32) != (self.size, self.crc32):
            raise CheckpointError(f"{self._path} reads back differently from what was written: the storage is faulty.")


def crc32_of_both(first: int, second: int, second_size: int) -> int:
    """The CRC-32 of two pieces one after the other, from those of each.

    Appending a zero byte to a message is a linear map of its sum over GF(2); appending ``second_size`` of them is a
    product of that map's powers of two.
    """
    power = 0
    while second_size:
        if second_size & 1:
            first = _apply(_append_zeros(power), first)
        second_size >>= 1
        power += 1
    return first ^ second


@cache
def _append_zeros(power: int) -> tuple[int, ...]:
    """Images of the 32 bits under appending ``2**power`` zero bytes."""
    if power == 0:
        rows: tuple[int, ...] = (0xEDB88320, *(1 << bit for bit in range(31)))  # one zero bit
        for _ in range(3):
            rows = tuple(_apply(rows, row) for row in rows)
        return rows
    half = _append_zeros(power - 1)
    return tuple(_apply(half, row) for row in half)


def _apply(rows: tuple[int, ...], value: int) -> int:
    result = 0
    for row in rows:
        if not value:
            break
        if value & 1:
            result ^= row
        value >>= 1
    return result
