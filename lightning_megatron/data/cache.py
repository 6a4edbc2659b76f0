"""Index maps cached on disk: built once, by one process, whoever starts first and whoever is killed."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.index_format import ALWAYS_CHECKED, file_crc32, file_identity, regular_file
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.errors import DataError

IndexMaps = Mapping[str, NDArray[Any]]

_DESCRIPTION = "description.json"
_CHECKSUMS = "checksums.json"
_LARGEST_TEXT = 16 << 20


def fingerprint(dataset: IndexedDataset) -> dict[str, int]:
    """What index maps depend on in a dataset: its index by checksum, and how many tokens there are."""
    return {"idx_crc32": dataset.idx_crc32, "sequences": len(dataset), "tokens": dataset.num_tokens}


def default_cache_dir(prefix: Path) -> Path:
    """Directory beside a dataset for its index maps."""
    return prefix.parent / f"{prefix.name}.index_maps"


def digest(description: Mapping[str, Any]) -> str:
    """Short name of what `description` describes."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]


def cached_maps(directory: Path, description: Mapping[str, Any], build: Callable[[], IndexMaps]) -> IndexMaps:
    """Load the index maps that belong to `description`, or build and store them.

    An entry is a directory of `.npy` files that is filled under a temporary name and renamed, so it is either whole or
    absent. It holds the description and a checksum of each file; an entry that is damaged or belongs to another
    description is built again, with a warning. A file lock, which the system drops when its owner dies, makes the
    processes of one start wait for the one that builds. Where the file system has no locks, several may build; the
    first rename wins.

    Args:
        directory: Where entries are kept.
        description: JSON-able; everything that the maps depend on. Its hash names the entry.
        build: Returns arrays by name.

    Returns:
        The arrays by name, memory-mapped read-only.

    Raises:
        DataError: `directory` cannot be written, or the disk is full.
    """
    text = json.dumps(description, indent=1, sort_keys=True)
    entry = directory / digest(description)
    maps, damage = _load(entry, text)
    if maps is not None:
        return maps
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f"{entry.name}.lock") as alone:
            if alone:
                for left_behind in directory.glob(f"{entry.name}.*.partial"):  # by one that was killed
                    shutil.rmtree(left_behind, ignore_errors=True)
            maps, damage = _load(entry, text)  # another process may have built it meanwhile
            if maps is not None:
                return maps
            if damage:
                warnings.warn(f"Index maps in {entry} {damage}: they are built again.", stacklevel=2)
                _remove(entry)
            _store(entry, text, build())
    except OSError as error:
        state = f"; those in {entry.name} {damage}" if damage else ""
        raise DataError(
            f"Index maps cannot be cached in {directory} ({error.strerror or error}{state}). Free space there, or give "
            "a directory that can be written: PretrainingData(cache_dir=...)."
        ) from error
    maps, damage = _load(entry, text)
    if maps is None:
        raise DataError(
            f"Index maps in {entry} {damage or 'vanished'} right after they were written: the file system loses what "
            "is written, or another process changes it. Give another directory: PretrainingData(cache_dir=...)."
        )
    return maps


def _load(entry: Path, description: str) -> tuple[IndexMaps | None, str]:
    """The maps of an entry, or None and what is wrong with it, which is nothing if there is no entry."""
    if not os.path.lexists(entry):
        return None, ""
    try:
        if _text(entry / _DESCRIPTION) != description:
            return None, "belong to other data"
        recorded = json.loads(_text(entry / _CHECKSUMS))
        files = recorded["files"]
        if recorded["digest"] != digest({"files": files, "description": description}):
            return None, f"are damaged ({_CHECKSUMS} has another checksum)"
        maps = {}
        for name, (crc32, *identity) in files.items():
            path = entry / f"{name}.npy"
            status = regular_file(path)
            # Reading large maps at every start would cost seconds; only a file that is no longer the one written is.
            known = status is not None and status.st_size > ALWAYS_CHECKED and [*file_identity(status)] == identity
            if status is None or (not known and file_crc32(path) != crc32):
                return None, f"are damaged ({path.name} is missing or has another checksum)"
            maps[name] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (DataError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return None, f"are damaged ({error})"
    return (maps, "") if maps else (None, "are damaged (there are none)")


def _text(path: Path) -> str:
    if regular_file(path) is None:
        raise DataError(f"{path.name} is missing")
    with path.open("rb") as file:
        return file.read(_LARGEST_TEXT).decode()


def _remove(entry: Path) -> None:
    """Take an entry away at once; processes that have mapped its files keep them."""
    aside = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent))
    try:
        entry.rename(aside / "damaged")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _store(entry: Path, description: str, maps: IndexMaps) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private; other users share the data
        files = {}
        for name, array in maps.items():
            path = partial / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            files[name] = [file_crc32(path), *file_identity(path.stat())]
        checksums = json.dumps({"files": files, "digest": digest({"files": files, "description": description})})
        for name, text in ((_DESCRIPTION, description), (_CHECKSUMS, checksums)):
            with (partial / name).open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        with suppress(FileExistsError, OSError):
            partial.rename(entry)
        if not entry.is_dir():
            raise OSError(0, f"{partial} could not be renamed to {entry}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock, and tell whether the file system has any; if not, the rename alone decides."""
    regular_file(path)  # opening a pipe would block
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
