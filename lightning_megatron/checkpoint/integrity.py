"""Tells whether a checkpoint is whole, and what is damaged if not."""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_megatron.checkpoint.metadata import FILE, CheckpointMetadata, FileSum, remedy
from lightning_megatron.checkpoint.run_state import OPTIMIZER_PREFIX, RNG
from lightning_megatron.checkpoint.shard_files import CHECKSUM_FILE, INDEX_FILE, ShardFiles
from lightning_megatron.checkpoint.trainer_state import read_trainer_state
from lightning_megatron.errors import CheckpointError
from lightning_megatron.json_files import check_regular

LIGHTNING_FILE = "lightning.pt"
SHARD_SUFFIX = ".distcp"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds."""

    metadata: CheckpointMetadata
    weights: int
    """Tensors of the model."""
    parameters: int
    """Their elements."""
    optimizer: tuple[str, ...]
    """Kinds of the optimizer's tensors."""
    random_states: int
    """Ranks whose random states are there."""
    size: int
    """Bytes on the disk."""


def contents(path: Path) -> Contents:
    """What the checkpoint says of itself; no tensor is read.

    Raises:
        CheckpointError: it cannot say.
    """
    metadata = CheckpointMetadata.read(path)
    files = ShardFiles.open(path)
    model = {key: shape for key, shape in files.shapes.items() if not key.startswith((OPTIMIZER_PREFIX, RNG))}
    return Contents(
        metadata,
        weights=len(model),
        parameters=sum(_numel(shape) for shape in model.values()),
        optimizer=tuple(sorted({key.split(".")[2] for key in files.shapes if key.startswith(OPTIMIZER_PREFIX)})),
        random_states=len({key.split(".")[1] for key in files.shapes if key.startswith(RNG)}),
        size=sum(total.size for total in metadata.files.values()),
    )


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint whose files, or a rank's share of them, have been compared with their checksums."""

    metadata: CheckpointMetadata
    files: ShardFiles
    small: dict[str, bytes]
    """Contents of the files that hold no shards, as they were checked."""


def open_checked(path: Path, rank: int = 0, size: int = 1) -> Opened:
    """Compare the files with the manifest, and open the checkpoint.

    Every rank compares the files without shards, and each of the files with shards is read by one rank. Ranks of the
    layout that wrote it compare what they are about to read.

    Args:
        rank: of
        size: ranks that share the work.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    metadata = CheckpointMetadata.read(path)
    shards = sorted((name for name in metadata.files if name.endswith(SHARD_SUFFIX)), key=_by_rank)
    mine = set(shards[rank::size])
    small, damage = _compare(path, metadata, mine)
    if damage:
        raise CheckpointError(_describe(path, [*damage.values(), *_tensors_hit(path, damage)]))
    files = ShardFiles.open(path, index=small.get(INDEX_FILE), checksums=small.get(CHECKSUM_FILE), trusted=mine)
    unlisted = {chunk.file for chunks in files.chunks.values() for chunk in chunks} - set(shards)
    if unlisted or LIGHTNING_FILE not in small:
        missing = sorted(unlisted) or [LIGHTNING_FILE]
        raise CheckpointError(_describe(path, [f"{FILE} has no checksum of {name}" for name in missing]))
    files.check_whole(metadata.files)
    return Opened(metadata, files, small)


def open_small(path: Path) -> tuple[CheckpointMetadata, dict[str, bytes]]:
    """The metadata, and the contents of the files without shards, checked. Of files with shards, the size is.

    Raises:
        CheckpointError: there is no checkpoint, or one of these files is damaged.
    """
    metadata = CheckpointMetadata.read(path)
    small, damage = _compare(path, metadata, ())
    if damage:
        return open_checked(path).metadata, small  # raises, and names the damage of all files as a load does
    if LIGHTNING_FILE not in small:
        raise CheckpointError(_describe(path, [f"{FILE} has no checksum of {LIGHTNING_FILE}"]))
    return metadata, small


def verify(path: Path) -> list[str]:
    """Read every byte, as a load does; what is damaged, one line each, with the tensors that are hit."""
    try:
        open_checked(path)
    except CheckpointError as error:
        return str(error).splitlines()
    return []


def refused(path: Path) -> list[str]:
    """Why the Trainer's state of a whole checkpoint is not loaded by default; nothing if it is."""
    try:
        read_trainer_state(path / LIGHTNING_FILE, open_small(path)[1][LIGHTNING_FILE], None)
    except CheckpointError as error:
        return str(error).splitlines()
    return []


def _compare(
    path: Path, metadata: CheckpointMetadata, shards: Collection[str]
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Contents of small files, and what is wrong by file. Of files with shards that are not in ``shards``, the size."""
    small: dict[str, bytes] = {}
    damage: dict[str, str] = {}
    for name, total in metadata.files.items():
        file = path / name
        if Path(name).name != name or not os.path.lexists(file):
            damage[name] = f"{name} is missing"
            continue
        try:
            size = check_regular(file)
            if size != total.size or (name.endswith(SHARD_SUFFIX) and name not in shards):
                found = FileSum(size, total.crc32)  # a file of another size is not read: it could fill the memory
            elif name.endswith(SHARD_SUFFIX):
                found = FileSum.of(file)
            else:
                small[name] = file.read_bytes()
                found = FileSum(len(small[name]), zlib.crc32(small[name]))
        except OSError as error:
            damage[name] = f"{name} cannot be read: {error.strerror}"
            continue
        except ValueError as error:
            damage[name] = f"{name} cannot be read: {error}"
            continue
        if found.size != total.size:
            damage[name] = f"{name} has {found.size} bytes instead of {total.size}"
        elif found.crc32 != total.crc32:
            damage[name] = (
                f"{name} does not have its checksum in {FILE}: one of them has changed, or is of another checkpoint"
            )
    return small, damage


def _tensors_hit(path: Path, damage: Collection[str]) -> list[str]:
    if INDEX_FILE in damage or CHECKSUM_FILE in damage:
        return []
    try:
        files = ShardFiles.open(path)
    except CheckpointError:
        return []
    hit = []
    for chunks in files.chunks.values():
        for chunk in chunks:
            if chunk.file in damage:
                try:
                    files.load(chunk)
                except CheckpointError as error:
                    hit.append(str(error).removesuffix(remedy(path)))
    return hit if len(hit) <= _SHOWN else [*hit[:_SHOWN], f"and {len(hit) - _SHOWN} more tensors are damaged"]


def _describe(path: Path, damage: Sequence[str]) -> str:
    return "\n  ".join([f"The checkpoint {path} is damaged:", *damage]) + f"\n {remedy(path)}"


def _by_rank(name: str) -> tuple[int, str]:
    digits = name.removeprefix("__").partition("_")[0]
    return (int(digits) if digits.isdecimal() else 0, name)


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
