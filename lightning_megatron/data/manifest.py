"""Checksums beside an indexed dataset, which Megatron's format has none of.

``PREFIX.manifest.json`` is written with a dataset and belongs to it: copy it along. Datasets of other tools have none
and are read all the same; the first time such an index is found whole, ``PREFIX.checked.json`` records its checksum and
the status of both files. For large datasets the record also spares the next start the check.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_megatron.data.index_format import (
    ALWAYS_CHECKED,
    REMEDY,
    Identity,
    Index,
    PathLike,
    bin_path,
    file_crc32,
    file_identity,
    idx_path,
    regular_file,
)
from lightning_megatron.errors import DataError

BLOCK_BYTES = 16 << 20
_FORMAT = 1
_LARGEST_MANIFEST = 64 << 20
# A file that changed this shortly before a check may change again within the resolution of its time stamp.
_SETTLED_NS = 2_000_000_000


def manifest_path(prefix: PathLike) -> Path:
    """Path of the checksums of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.manifest.json")


def record_path(prefix: PathLike) -> Path:
    """Path of the record that the files of a prefix were found whole."""
    return Path(f"{os.fspath(prefix)}.checked.json")


class BlockChecksums:
    """CRC-32 of a stream of bytes, and of each block of :data:`BLOCK_BYTES` of it."""

    def __init__(self) -> None:
        self._blocks: list[int] = []
        self._filled = self._crc = self.crc32 = self.num_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Append to the stream."""
        view = memoryview(data)
        self.num_bytes += len(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        while view:
            piece, view = view[: BLOCK_BYTES - self._filled], view[BLOCK_BYTES - self._filled :]
            self._crc = zlib.crc32(piece, self._crc)
            self._filled += len(piece)
            if self._filled == BLOCK_BYTES:
                self._blocks.append(self._crc)
                self._filled = self._crc = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """The checksums, the last one of a block that may be shorter."""
        return (*self._blocks, self._crc) if self._filled else tuple(self._blocks)


@dataclass(frozen=True)
class Manifest:
    """Sizes and checksums of the two files of a dataset."""

    idx_bytes: int
    idx_crc32: int
    bin_bytes: int
    bin_crc32: tuple[int, ...]
    """Of each block of :data:`BLOCK_BYTES`."""

    @classmethod
    def load(cls, prefix: PathLike) -> "Manifest | None":
        """Read the manifest of a dataset, None if it has none.

        Raises:
            DataError: It is damaged.
        """
        path = manifest_path(prefix)
        data = _read_json(path, "The dataset is then checked without checksums.")
        if data is None:
            return None
        numbers = [data.get(name) for name in ("format", "block_bytes", "idx_bytes", "idx_crc32", "bin_bytes")]
        blocks = data.get("bin_crc32")
        if (
            not isinstance(blocks, list)
            or not all(type(number) is int and number >= 0 for number in (*numbers, *blocks))
            or numbers[:2] != [_FORMAT, BLOCK_BYTES]
            or len(blocks) != -(-data["bin_bytes"] // BLOCK_BYTES)
        ):
            raise DataError(
                f"{path} is damaged or of another version: its numbers do not describe two files. Copy it again, or "
                "remove it. The dataset is then checked without checksums."
            )
        return cls(data["idx_bytes"], data["idx_crc32"], data["bin_bytes"], tuple(blocks))

    def text(self) -> str:
        """Contents of the manifest's file."""
        return json.dumps({"format": _FORMAT, "block_bytes": BLOCK_BYTES, **vars(self)}) + "\n"

    def check_sizes(self, prefix: PathLike, idx_bytes: int, bin_bytes: int) -> None:
        """Raise DataError unless the files have the sizes that were written."""
        for path, found, written in (
            (idx_path(prefix), idx_bytes, self.idx_bytes),
            (bin_path(prefix), bin_bytes, self.bin_bytes),
        ):
            if found != written:
                raise self._difference(prefix, path, f"the file has {found} bytes, {written} were written")

    def check_idx(self, prefix: PathLike, crc32: int) -> None:
        """Raise DataError unless the index has the checksum that was written."""
        if crc32 != self.idx_crc32:
            raise self._difference(
                prefix, idx_path(prefix), f"its checksum is {crc32:08x}, {self.idx_crc32:08x} was written"
            )

    def blocks(self, prefix: PathLike) -> Iterator[bytes]:
        """The blocks of the `.bin`, each checked.

        Raises:
            DataError: A block has another checksum than was written.
        """
        path = bin_path(prefix)
        with path.open("rb") as file:
            for number, written in enumerate(self.bin_crc32):
                block = file.read(BLOCK_BYTES)
                if (found := zlib.crc32(block)) != written:
                    start = number * BLOCK_BYTES
                    end = start + len(block)
                    raise self._difference(
                        prefix,
                        path,
                        f"bytes {start} to {end} have the checksum {found:08x}, {written:08x} was written",
                    )
                yield block

    @staticmethod
    def _difference(prefix: PathLike, path: Path, what: str) -> DataError:
        manifest = manifest_path(prefix)
        return DataError(
            f"{path} is not the file that {manifest.name} describes: {what}. It was damaged or replaced. {REMEDY} If "
            f"another tool wrote the dataset anew, remove {manifest}."
        )


def checked_index(prefix: PathLike, *, whole: bool = False) -> tuple[Index, int]:
    """Open the index of a dataset and check it and the size of the `.bin`.

    Every number of the index is checked, and its checksum where one is known. A large index is not checked again while
    the record beside it says that this file was found whole. A small `.bin` is checked against the manifest as well.

    Args:
        prefix: Path without `.bin` and `.idx`.
        whole: Check whatever the record says, the `.bin` at any size.

    Returns:
        The index, and the CRC-32 of its file.

    Raises:
        DataError: A file is missing or no regular file, or anything in it is damaged.
    """
    status = {}
    for path in (bin_path(prefix), idx_path(prefix)):
        found = regular_file(path)
        if found is None:
            name = Path(prefix).name
            raise DataError(
                f"{path} does not exist. An indexed dataset is the two files {name}.bin and {name}.idx; give their "
                "common prefix, and create them with `lightning-megatron preprocess`."
            )
        status[path.suffix] = found
    idx, bin_ = status[".idx"], status[".bin"]
    try:
        index = Index.map(idx_path(prefix))
        manifest, record = Manifest.load(prefix), _Record.load(prefix)
        if not whole and record is not None and idx.st_size > ALWAYS_CHECKED and record.holds(idx, bin_):
            if manifest is not None:
                manifest.check_sizes(prefix, idx.st_size, bin_.st_size)
                manifest.check_idx(prefix, record.idx_crc32)
            return index, record.idx_crc32
        started = time.time_ns()
        index.check(bin_.st_size)
        crc32 = file_crc32(idx_path(prefix))
        if manifest is not None:
            manifest.check_sizes(prefix, idx.st_size, bin_.st_size)
            manifest.check_idx(prefix, crc32)
            if whole or bin_.st_size <= ALWAYS_CHECKED:
                for _ in manifest.blocks(prefix):
                    pass
        elif record is not None:
            record.check(prefix, bin_, crc32)
    except OSError as error:
        raise DataError(f"The dataset {os.fspath(prefix)} cannot be read ({error}). {REMEDY}") from error
    if manifest is None or idx.st_size > ALWAYS_CHECKED:
        fresh = _Record(crc32, file_identity(idx), file_identity(bin_), started)
        large = idx.st_size > ALWAYS_CHECKED
        if record is None or not record.same(fresh) or (large and not record.holds(idx, bin_)):
            fresh.save(prefix)
    return index, crc32


@dataclass(frozen=True)
class _Record:
    """That the files of this identity were found whole."""

    idx_crc32: int
    idx: Identity
    bin: Identity
    checked_ns: int

    @classmethod
    def load(cls, prefix: PathLike) -> "_Record | None":
        """Read the record; one that is missing or damaged only means that the files are checked again."""
        try:
            data = _read_json(record_path(prefix), "")
            numbers = [] if data is None else [*data["idx"], *data["bin"], data["idx_crc32"], data["checked_ns"]]
        except (DataError, OSError, KeyError, TypeError):
            return None
        if len(numbers) != 10 or not all(type(number) is int for number in numbers):
            return None
        (idx_size, *idx_rest), (bin_size, *bin_rest) = numbers[:4], numbers[4:8]
        return cls(
            numbers[8],
            (idx_size, idx_rest[0], idx_rest[1], idx_rest[2]),
            (bin_size, bin_rest[0], bin_rest[1], bin_rest[2]),
            numbers[9],
        )

    def holds(self, idx: os.stat_result, bin_: os.stat_result) -> bool:
        """Whether neither file can have changed since."""
        settled = max(*self.idx[2:], *self.bin[2:]) + _SETTLED_NS < self.checked_ns
        return settled and self.idx == file_identity(idx) and self.bin == file_identity(bin_)

    def same(self, other: "_Record") -> bool:
        return (self.idx_crc32, self.idx, self.bin) == (other.idx_crc32, other.idx, other.bin)

    def check(self, prefix: PathLike, bin_: os.stat_result, crc32: int) -> None:
        """Raise DataError if the index is another one beside the same tokens."""
        if crc32 != self.idx_crc32 and self.bin[:3] == file_identity(bin_)[:3]:
            raise DataError(
                f"{idx_path(prefix)} has changed since it was found whole, {bin_path(prefix).name} has not: its "
                f"checksum was {self.idx_crc32:08x} and is {crc32:08x}. It was damaged or replaced. {REMEDY} If "
                f"another tool wrote the index anew, remove {record_path(prefix)}."
            )

    def save(self, prefix: PathLike) -> None:
        """Write the record where the directory lets us."""
        path = record_path(prefix)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with suppress(OSError):
            try:
                partial.write_text(json.dumps({"format": _FORMAT, **vars(self)}) + "\n")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)


def _read_json(path: Path, consequence: str) -> Mapping[str, Any] | None:
    """The object in a JSON file, None if there is no file."""
    status = regular_file(path)
    if status is None:
        return None
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_LARGEST_MANIFEST + 1)[:_LARGEST_MANIFEST])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: it is not JSON. Copy it again, or remove it. {consequence}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} is damaged: it is no JSON object. Copy it again, or remove it. {consequence}")
    return data
