"""Directories of safetensors shards: parts of tensors read from them, and whole tensors streamed into them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_megatron.errors import CheckpointError
from lightning_megatron.json_files import check_regular, read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, of which parts can be read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        """A part. The file is mapped no longer than the part lives, so that its pages do not add up."""
        with safe_open(self.file, framework="pt") as opened:
            part: Tensor = opened.get_slice(self.name)[place]
            return part

    def whole(self) -> Tensor:
        """All of it."""
        return self[tuple(slice(0, size) for size in self.shape)] if self.shape else _scalar(self)


def _scalar(stored: StoredTensor) -> Tensor:
    with safe_open(stored.file, framework="pt") as opened:
        value: Tensor = opened.get_tensor(stored.name)
        return value


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory that ``save_pretrained`` wrote, by name. Only headers are read.

    Raises:
        CheckpointError: no safetensors there, a shard that the index names is missing or cut short, or one that lacks a
            tensor.
    """
    if os.path.lexists(
        directory / SINGLE_FILE
    ):  # also beside an index, which is then stale; transformers does the same
        return _open_file(directory / SINGLE_FILE)
    if not os.path.lexists(directory / INDEX_FILE):
        raise CheckpointError(_nothing(directory))
    try:
        index = _weight_map(read_object(directory / INDEX_FILE, 64 * 2**20))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{directory / INDEX_FILE} is no index of safetensors shards: {error}. Fetch it again."
        ) from error
    names = sorted(set(index.values()))
    outside = [name for name in names if Path(name).name != name]
    missing = [name for name in names if not os.path.lexists(directory / name)]
    if outside or missing:
        what = f"names a file outside of it, {outside[0]}" if outside else f"lacks {', '.join(missing)}"
        raise CheckpointError(
            f"{directory} {what}; {INDEX_FILE} names {len(names)} shards. Fetch the directory again, whole."
        )
    opened = {name: _open_file(directory / name) for name in names}
    lost = [name for name, file in index.items() if name not in opened[file]]
    if lost:
        raise CheckpointError(
            f"{directory / index[lost[0]]} lacks {', '.join(lost[:5])}, which the index says it has. "
            "Fetch the directory again."
        )
    return {name: opened[file][name] for name, file in index.items()}


def _nothing(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin")):
        return (
            f"{directory} holds pickled weights (pytorch_model.bin) and no safetensors. Load it with transformers, and "
            "save it again with save_pretrained."
        )
    return f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}. Give a directory that save_pretrained wrote."


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    """The file of each tensor.

    Raises:
        ValueError: no names of tensors and files.
    """
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"weight_map={found!r:.60}")
    wrong = {name: file for name, file in found.items() if not isinstance(file, str) or not file}
    if wrong:
        raise ValueError(f"weight_map names the files {list(wrong.values())!r:.60}")
    return found


def _open_file(path: Path) -> dict[str, StoredTensor]:
    try:
        size = check_regular(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no file of tensors: {error}. Fetch it again.") from error
    try:
        with safe_open(path, framework="pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                part = opened.get_slice(name)
                found[name] = StoredTensor(path, name, tuple(part.get_shape()), _DTYPES[part.get_dtype()])
            return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file: {error}. It has {size} bytes; was it cut short? Fetch it again."
        ) from error
    except KeyError as error:
        raise CheckpointError(
            f"{path} holds tensors of the type {error}; only {', '.join(_DTYPES)} can be read."
        ) from error


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"200MB"``.

    Raises:
        ValueError: none such.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", str(size).strip().upper())
    number = float(match[1]) * _UNITS[match[2] or ""] if match and (match[2] or "") in _UNITS else 0
    if number < 1:
        raise ValueError(f"max_shard_size={size!r} is no size such as 5000000, '200MB' or '5GB'.")
    return int(number)


class SafetensorsWriter:
    """Streams tensors into shards of at most ``max_shard_size`` bytes each, with an index if there are several.

    Holds one tensor at a time: what comes is known beforehand, so headers are written first.

    Args:
        directory: exists.
        specs: all tensors, in the order in which they come.
        max_shard_size: in bytes; a single larger tensor has a shard for itself.
    """

    def __init__(self, directory: Path, specs: Sequence[TensorSpec], max_shard_size: int) -> None:
        self._directory = directory
        self._shards = _split(specs, max_shard_size)
        count = len(self._shards)
        self._names = (
            [SINGLE_FILE]
            if count == 1
            else [f"model-{shard:05d}-of-{count:05d}.safetensors" for shard in range(1, count + 1)]
        )
        self._coming = [(shard, spec) for shard, specs in enumerate(self._shards) for spec in specs]
        self._next = 0
        self._file: BinaryIO | None = None
        self._open_shard = -1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            self._finish()

    def put(self, name: str, tensor: Tensor) -> None:
        """The next tensor, cast to its type."""
        shard, spec = self._coming[self._next]
        if spec.name != name or spec.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} has the shape {tuple(tensor.shape)}, but {spec.name} of {spec.shape} is to come."
            )
        if shard != self._open_shard:
            self._begin(shard)
        assert self._file is not None
        data = tensor.detach().to("cpu", spec.dtype).contiguous().reshape(-1).view(torch.uint8)
        self._file.write(memoryview(data.numpy()))
        self._next += 1

    def _begin(self, shard: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for spec in self._shards[shard]:
            offsets = [at, at + spec.nbytes]
            header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            at += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of eight
        self._file = open(self._directory / self._names[shard], "wb")  # noqa: SIM115  (closed by the next, or the end)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._open_shard = shard

    def _finish(self) -> None:
        if self._next < len(self._coming):
            missing = self._coming[self._next][1].name
            raise CheckpointError(f"{missing} and {len(self._coming) - self._next - 1} more tensors did not come.")
        if len(self._names) > 1:
            sizes = [spec.nbytes for _, spec in self._coming]
            weight_map = {spec.name: self._names[shard] for shard, spec in self._coming}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _split(specs: Sequence[TensorSpec], most: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards
