"""Decompression in bounded pieces, however small a file is that expands to a large one."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lightning_megatron.errors import DataError

SUFFIXES = (".gz", ".zst")
# A block of three bytes may expand to 128 KiB, so this much expands to less than 22 MiB.
_ZSTD_READ_BYTES = 512


def decompress(path: Path, size: int) -> Iterator[tuple[bytes, int]]:
    """Pieces of about `size` decompressed bytes, and how far the compressed file was read.

    Raises:
        DataError: The file is damaged or truncated, or the package that reads it is missing.
    """
    with path.open("rb") as raw:
        pieces = _gunzip(raw, size) if path.suffix == ".gz" else _unzstd(raw, size)
        try:
            for piece in pieces:
                yield piece, raw.tell()
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(
                f"{path} cannot be decompressed ({error}): it is damaged or truncated, copy it again."
            ) from error


def _gunzip(raw: BinaryIO, size: int) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        while piece := stream.read(size):
            yield piece


def _unzstd(raw: BinaryIO, size: int) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError("Reading .zst files needs zstandard: pip install 'lightning-megatron[data]'.") from error
    decompressor = zstandard.ZstdDecompressor()
    # Not its stream reader, which takes a truncated file for a whole one.
    frame = decompressor.decompressobj()
    rest, begun = b"", False
    pieces = bytearray()
    while data := rest or raw.read(_ZSTD_READ_BYTES):
        try:
            pieces += frame.decompress(data)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        rest = frame.unused_data
        if frame.eof:
            frame = decompressor.decompressobj()
            begun = bool(rest)
        else:
            begun = True
        if len(pieces) >= size:
            view = memoryview(bytes(pieces))
            pieces.clear()
            for start in range(0, len(view), size):
                yield bytes(view[start : start + size])
    if pieces:
        yield bytes(pieces)
    if begun:
        raise EOFError("the last frame does not end")
