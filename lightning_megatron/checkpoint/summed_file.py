"""Writes tensors to one file and sums each byte once."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from lightning_megatron.checkpoint.metadata import FileSum
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


def write_file(path: Path, tensors: Iterable[Tensor], *, read_back: bool = False) -> WrittenFile:
    """Write tensors one after the other, to the disk and not only to its cache.

    Args:
        read_back: read the file from the disk again and compare.

    Raises:
        CheckpointError: it is not what was written.
    """
    ends, crcs = [], []
    with path.open("wb", buffering=0) as opened, _without_inner_sums():
        file = _SummedFile(opened)
        for tensor in tensors:
            alone = _alone(tensor)
            try:
                torch.save(alone, file)  # type: ignore[arg-type]
            except RuntimeError as error:
                if file.error is not None:  # torch only tells that the file ends where it should not
                    raise file.error from error
                raise
            ends.append(file.size)
            crcs.append(file.large if alone.nbytes >= _LARGE else zlib.crc32(_bytes(alone)))
        os.fsync(opened.fileno())
        if read_back:
            # What is only in the cache would tell nothing about the disk.
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (size := path.stat().st_size) != file.size:
        raise CheckpointError(f"{path} has {size} bytes, but {file.size} were written.")
    if read_back and FileSum.of(path).crc32 != file.crc32:
        raise CheckpointError(f"{path} reads back differently from what was written: the storage is faulty.")
    return WrittenFile(path.name, file.size, file.crc32, tuple(ends), tuple(crcs))


@contextmanager
def _without_inner_sums() -> Iterator[None]:
    """Let torch.save not sum all values a second time.

    The switch is the process's: what another thread saves meanwhile may lack the sums inside it, which torch.load does
    not look at.
    """
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in host memory of its own: torch.save writes all memory that a view looks at."""
    tensor = tensor.detach()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return (
        tensor if whole and tensor.device.type == "cpu" else tensor.cpu().clone(memory_format=torch.contiguous_format)
    )


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class _SummedFile:
    """A file to write to that sums what goes through: all of it, and the last large piece by itself."""

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self.size = 0
        self.crc32 = 0
        self.large = 0
        """Sum of the last large piece: headers are small, so it is the values of a tensor."""
        self.error: OSError | None = None
        """Why a write failed."""

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        length = len(data)
        if length >= _LARGE:
            self.large = zlib.crc32(data)
            self.crc32 = crc32_of_both(self.crc32, self.large, length)
        else:
            self.crc32 = zlib.crc32(data, self.crc32)
        try:
            while data:  # the system writes at most 2 GiB at a time
                data = data[self._file.write(data) :]
        except OSError as error:
            self.error = self.error or error
            raise
        self.size += length
        return length

    def flush(self) -> None:
        """Nothing: there is no buffer."""


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
