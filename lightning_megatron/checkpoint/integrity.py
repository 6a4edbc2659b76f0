"""Tells whether a checkpoint is whole, and what is damaged if not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_megatron.checkpoint.metadata import FILE, CheckpointMetadata, FileSum
from lightning_megatron.checkpoint.run_state import OPTIMIZER_PREFIX, RNG
from lightning_megatron.checkpoint.shard_files import ShardFiles
from lightning_megatron.errors import CheckpointError


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


def verify(path: Path) -> list[str]:
    """Read every byte; what is damaged, one line each, with the tensors that are hit. Nothing is unpickled."""
    try:
        metadata = CheckpointMetadata.read(path)
    except CheckpointError as error:
        return [str(error)]
    damage: list[str] = []
    suspects: set[str] = set()
    for name, total in metadata.files.items():
        if not (path / name).is_file():
            damage.append(f"{name} is missing")
            continue
        found = FileSum.of(path / name)
        if found.size != total.size:
            damage.append(f"{name} has {found.size} bytes instead of {total.size}")
        elif found.crc32 != total.crc32:
            damage.append(f"{name} does not have its checksum")
        else:
            continue
        suspects.add(name)
    strangers = sorted({file.name for file in path.iterdir()} - metadata.files.keys() - {FILE})
    damage += [f"{name} is not part of the checkpoint" for name in strangers]
    try:
        files = ShardFiles.open(path)
    except CheckpointError as error:
        return [*damage, str(error)]
    for chunks in files.chunks.values():
        for chunk in chunks:
            if chunk.file in suspects:
                try:
                    files.load(chunk)
                except CheckpointError as error:
                    damage.append(f"{chunk.key} {list(chunk.box.offsets)}: {error}")
    return damage


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
