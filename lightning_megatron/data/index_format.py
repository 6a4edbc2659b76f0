"""Layout of Megatron's `.idx` files, and the check of every number in one.

The layout is described in :mod:`lightning_megatron.data.indexed`.
"""

import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.errors import DataError

PathLike = str | os.PathLike[str]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.number[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
DTYPE_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
REMEDY = "Copy both files of the dataset again, or preprocess the text again."
# Files up to this size are checked whole whenever they are opened, which takes a few milliseconds.
ALWAYS_CHECKED = 16 << 20
# Sequences checked at a time, so that the check takes little memory for an index of any size.
_CHUNK = 1 << 20
_READ_BYTES = 1 << 20


def bin_path(prefix: PathLike) -> Path:
    """Path of the token file of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: PathLike) -> Path:
    """Path of the index file of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.idx")


def regular_file(path: Path) -> os.stat_result | None:
    """Status of a regular file or a link to one, None if nothing is there.

    Raises:
        DataError: Something else is there, or it cannot be examined. Opening a pipe, for instance, would block.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"{path} cannot be examined ({error.strerror}): correct the path or its permissions."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "pipe, socket or device"
        raise DataError(f"{path} is a {kind}, needed a regular file: correct the path, or remove it.")
    return status


Identity = tuple[int, int, int, int]


def file_identity(status: os.stat_result) -> Identity:
    """Size, inode and times; the time of change also tells a file whose modification time was set back."""
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True, eq=False)
class Index:
    """Contents of an `.idx` file, mapped into memory."""

    path: Path
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    """`[sequences]` tokens of each sequence."""
    pointers: NDArray[np.int64]
    """`[sequences]` byte at which each sequence begins."""
    boundaries: NDArray[np.int64]
    """`[documents + 1]` first sequence of each document."""

    @classmethod
    def map(cls, path: Path) -> "Index":
        """Check the header against the file's size and map the arrays behind it.

        Raises:
            DataError: A header that is damaged, or a file that is truncated or too long.
        """
        size = path.stat().st_size
        dtype, num_sequences, num_boundaries = _read_header(path, size)
        data: NDArray[np.uint8] = np.memmap(path, mode="r", dtype=np.uint8)
        start = HEADER.size
        lengths: NDArray[np.int32] = np.frombuffer(data, np.int32, num_sequences, start)
        start += lengths.nbytes
        pointers: NDArray[np.int64] = np.frombuffer(data, np.int64, num_sequences, start)
        start += pointers.nbytes
        return cls(path, dtype, lengths, pointers, np.frombuffer(data, np.int64, num_boundaries, start))

    def check(self, bin_bytes: int) -> None:
        """Check every length, offset and boundary, given the size of the `.bin`.

        Raises:
            DataError: A number that no writer produces, or a `.bin` of another size than the lengths add up to.
        """
        end = self._check_sequences()
        if end != bin_bytes:
            raise DataError(
                f"{self.path.with_suffix('.bin')} does not belong to its index {self.path.name}: the index describes "
                f"{end} bytes, the file has {bin_bytes}. One of them was truncated, damaged or replaced. {REMEDY}"
            )
        self._check_boundaries()

    def _check_sequences(self) -> int:
        """Check lengths and offsets; returns where the last sequence ends."""
        end = 0
        for first in range(0, len(self.lengths), _CHUNK):
            lengths = self.lengths[first : first + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                bad = int(np.argmax(lengths < 0))
                raise self._damage(f"sequence {first + bad} has the length {lengths[bad]}, needed 0 or more")
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            starts = ends - lengths * self.dtype.itemsize
            differs = starts != self.pointers[first : first + _CHUNK]
            if differs.any():
                bad = int(np.argmax(differs))
                raise self._damage(
                    f"sequence {first + bad} begins at byte {self.pointers[first + bad]}, the lengths before it add up "
                    f"to {starts[bad]}"
                )
            end = int(ends[-1])
        return end

    def _check_boundaries(self) -> None:
        sequences, boundaries = len(self.lengths), self.boundaries
        if not len(boundaries):
            raise self._damage("it has no document boundary, needed at least one")
        if boundaries[0] != 0 or boundaries[-1] != sequences:
            raise self._damage(
                f"its documents cover the sequences {boundaries[0]} to {boundaries[-1]}, needed 0 to {sequences}"
            )
        for first in range(0, len(boundaries) - 1, _CHUNK):
            falls = np.diff(boundaries[first : first + _CHUNK + 1]) < 0
            if falls.any():
                bad = first + int(np.argmax(falls))
                raise self._damage(
                    f"document {bad} begins at sequence {boundaries[bad]} and the next one at {boundaries[bad + 1]}, "
                    "needed an ascending order"
                )

    def _damage(self, what: str) -> DataError:
        return DataError(f"{self.path} is damaged: {what}. {REMEDY}")


def _read_header(path: Path, size: int) -> tuple[np.dtype[Any], int, int]:
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{path} is truncated: {size} bytes, {HEADER.size} needed for its header. {REMEDY}")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION or code not in DTYPES:
        raise DataError(
            f"{path} is not a Megatron index: magic {magic!r}, version {version}, dtype code {code}; needed "
            f"{MAGIC!r}, {VERSION}, and 1 to {max(DTYPES)}. {REMEDY}"
        )
    needed = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    # Multimodal files append one int8 mode a sequence; training on text ignores them.
    if size not in (needed, needed + num_sequences):
        raise DataError(
            f"{path} is damaged: {num_sequences} sequences and {num_boundaries} document boundaries need "
            f"{needed} bytes, the file has {size}. {REMEDY}"
        )
    return np.dtype(DTYPES[code]), num_sequences, num_boundaries


def file_crc32(path: Path) -> int:
    """CRC-32 of a whole file, read in pieces."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc
