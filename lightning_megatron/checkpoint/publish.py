"""How a directory gets its name, and loses it: at once, so that what has a name is always whole."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from lightning_megatron.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path of a file system, which every rank must see.

    Raises:
        CheckpointError: a URL, such as Lightning takes elsewhere.
    """
    scheme, separator, rest = os.fspath(path).partition("://")
    if separator and scheme != "file":
        raise CheckpointError(
            f"{path} is a URL, but checkpoints are directories that all ranks write into. Give a path of a file "
            "system that all of them see, and copy it from there."
        )
    return Path(rest if separator else path)


def partial_path(path: Path) -> Path:
    """Where the checkpoint for ``path`` is written. Lightning looks at no hidden names."""
    return path.with_name(f".{path.name}.partial")


def publish(source: Path, target: Path) -> None:
    """Put ``source`` in ``target``'s place; what was there before is removed after."""
    if target.is_symlink():
        target.unlink()  # as ModelCheckpoint(save_last="link") makes
    if not target.exists():
        os.rename(source, target)
    elif _exchange(source, target):
        remove(source)
    else:
        # A file system without an exchange: between the two renames neither has the name, and `recover` gives it back.
        old = _old_path(target)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(source, target)
        remove(old)
    _sync(target.parent)


def remove(path: Path) -> None:
    """Take the name away, then the contents."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    if not path.exists():
        return
    doomed = path.with_name(f".{path.name.removeprefix('.')}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(path: Path) -> None:
    """Give a checkpoint its name back if a process died between two renames."""
    old = _old_path(path)
    if not path.exists() and old.exists():
        os.rename(old, path)


def sync_files(directory: Path) -> None:
    """Let all files of a directory, and their names, reach the disk."""
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _old_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, if the system and the file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
