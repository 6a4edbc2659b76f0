"""Reads the pickled index of a distributed checkpoint without building an object of any real class.

The index is made of torch's dataclasses. Each class that it names is replaced by an empty class of this one load, so a
crafted index reaches nothing of the process: neither a constructor nor, by pickle's BUILD, an attribute of a class.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch

from lightning_megatron.backends.shards import Sizes

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = frozenset(
    (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta", "_StorageInfo", "_StoragePrefix"),
    )
)
_OTHERS = frozenset(
    (
        *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
        # Megatron-LM's own remarks in its indices.
        *(("pathlib", "PosixPath"), ("pathlib", "Path"), ("pathlib._local", "PosixPath")),
    )
)


_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_OPERATIONS = _PUTS | frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
        *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
    )
)


class IndexFormatError(ValueError):
    """An index that holds something other than an index."""


@dataclass(frozen=True, slots=True)
class IndexedTensor:
    """What the index tells of a tensor; ``boxes`` maps the offsets of each chunk to its sizes."""

    shape: Sizes
    dtype: torch.dtype
    boxes: Mapping[Sizes, Sizes]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one chunk, or with ``offsets`` of ``None`` an object that is no tensor, lies."""

    key: str
    offsets: Sizes | None
    file: str
    start: int
    length: int


def read_index(data: bytes) -> tuple[dict[str, IndexedTensor], list[Place]]:
    """The tensors and places that an index names.

    Raises:
        IndexFormatError: it holds anything else.
        Exception: of any kind, for a damaged pickle.
    """
    _check_operations(data)
    index = _Unpickler(BytesIO(data)).load()
    tensors = {}
    for key, value in _fields(index, "Metadata")["state_dict_metadata"].items():
        if type(value).__name__ == "TensorStorageMetadata":
            tensors[_typed(key, str)] = _tensor(value)
    return tensors, list(_places(_fields(index, "Metadata")["storage_data"]))


def _check_operations(data: bytes) -> None:
    """Refuse what no index holds, before anything is built: calls by other names, and memo entries far apart.

    The interpreter keeps the memo as an array, so an entry at 4 billion, which takes 5 bytes, would take 32 GiB.
    """
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPERATIONS:
            raise IndexFormatError(f"there is {operation.name} in its pickle, which no index has")
        if operation.name in _PUTS and int(argument or 0) > len(data):
            raise IndexFormatError(f"there is a memo entry {argument} in a pickle of {len(data)} bytes")


class _Record:
    """Stands for an object of the index: its class's name, and what was passed to build it."""

    state: Any = None
    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        # A function of the class, so that BUILD on the class itself lacks an argument and fails.
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BytesIO) -> None:
        super().__init__(file)
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if not ((module in _MODULES and name in _NAMES) or (module, name) in _OTHERS):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        base = dict if name == "OrderedDict" else _Record
        return self._classes.setdefault((module, name), type(name, (base,), {}))


def _tensor(record: Any) -> IndexedTensor:
    fields = _fields(record, "TensorStorageMetadata")
    properties = fields["properties"]
    state = properties.state if type(properties).__name__ == "TensorProperties" else None
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) else None
    shape = _sizes(fields["size"])
    boxes: dict[Sizes, Sizes] = {}
    for chunk in _typed(fields["chunks"], list):
        parts = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(parts["offsets"]), _sizes(parts["sizes"])
        if not len(offsets) == len(sizes) == len(shape) or any(
            o + s > whole for o, s, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise IndexFormatError(f"a chunk at {offsets} of {sizes} lies outside of a tensor of {shape}")
        if offsets in boxes:
            raise IndexFormatError(f"two chunks lie at {offsets}")
        boxes[offsets] = sizes
    return IndexedTensor(shape, _typed(dtype, torch.dtype), boxes)


def _places(storage: Any) -> Iterator[Place]:
    for at, place in _typed(storage, dict).items():
        where, parts = _fields(at, "MetadataIndex"), _fields(place, "_StorageInfo")
        offset = where.get("offset")
        yield Place(
            _typed(where["fqn"], str),
            None if offset is None else _sizes(offset),
            _typed(parts["relative_path"], str),
            _size(parts["offset"]),
            _size(parts["length"]),
        )


def _fields(record: Any, name: str) -> dict[str, Any]:
    if type(record).__name__ != name or not isinstance(record, _Record) or not isinstance(record.state, dict):
        raise IndexFormatError(f"there is {type(record).__name__} where {name} should be")
    return record.state


def _typed(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise IndexFormatError(f"there is {type(value).__name__} where {kind} should be")
    return value


def _sizes(value: Any) -> Sizes:
    if isinstance(value, _Record):  # torch.Size
        value = value.args[0] if len(value.args) == 1 else None
    return tuple(_size(item) for item in _typed(value, (tuple, list)))


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise IndexFormatError(f"{type(value).__name__} is no size")
    return value
