"""Writing files so that a full disk or a directory that vanishes is one error, and nothing incomplete looks whole."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_megatron.errors import DataError


def flush(file: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def close_quietly(file: BinaryIO) -> None:
    """Close a file that is given up, whose buffer may no longer fit on the disk."""
    with suppress(OSError):
        file.close()


@contextmanager
def explaining_write_errors(output: Path) -> Iterator[None]:
    """Turn what the system says about writing `output` into one error.

    Raises:
        DataError: An :class:`OSError` was raised inside.
    """
    try:
        yield
    except OSError as error:
        directory = output.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):
                free = shutil.disk_usage(directory).free
                raise DataError(
                    f"The disk of {directory} is full ({free >> 20} MiB free) while writing {output.name}. Nothing "
                    "incomplete is taken for whole: free some space or choose another output, then start again."
                ) from error
        vanished = "" if directory.is_dir() else f"; the directory {directory} does not exist"
        raise DataError(
            f"{output} cannot be written ({error.strerror or error}{vanished}). Nothing incomplete is taken for "
            "whole: correct that or choose another output, then start again."
        ) from error


def publish(moves: Sequence[tuple[Path, Path]], outdated: Sequence[Path] = ()) -> None:
    """Give files their names, in order, in place of earlier ones and of `outdated`; all of them, or the earlier stay.

    The last name appears last, so it never stands beside earlier files.

    Raises:
        OSError: A file could not be renamed.
    """
    aside: list[tuple[Path, Path]] = []
    try:
        for path in [*[final for _, final in reversed(moves)], *outdated]:
            previous = path.with_name(f"{path.name}.previous")
            with suppress(FileNotFoundError):
                path.replace(previous)
                aside.append((path, previous))
        for partial, final in moves:
            partial.replace(final)
    except BaseException:
        for path, previous in reversed(aside):
            with suppress(OSError):
                previous.replace(path)
        raise
    for _, previous in aside:
        previous.unlink(missing_ok=True)
    for directory in {final.parent for _, final in moves}:
        _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    with suppress(OSError):  # not every file system can
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
