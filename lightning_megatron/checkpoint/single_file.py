"""Checkpoints without ranks: one file for one checkpoint and back, and the average of several."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_megatron.backends.shards import Box
from lightning_megatron.checkpoint.integrity import LIGHTNING_FILE, open_checked
from lightning_megatron.checkpoint.io import Snapshot, pickled
from lightning_megatron.checkpoint.metadata import FORMAT, CheckpointMetadata
from lightning_megatron.checkpoint.run_state import OPTIMIZER_PREFIX, RNG
from lightning_megatron.checkpoint.shard_files import Outline, ShardFiles
from lightning_megatron.checkpoint.together import Alone
from lightning_megatron.checkpoint.trainer_state import read_trainer_state
from lightning_megatron.errors import CheckpointError

_TRAINER = "lightning.pt"


def consolidate(checkpoint: str | Path, file: str | Path, *, weights_only: bool = False) -> None:
    """Write a checkpoint directory as one safetensors file, with whole tensors.

    Args:
        weights_only: leave out the optimizer, the random states and the Trainer.

    Raises:
        CheckpointError: no whole checkpoint.
    """
    path = Path(checkpoint)
    opened = open_checked(path)
    metadata, files = opened.metadata, opened.files
    wanted = (key for key in files.shapes if not (weights_only and key.startswith((OPTIMIZER_PREFIX, RNG))))
    tensors = {key: _whole(files, key) for key in wanted}
    if not weights_only:
        tensors[_TRAINER] = torch.frombuffer(bytearray(opened.small[LIGHTNING_FILE]), dtype=torch.uint8)
    about = asdict(metadata) | {"files": {}}
    save_file(tensors, file, metadata={"lightning_megatron": json.dumps(about, default=str)})


def expand(file: str | Path, checkpoint: str | Path) -> None:
    """Write a file of :func:`consolidate` as a checkpoint directory again.

    Raises:
        CheckpointError: the file is none of these.
    """
    with safe_open(file, framework="pt") as opened:
        about = (opened.metadata() or {}).get("lightning_megatron")
        if about is None:
            raise CheckpointError(f"{file} is no file of lightning_megatron.checkpoint.consolidate.")
        metadata = CheckpointMetadata(**(json.loads(about) | {"files": {}, "format": FORMAT}))
        names = [name for name in opened.keys() if name != _TRAINER]  # noqa: SIM118  (not a dict)
        trainer = pickled({"state_dict": {}})
        if _TRAINER in opened.keys():  # noqa: SIM118
            trainer = opened.get_tensor(_TRAINER).numpy().tobytes()
        _write(Path(checkpoint), {name: opened.get_tensor(name) for name in names}, trainer, metadata)


def average(checkpoints: Sequence[str | Path], target: str | Path) -> None:
    """Write the mean of the weights of several checkpoints (arXiv:1803.05407), without optimizer and Trainer.

    Raises:
        CheckpointError: none given, or they are of different models.
    """
    if not checkpoints:
        raise CheckpointError("There is no average of no checkpoints.")
    paths = [Path(path) for path in checkpoints]
    checked = [open_checked(path) for path in paths]
    opened = [checkpoint.files for checkpoint in checked]
    shapes = [_weights(files) for files in opened]
    for path, other in zip(paths, shapes, strict=True):
        if other != shapes[0]:
            differ = sorted(k for k in other.keys() | shapes[0].keys() if other.get(k) != shapes[0].get(k))
            raise CheckpointError(f"{path} and {paths[0]} are of different models; they differ in {differ[:5]}.")
    means = {}
    for key in shapes[0]:
        total = torch.zeros(shapes[0][key], dtype=torch.float64)
        for files in opened:
            total += _whole(files, key)
        means[key] = (total / len(opened)).to(opened[0].dtypes[key])
    trainer = read_trainer_state(paths[-1] / LIGHTNING_FILE, checked[-1].small[LIGHTNING_FILE], None)
    kept = ("pytorch-lightning_version", "global_step", "epoch", "state_dict", "loops")
    state = {key: trainer[key] for key in kept if key in trainer}
    _write(Path(target), means, pickled(state), checked[0].metadata)


def _weights(files: ShardFiles) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in files.shapes.items() if not key.startswith((OPTIMIZER_PREFIX, RNG))}


def _whole(files: ShardFiles, key: str) -> Tensor:
    shape = files.shapes[key]
    tensor = torch.empty(shape, dtype=files.dtypes[key])
    copied = files.read(key, Box((0,) * len(shape), shape), tensor)
    if copied < tensor.numel():
        raise CheckpointError(f"{files.directory} has only {copied} of the {tensor.numel()} elements of {key}.")
    return tensor


def _write(path: Path, tensors: dict[str, Tensor], trainer: bytes, metadata: CheckpointMetadata) -> None:
    outlines = list(_outlines(tensors))
    Snapshot(path, list(tensors.values()), [outlines], trainer, metadata).write(Alone())


def _outlines(tensors: dict[str, Tensor]) -> Iterator[Outline]:
    for key, tensor in tensors.items():
        shape: Any = tuple(tensor.shape)
        yield Outline(key, shape, Box((0,) * len(shape), shape), tensor.dtype)
