"""The files of shards: torch's distributed checkpoint format, which is megatron-core's, written and read safely.

Each rank writes one file, in which each shard is what ``torch.save`` makes of one tensor. ``.metadata`` is the index:
pickled dataclasses of torch. It is read without building them (:mod:`lightning_megatron.checkpoint.shard_index`), and
shards are read as bytes, so a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what every index of this format holds
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_megatron.backends.shards import Box, Shard, Sizes
from lightning_megatron.checkpoint.metadata import FileSum, remedy
from lightning_megatron.checkpoint.shard_index import read_index
from lightning_megatron.checkpoint.summed_file import WrittenFile
from lightning_megatron.errors import CheckpointError
from lightning_megatron.json_files import check_regular, read_bounded

INDEX_FILE = ".metadata"
CHECKSUM_FILE = "checksums.json"
_LARGEST = 2**30
"""Bytes of an index that are read: those of 100,000 files of shards have a tenth of it."""
_CORE_FILES = {
    "metadata.json": '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    '"common_backend": "torch", "common_backend_version": 1}',
}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where a box of a tensor lies."""

    key: str
    box: Box
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Where an object that is no tensor lies. Those of megatron-core are lists in files of ``torch.save``."""

    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Outline:
    """What the index tells of a shard."""

    key: str
    global_shape: Sizes
    box: Box
    dtype: torch.dtype

    @classmethod
    def of(cls, shard: Shard) -> Outline:
        """The outline of a shard."""
        return cls(shard.key, shard.global_shape, shard.box, shard.tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.box.numel * self.dtype.itemsize


def share_out(ranks: Sequence[Sequence[Outline]]) -> list[list[int]]:
    """Which of its shards each rank writes, so that each box is written once and all ranks write about as much."""
    holders: dict[tuple[str, Box], list[tuple[int, int]]] = defaultdict(list)
    for rank, outlines in enumerate(ranks):
        for index, outline in enumerate(outlines):
            holders[outline.key, outline.box].append((rank, index))
    load = [0] * len(ranks)
    chosen: list[list[int]] = [[] for _ in ranks]
    largest_first = sorted(holders.values(), key=lambda at: -ranks[at[0][0]][at[0][1]].nbytes)
    for candidates in largest_first:
        rank, index = min(candidates, key=lambda at: load[at[0]])
        load[rank] += ranks[rank][index].nbytes
        chosen[rank].append(index)
    return [sorted(indices) for indices in chosen]


def write_index(
    directory: Path,
    files: Iterable[tuple[WrittenFile, Sequence[Outline]]],
    objects: Mapping[str, StoredObject] | None = None,
) -> None:
    """The index of all ranks' files, and the two files that megatron-core looks for beside it.

    Args:
        objects: what others than this package expect to find beside the tensors.
    """
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    written = list(files)
    for file, outlines in written:
        start = 0
        for outline, end in zip(outlines, file.ends, strict=True):
            tensor = tensors.get(outline.key)
            if tensor is None:
                properties = TensorProperties(dtype=outline.dtype)
                tensor = TensorStorageMetadata(properties, torch.Size(outline.global_shape), [])
                tensors[outline.key] = tensor
            offsets, sizes = torch.Size(outline.box.offsets), torch.Size(outline.box.sizes)
            places[MetadataIndex(outline.key, offsets, len(tensor.chunks))] = _StorageInfo(
                file.name, start, end - start
            )
            tensor.chunks.append(ChunkStorageMetadata(offsets, sizes))
            start = end
    for key, place in (objects or {}).items():
        tensors[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _StorageInfo(place.file, place.start, place.length)
    with open(directory / INDEX_FILE, "wb") as index:
        pickle.dump(Metadata(tensors, storage_data=places), index)
    for name, text in _CORE_FILES.items():
        (directory / name).write_text(text)
    buffer = BytesIO()
    torch.save({}, buffer)  # straight to the file it would hide why a write failed
    (directory / "common.pt").write_bytes(buffer.getvalue())
    (directory / CHECKSUM_FILE).write_text(json.dumps({file.name: file.crcs for file, _ in written}))


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class ShardFiles:
    """The tensors of a checkpoint directory."""

    directory: Path
    shapes: dict[str, Sizes]
    dtypes: dict[str, torch.dtype]
    chunks: dict[str, list[StoredChunk]]
    checksums: dict[tuple[str, int], int]
    """CRC-32 of the values of a chunk, by its file and start; empty for a checkpoint of megatron-core's own."""
    objects: dict[str, StoredObject]
    """What is not a tensor; this package writes none."""

    trusted: frozenset[str] = frozenset()
    """Files that this process has compared with their checksums; their chunks are not summed again."""

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        index: bytes | None = None,
        checksums: bytes | None = None,
        trusted: Collection[str] = (),
    ) -> ShardFiles:
        """Read the index.

        Args:
            index: the contents of the index, if they have been read, and
            checksums: those of the file with the checksums of chunks.

        Raises:
            CheckpointError: no index, a damaged one, or one that holds something other than an index.
        """
        try:
            tensors, places = read_index(read_bounded(directory / INDEX_FILE, _LARGEST) if index is None else index)
            chunks: dict[str, list[StoredChunk]] = {key: [] for key in tensors}
            objects: dict[str, StoredObject] = {}
            for at in places:
                if at.key in tensors:
                    offsets = at.offsets or ()
                    box = Box(offsets, tensors[at.key].boxes[offsets])
                    chunks[at.key].append(StoredChunk(at.key, box, at.file, at.start, at.length))
                else:
                    objects[at.key] = StoredObject(at.file, at.start, at.length)
            if checksums is None and (directory / CHECKSUM_FILE).is_file():
                checksums = read_bounded(directory / CHECKSUM_FILE, _LARGEST)
            return cls(
                directory,
                {key: tensor.shape for key, tensor in tensors.items()},
                {key: tensor.dtype for key, tensor in tensors.items()},
                chunks,
                _checksums(checksums, chunks),
                objects,
                frozenset(trusted),
            )
        except OSError as error:
            raise CheckpointError(f"{directory} has no readable index {INDEX_FILE}: {error}") from error
        except Exception as error:  # a damaged pickle raises almost anything
            raise CheckpointError(
                f"The index {directory / INDEX_FILE} is damaged or unsafe: {' '.join(str(error).split())}."
                f"{remedy(directory)}"
            ) from error

    def check_whole(self, sums: Mapping[str, FileSum]) -> None:
        """Check that every element of every tensor lies in a file, without reading any.

        Raises:
            CheckpointError: it does not.
        """
        sizes = {name: (self.directory / name).stat().st_size for name in sums}
        for key, chunks in self.chunks.items():
            stored, needed = sum(chunk.box.numel for chunk in chunks), math.prod(self.shapes[key])
            if stored != needed:
                raise CheckpointError(
                    f"The index {self.directory / INDEX_FILE} has {stored} elements of {key} instead of {needed}."
                    f"{remedy(self.directory)}"
                )
            for chunk in chunks:
                if chunk.start + chunk.length > sizes.get(chunk.file, 0):
                    raise CheckpointError(
                        f"{self.directory / chunk.file} ends before {key} does.{remedy(self.directory)}"
                    )

    @cached_property
    def _maps(self) -> dict[str, memoryview]:
        return {}

    def release(self) -> None:
        """Give back the memory of files that were read; they are read again when they are needed again."""
        for view in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                view.obj.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def _map(self, name: str) -> memoryview:
        if name not in self._maps:
            path = self.directory / name
            if path.parent != self.directory:
                raise CheckpointError(
                    f"The index {self.directory / INDEX_FILE} names a file outside of the checkpoint: {name!r:.80}."
                    f"{remedy(self.directory)}"
                )
            try:
                check_regular(path)  # to open a pipe could wait for ever
                with open(path, "rb") as file:
                    self._maps[name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{path}, which holds shards, cannot be read: {error}.{remedy(self.directory)}"
                ) from error
        return self._maps[name]

    def object_bytes(self, key: str) -> bytes:
        """The file that an object that is no tensor makes; nothing of it is unpickled.

        Raises:
            CheckpointError: a file is missing or cut short.
        """
        place = self.objects[key]
        data = bytes(self._map(place.file)[place.start : place.start + place.length])
        if len(data) != place.length:
            raise CheckpointError(
                f"{self.directory / place.file} is cut short, before the end of {key}.{remedy(self.directory)}"
            )
        return data

    def read(self, key: str, box: Box, into: Tensor) -> int:
        """Copy what the checkpoint has of a box, casting to the type of ``into``.

        Returns:
            How many elements it had.

        Raises:
            CheckpointError: a file is missing, cut short or damaged.
        """
        copied = 0
        for chunk in self.chunks[key]:
            if (common := box.intersect(chunk.box)) is not None:
                box.view(into, common).copy_(chunk.box.view(self.load(chunk), common))
                copied += common.numel
        return copied

    def load(self, chunk: StoredChunk) -> Tensor:
        """The tensor of one stored chunk, in the file's memory where possible; not to be written to."""
        data = self._map(chunk.file)[chunk.start : chunk.start + chunk.length]
        if len(data) != chunk.length:
            raise CheckpointError(
                f"{self.directory / chunk.file} is cut short, before the end of {chunk.key}.{remedy(self.directory)}"
            )
        dtype, numel = self.dtypes[chunk.key], math.prod(chunk.box.sizes)
        try:
            crc32 = None if chunk.file in self.trusted else self.checksums.get((chunk.file, chunk.start))
            values = _payload(data, numel * dtype.itemsize, crc32, check=chunk.file not in self.trusted)
            if values is not None:
                return torch.frombuffer(values, dtype=dtype, count=numel).view(chunk.box.sizes)
            found = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
            if type(found) is not Tensor or found.dtype != dtype:
                raise ValueError(f"there is no tensor of {dtype}")
            return found.view(chunk.box.sizes)
        except Exception as error:  # a damaged archive raises almost anything
            raise CheckpointError(
                f"{self.directory / chunk.file} is damaged in {chunk.key} {list(chunk.box.offsets)}: "
                f"{error}{remedy(self.directory)}"
            ) from error


def _checksums(data: bytes | None, chunks: dict[str, list[StoredChunk]]) -> dict[tuple[str, int], int]:
    if data is None:
        return {}
    starts = defaultdict(list)
    for stored in chunks.values():
        for chunk in stored:
            starts[chunk.file].append(chunk.start)
    return {
        (name, start): crc32
        for name, crcs in json.loads(data).items()
        for start, crc32 in zip(sorted(starts[name]), crcs, strict=True)
    }


class _View:
    """A file over bytes that copies only what is read."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, len(self._data))[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size < 0 else self._at + size
        data = bytes(self._data[self._at : end])
        self._at += len(data)
        return data


def _payload(data: memoryview, size: int, crc32: int | None, *, check: bool) -> memoryview | None:
    """The bytes of the one contiguous tensor in a ``torch.save`` archive, verified; ``None`` for other archives.

    Args:
        crc32: the sum of the bytes; ``None`` takes that of the archive.
        check: whether to compare it.
    """
    if size == 0:
        return None
    with zipfile.ZipFile(_View(data)) as archive:
        storages = [info for info in archive.infolist() if "/data/" in info.filename]
    if len(storages) != 1 or storages[0].file_size != size or storages[0].compress_type != zipfile.ZIP_STORED:
        return None
    header = storages[0].header_offset
    name, extra = (int.from_bytes(data[header + at : header + at + 2], "little") for at in (26, 28))
    payload = data[header + 30 + name + extra :][:size]
    if check and zlib.crc32(payload) != (storages[0].CRC if crc32 is None else crc32):
        raise ValueError("its checksum does not match.")
    return payload
