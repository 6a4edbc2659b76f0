"""Index maps cached on disk: built once, by one process, whoever starts first and whoever is killed."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.indexed import bin_path, idx_path
from lightning_megatron.errors import DataError

IndexMaps = Mapping[str, NDArray[Any]]


def fingerprint(prefix: Path) -> dict[str, int]:
    """What identifies the content of a dataset without reading it; a rewritten dataset invalidates its cached maps."""
    index = idx_path(prefix).stat()
    return {"idx_bytes": index.st_size, "idx_mtime_ns": index.st_mtime_ns, "bin_bytes": bin_path(prefix).stat().st_size}


def default_cache_dir(prefix: Path) -> Path:
    """Directory beside a dataset for its index maps."""
    return prefix.parent / f"{prefix.name}.index_maps"


def digest(description: Mapping[str, Any]) -> str:
    """Short name of what `description` describes."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]


def cached_maps(directory: Path, description: Mapping[str, Any], build: Callable[[], IndexMaps]) -> IndexMaps:
    """Load the index maps that belong to `description`, or build and store them.

    An entry is a directory of `.npy` files that is filled under a temporary name and renamed, so it is either whole or
    absent. A file lock, which the system drops when its owner dies, makes the processes of one start wait for the
    one that builds. Where the file system has no locks, several may build; the first rename wins.

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
    if not entry.is_dir():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _locked(directory / f"{entry.name}.lock") as alone:
                if alone:
                    for left_behind in directory.glob(f"{entry.name}.*.partial"):  # by one that was killed
                        shutil.rmtree(left_behind, ignore_errors=True)
                if not entry.is_dir():
                    _store(entry, text, build())
        except OSError as error:
            raise DataError(
                f"Index maps cannot be cached in {directory} ({error.strerror}). Free space there, or give a "
                "directory that can be written: PretrainingData(cache_dir=...)."
            ) from error
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(entry.glob("*.npy"))}


def _store(entry: Path, description: str, maps: IndexMaps) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private; other users share the data
        (partial / "description.json").write_text(description)
        for name, array in maps.items():
            with (partial / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
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
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
