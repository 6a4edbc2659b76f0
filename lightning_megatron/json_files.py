"""Reads JSON files that others wrote: regular files of a bounded size, strict JSON, no recursion errors."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

LIMIT = 16 * 2**20
"""Bytes that are read of one file. The longest configurations, with thousands of labels, have a tenth of it."""


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file, links followed.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a directory, a device or a pipe, which could have no end.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file, but a directory, a device, a pipe or a link to one")
    return found.st_size


def read_bounded(path: Path, limit: int = LIMIT) -> bytes:
    """The contents of a regular file of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not a regular file, or a larger one.
    """
    size = check_regular(path)
    if size <= limit:
        with open(path, "rb") as file:
            content = file.read(limit + 1)  # files of /proc have a size of 0
        if len(content) <= limit:
            return content
        size = len(content)
    raise ValueError(f"it has {size:,} bytes, and at most {limit:,} are read of such a file")


def read_object(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not a regular file, a larger one, or no strict JSON object: NaN, infinite numbers and names that
            come twice in one object are refused.
    """
    return parse_object(read_bounded(path, limit))


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in the text ``content``.

    Raises:
        ValueError: no strict JSON object; see :func:`read_object`.
    """
    try:
        found = json.loads(
            content.decode(), parse_constant=_constant, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not an object with fields")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.80} comes twice")
        found[name] = value
    return found
