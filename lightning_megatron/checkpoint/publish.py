"""How a directory gets its name, and loses it: at once, so that what has a name is always whole."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_megatron.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LEFT_BEHIND = re.compile(r"\..+\.[0-9a-f]{8}\.(partial|removed)")
_OLD_LEFT_BEHIND = re.compile(r"\..+\.ckpt\.removed")
"""As releases before checkpoint format 3 named them."""
_STALE = 24 * 3600.0
"""Seconds without a change after which a partial checkpoint is stale on a file system without locks."""


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


def partial_path(path: Path, unique: str = "") -> Path:
    """Where the checkpoint for ``path`` is written. Lightning looks at no hidden names.

    Args:
        unique: eight hexadecimal digits that keep apart two runs which save under the same name.
    """
    return path.with_name(f".{path.name}.{unique}.partial" if unique else f".{path.name}.partial")


@contextmanager
def new_partial(partial: Path) -> Iterator[None]:
    """Make an empty directory, and lock it so that no other run takes it for one that a killed process left behind."""
    remove(partial)
    partial.mkdir(parents=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def publish(source: Path, target: Path) -> None:
    """Put ``source`` in ``target``'s place; what was there before is removed after."""
    if not os.path.lexists(target):
        os.rename(source, target)
    elif _exchange(source, target):
        remove(source)
    elif target.is_symlink():  # as ModelCheckpoint(save_last="link") makes
        target.unlink()
        os.rename(source, target)
    else:
        # A file system without an exchange: between the two renames neither has the name, and `recover` gives it back.
        old = _old_path(target)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(source, target)
        remove(old)
    _sync(target.parent)


def remove(path: Path) -> None:
    """Take the name away, then the contents. A path that is not there, or that another process removes, is no error."""
    with suppress(FileNotFoundError):
        if path.is_symlink() or path.is_file():
            path.unlink()
            return
        doomed = path.with_name(f".{path.name.removeprefix('.')}.{secrets.token_hex(4)}.removed")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean_up(directory: Path) -> None:
    """Remove what killed processes left behind while they saved or removed a checkpoint of ``directory``."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_symlink() or not path.is_dir():
            continue
        if _OLD_LEFT_BEHIND.fullmatch(path.name) or (_LEFT_BEHIND.fullmatch(path.name) and not _in_use(path)):
            shutil.rmtree(path, ignore_errors=True)


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


def _in_use(path: Path) -> bool:
    """Whether a process that lives holds the lock of a partial checkpoint, or may hold it."""
    if path.name.endswith(".removed"):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True  # it is gone or not ours
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return time.time() - os.fstat(descriptor).st_mtime < _STALE
    finally:
        os.close(descriptor)


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
