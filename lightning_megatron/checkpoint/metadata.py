"""What a checkpoint tells about itself, readable without torch."""

from __future__ import annotations

import json
import secrets
import zlib
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning_megatron.errors import CheckpointError
from lightning_megatron.json_files import parse_object, read_bounded

FILE = "lightning_megatron.json"
FORMAT = 3
_READABLE = (2, 3)
"""Format 2 has no ``id``, and its JSON is compared by value rather than by byte."""
_FOREIGN = ("config.json", "latest_checkpointed_iteration.txt")
"""What directories of Hugging Face and of Megatron-LM have."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A data module that tells about its tokenizer, as those of :mod:`lightning_megatron.data`."""

    @property
    def tokenizer_description(self) -> dict[str, Any]:
        """In types that JSON has."""
        ...


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and CRC-32 of a file."""

    size: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Read a file and sum it."""
        crc32 = size = 0
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 22):
                crc32, size = zlib.crc32(block, crc32), size + len(block)
        return cls(size, crc32)


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """The model, the layout that wrote it, the versions, and a checksum of every other file of the directory.

    Written last, so its presence means a whole checkpoint.
    """

    model: dict[str, Any]
    layout: dict[str, Any]
    world_size: int
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileSum] = field(default_factory=dict)
    format: int = FORMAT
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Where the run's tokenizer is and what tells it from others, if the data module has one."""
    id: str = ""
    """Random, of this checkpoint alone; copies of a checkpoint share it."""

    def write(self, directory: Path) -> None:
        """Write the file into ``directory``."""
        data = asdict(self)
        data["crc32"] = _crc32(data)
        (directory / FILE).write_text(_text(data))

    @classmethod
    def read(cls, directory: Path) -> CheckpointMetadata:
        """The metadata of the checkpoint in ``directory``.

        Raises:
            CheckpointError: there is no whole checkpoint of ours there, it is damaged, or of another format.
        """
        if not directory.exists():
            raise CheckpointError(f"There is no checkpoint at {directory}.")
        if not (directory / FILE).is_file():
            kind = "a directory without" if directory.is_dir() else "a file, not a directory with"
            foreign = any((directory / name).is_file() for name in _FOREIGN)
            conversion = (
                f" `lightning-megatron convert --load-path {directory} --to lightning --save-path NEW` makes one."
            )
            raise CheckpointError(
                f"{directory} is no whole checkpoint of lightning_megatron: it is {kind} {FILE}, which is written last."
                + (conversion if foreign else remedy(directory))
            )
        try:
            content = read_bounded(directory / FILE, 64 * 2**20)
            data = parse_object(content)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{directory / FILE} is damaged: {error}.{remedy(directory)}") from error
        found = data.get("format", 0)
        if not isinstance(found, int):
            raise CheckpointError(f"{directory / FILE} is damaged: format={found!r:.60}.{remedy(directory)}")
        whole = found > 0 and (found != FORMAT or _text(data).encode() == content)
        crc32 = data.pop("crc32", None)
        if crc32 != _crc32(data) and (found != 1 or crc32 is not None):  # format 1 had none
            whole = False
        if not whole:
            raise CheckpointError(f"{directory / FILE} is damaged: its own checksum does not match.{remedy(directory)}")
        if found not in _READABLE:
            advice = "Upgrade lightning_megatron" if found > FORMAT else "Load it with the version that wrote it"
            raise CheckpointError(
                f"{directory} has format {found}, but this version of lightning_megatron reads {_READABLE}. {advice}."
            )
        try:
            return cls._checked(data)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{directory / FILE} is damaged: it does not hold what this format has ({error}).{remedy(directory)}"
            ) from error

    @classmethod
    def _checked(cls, data: dict[str, Any]) -> CheckpointMetadata:
        """The metadata of the JSON's fields, whose checksum anyone can make."""
        files = {name: FileSum(**total) for name, total in data.pop("files").items()}
        for name, total in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"it names {name!r}, a file outside of the checkpoint")
            if not isinstance(total.size, int) or not isinstance(total.crc32, int):
                raise TypeError(f"size and checksum of {name!r} are no whole numbers")
        found = cls(**data, files=files)
        for field_name in ("model", "layout", "versions", "tokenizer"):
            if not isinstance(getattr(found, field_name), dict):
                raise TypeError(f"{field_name} has no fields")
        if not isinstance(found.tokenizer.get("source", ""), str):
            raise TypeError(f"tokenizer.source={found.tokenizer['source']!r:.60}")
        if not isinstance(found.world_size, int):
            raise TypeError(f"world_size={found.world_size!r:.60}")
        return found


def remedy(path: Path) -> str:
    """What to do about a damaged checkpoint, to be put behind what is wrong with it."""
    return (
        " Copy the damaged files from a backup of this checkpoint again, or take another checkpoint; "
        f"`lightning-megatron doctor {path}` lists all damage."
    )


def new_id() -> str:
    """A random id of a checkpoint."""
    return secrets.token_hex(16)


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str) + "\n"


def _crc32(data: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True, default=str).encode())


def versions() -> dict[str, str]:
    """Of the packages that decide what a checkpoint looks like."""
    found = {}
    for package in ("lightning-megatron", "megatron-core", "lightning", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
