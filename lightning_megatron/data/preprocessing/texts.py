"""Text files as documents, read in pieces: memory does not grow with the file."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_megatron.data.preprocessing.compressed import SUFFIXES, decompress
from lightning_megatron.errors import DataError

_READ_BYTES = 1 << 20
_SEGMENT_BYTES = 64 << 10
# A character that is no white space, before a space or a line feed, in UTF-8. White space of several bytes (U+0085,
# U+00A0, U+1680, U+2000 to U+205F, U+3000) does not match.
_CUT = re.compile(
    rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|(?!\xe3\x80\x80)[\xe0\xe3-\xed][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})"
    rb"(?=[ \n])"
)


@dataclass(frozen=True)
class TextPart:
    """Documents of a text file, or with `cut` pieces of one document."""

    texts: tuple[bytes, ...]
    position: int
    """How far the file was read, in bytes on disk."""
    cut: bool = False
    continued: bool = False
    """The first text continues the document of the part before it."""
    unfinished: bool = False
    """The last text is continued by the next part."""


def document_too_long(where: str, limit: int) -> DataError:
    """The error of a document above the limit."""
    return DataError(
        f"{where} is longer than the limit of {limit} bytes for one document, which has to fit into memory. If it is "
        "meant to be that long, raise max_document_bytes (--max-document-bytes); otherwise the file is damaged, or its "
        "documents are not separated (--text-separator of a .txt, line feeds of a .jsonl)."
    )


def text_parts(path: Path, part_bytes: int, separator: str | None, limit: int, *, cut: bool) -> Iterator[TextPart]:
    """The documents of a text file that are not blank, in order, about `part_bytes` at a time.

    Args:
        path: Plain or compressed text.
        part_bytes: Size of a part.
        separator: Between documents; None takes the file for one document.
        limit: Bytes of one document that is not cut.
        cut: Whether a file without separator may be cut before white space.

    Raises:
        DataError: A document is longer than `limit`, or the file cannot be decompressed.
    """
    pieces = decompress(path, part_bytes) if path.suffix in SUFFIXES else _read(path, min(part_bytes, _READ_BYTES))
    if separator is None:
        yield from _whole(path, pieces, part_bytes, limit, cut=cut)
    else:
        yield from _separated(path, pieces, part_bytes, separator.encode(), limit)


def _read(path: Path, size: int) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece, file.tell()


def _whole(
    path: Path, pieces: Iterable[tuple[bytes, int]], part_bytes: int, limit: int, *, cut: bool
) -> Iterator[TextPart]:
    rest = bytearray()
    position, continued, wanted = 0, False, part_bytes
    for piece, position in pieces:
        rest += piece
        if cut and len(rest) >= wanted and (end := _last_cut(rest)):
            yield TextPart(_segments(bytes(memoryview(rest)[:end])), position, True, continued, unfinished=True)
            del rest[:end]
            continued, wanted = True, part_bytes
        elif cut and len(rest) >= wanted:
            wanted = 2 * len(rest)  # searched for a cut again when there is as much more
        if len(rest) > limit:
            raise document_too_long(f"{path}: the document", limit)
    if continued or rest.strip():
        whole = bytes(rest)
        yield TextPart(_segments(whole) if cut else (whole,), position, cut, continued)


def _segments(data: bytes) -> tuple[bytes, ...]:
    """Cut a piece further, because a tokenizer takes memory in proportion to the longest text it is given."""
    segments = []
    start = 0
    while (match := _CUT.search(data, start + _SEGMENT_BYTES)) is not None:
        segments.append(data[start : match.end()])
        start = match.end()
    segments.append(data[start:])
    return tuple(segments)


def _last_cut(data: bytearray) -> int:
    """Where the last piece that ends before white space ends; 0 if there is none."""
    for window in (1 << 12, 1 << 16, len(data)):
        end = 0
        for match in _CUT.finditer(data, max(0, len(data) - window)):
            end = match.end()
        if end:
            return end
    return 0


def _separated(
    path: Path, pieces: Iterable[tuple[bytes, int]], part_bytes: int, separator: bytes, limit: int
) -> Iterator[TextPart]:
    rest = bytearray()
    found: list[bytes] = []
    size = position = number = 0
    for piece, position in pieces:
        searched = max(0, len(rest) - len(separator) + 1)
        rest += piece
        if rest.find(separator, searched) >= 0:
            *whole, tail = bytes(rest).split(separator)
            rest = bytearray(tail)
            for text in whole:
                if len(text) > limit:
                    raise document_too_long(f"{path}: document {number + len(found)}", limit)
                if text.strip():
                    found.append(text)
                    size += len(text)
            if size >= part_bytes:
                yield TextPart(tuple(found), position)
                number, size, found = number + len(found), 0, []
        if len(rest) > limit:
            raise document_too_long(f"{path}: document {number + len(found)}", limit)
    if rest.strip():
        found.append(bytes(rest))
    if found:
        yield TextPart(tuple(found), position)
