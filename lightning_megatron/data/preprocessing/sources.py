"""Input files as blocks of documents that workers read by themselves.

A block is a few megabytes of one file. Where the blocks begin depends on the files alone, so that any number of workers
produces the same output, and a restarted run finds the block at which to go on.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lightning_megatron.data.index_format import PathLike
from lightning_megatron.data.preprocessing.compressed import SUFFIXES as _COMPRESSED
from lightning_megatron.data.preprocessing.compressed import decompress
from lightning_megatron.data.preprocessing.texts import document_too_long, text_parts
from lightning_megatron.errors import DataError

Kind = Literal["jsonl", "text", "parquet", "dataset"]
Text = str | list[str]
"""A document: a text, or its sentences."""

_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
MAX_DOCUMENT_BYTES = 256 << 20
_SCAN_BYTES = 1 << 20
_ROWS_PER_BLOCK = 1000


@dataclass(frozen=True)
class Block:
    """Part of one input file, small enough to send to a worker."""

    path: Path
    kind: Kind
    start: int
    """First byte of a plain file, row of a data set, row group of a Parquet file, or decompressed byte."""
    stop: int
    data: bytes | None = None
    """The lines themselves, if they could not be read from the middle of the file."""
    texts: tuple[bytes, ...] = ()
    """Documents of a text file, or with `cut` pieces of one document."""
    cut: bool = False
    continued: bool = False
    """The text continues the document of the block before it."""
    unfinished: bool = False
    """The document is continued in the next block."""
    input_bytes: int = 0
    """How much of the input files it is, for progress."""
    limit: int = MAX_DOCUMENT_BYTES
    """Bytes of the longest document."""

    def lines(self) -> tuple[int, bytes]:
        """The whole lines that begin in ``[start, stop)``, and where the first of them begins.

        Raises:
            DataError: A line is longer than the limit.
        """
        start, data = (self.start, self.data) if self.data is not None else self._read_lines()
        if len(data) > self.limit:
            offset = start
            for line in data.split(b"\n"):
                if len(line) > self.limit:
                    raise self._too_long(offset)
                offset += len(line) + 1
        return start, data

    def _read_lines(self) -> tuple[int, bytes]:
        with self.path.open("rb") as file:
            begin = self._line_end(file, self.start - 1) if self.start else 0
            if begin >= self.stop:
                return begin, b""
            # The last line that begins inside may end far outside.
            end = self._line_end(file, self.stop - 1)
            file.seek(begin)
            return begin, file.read(end - begin)

    def _line_end(self, file: BinaryIO, position: int) -> int:
        """Where the line that holds the byte at `position` ends, behind its line feed."""
        file.seek(position)
        end = position
        while piece := file.read(_SCAN_BYTES):
            found = piece.find(b"\n")
            if found >= 0:
                return end + found + 1
            end += len(piece)
            if end - position > self.limit:
                raise self._too_long(position)
        return end

    def _too_long(self, offset: int) -> DataError:
        return document_too_long(f"{self.path}, the line that holds byte {offset},", self.limit)


def input_bytes(paths: Sequence[PathLike]) -> int:
    """Size of all inputs as they are on disk.

    Raises:
        DataError: A file is missing.
    """
    total = 0
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"The input {path} does not exist.")
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def blocks(
    paths: Sequence[PathLike],
    block_bytes: int,
    separator: str | None = None,
    *,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    cut_texts: bool = False,
) -> Iterator[Block]:
    """The blocks of all inputs, in order.

    Args:
        paths: JSON lines or text, plain, `.gz` or `.zst`; Parquet; directories of `datasets.save_to_disk`.
        block_bytes: Size of a block of text before tokenization.
        separator: Between the documents of a text file; None takes each text file for one document.
        max_document_bytes: Limit of a document, and of a line of JSON.
        cut_texts: Whether a text file that is one document may become several blocks, cut before white space.

    Raises:
        DataError: An input of unknown kind, one that cannot be decompressed, or a document above the limit.
    """
    for path in map(Path, paths):
        kind = _kind(path)
        if kind == "dataset":
            yield from _dataset_blocks(path)
        elif kind == "parquet":
            yield from _parquet_blocks(path)
        elif kind == "text":
            yield from _text_blocks(path, block_bytes, separator, max_document_bytes, cut=cut_texts)
        elif path.suffix in _COMPRESSED:
            yield from _compressed_blocks(path, block_bytes, max_document_bytes)
        else:
            size = path.stat().st_size
            for start in range(0, size, block_bytes):
                stop = min(start + block_bytes, size)
                yield Block(path, kind, start, stop, input_bytes=stop - start, limit=max_document_bytes)


def documents(block: Block, keys: Sequence[str]) -> list[list[Text]]:
    """The documents of a block: one list for each key, all of the same length; of a cut document its pieces.

    Raises:
        DataError: A line that is no JSON object, or a document without one of the keys.
    """
    if block.kind == "parquet":
        return _parquet_documents(block, keys)
    if block.kind == "dataset":
        rows = _load_dataset(block.path)[block.start : block.stop]
        return [_column(rows, key, block.path) for key in keys]
    if block.kind == "text":
        return [[text.decode(errors="replace") for text in block.texts] for _ in keys]
    columns: list[list[Text]] = [[] for _ in keys]
    offset, raw = block.lines()
    for line in raw.split(b"\n"):
        if line and not line.isspace():
            where = f"{block.path}, the line at byte {offset}"
            document = _parse(line, where)
            for column, key in zip(columns, keys, strict=True):
                column.append(_text(document, key, where))
        offset += len(line) + 1
    return columns


def _kind(path: Path) -> Kind:
    if path.is_dir():
        return "dataset"
    name = path.with_suffix("") if path.suffix in _COMPRESSED else path
    kind = _SUFFIXES.get(name.suffix.lower())
    if kind is None or (kind == "parquet" and path.suffix in _COMPRESSED):
        raise DataError(
            f"The input {path} has no known ending: give {', '.join(_SUFFIXES)}, the text formats also with "
            f"{' or '.join(_COMPRESSED)}, or a directory that datasets.save_to_disk wrote."
        )
    return kind


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}, is not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(document, dict):
        raise DataError(f"{where}, is no JSON object: {line[:80]!r}")
    return document


def _text(document: dict[str, Any], key: str, where: str) -> Text:
    text = document.get(key)
    if isinstance(text, str) or (isinstance(text, list) and all(isinstance(part, str) for part in text)):
        return text
    raise DataError(
        f"{where}: the key {key!r} holds {type(text).__name__}, needed a text or a list of texts. The document has "
        f"the keys {', '.join(sorted(document)) or 'none'}."
    )


def _column(columns: dict[str, list[Any]], key: str, path: Path) -> list[Text]:
    if key not in columns:
        raise DataError(f"{path} has no column {key!r}; it has {', '.join(columns)}.")
    return [_text({key: value}, key, str(path)) for value in columns[key]]


# ------------------------------------------------------------------ formats that take more than reading lines


def _compressed_blocks(path: Path, block_bytes: int, limit: int) -> Iterator[Block]:
    rest: list[bytes] = []
    size = start = read = 0
    block = Block(path, "jsonl", 0, 0, limit=limit)
    for piece, position in decompress(path, block_bytes):
        lines, found, tail = piece.rpartition(b"\n")
        if not found:
            rest.append(piece)
            size += len(piece)
            if size > limit:
                raise document_too_long(f"{path}, the line that holds byte {start} of the decompressed text,", limit)
            continue
        data = b"".join((*rest, lines, b"\n"))
        yield replace(block, start=start, stop=start + len(data), data=data, input_bytes=position - read)
        rest, size, start, read = [tail], len(tail), start + len(data), position
    if data := b"".join(rest):
        yield replace(block, start=start, stop=start + len(data), data=data, input_bytes=path.stat().st_size - read)


def _text_blocks(path: Path, block_bytes: int, separator: str | None, limit: int, *, cut: bool) -> Iterator[Block]:
    read = number = 0
    for part in text_parts(path, block_bytes, separator, limit, cut=cut):
        yield Block(
            path,
            "text",
            number,
            number + len(part.texts),
            texts=part.texts,
            cut=part.cut,
            continued=part.continued,
            unfinished=part.unfinished,
            input_bytes=part.position - read,
        )
        read, number = part.position, number + len(part.texts)


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"Reading {path.name} needs pyarrow: pip install 'lightning-megatron[data]'.") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}): copy it again.") from error


def _parquet_blocks(path: Path) -> Iterator[Block]:
    groups = _parquet_file(path).num_row_groups
    size = path.stat().st_size
    for group in range(groups):
        yield Block(path, "parquet", group, group + 1, input_bytes=size // groups)


def _parquet_documents(block: Block, keys: Sequence[str]) -> list[list[Text]]:
    file = _parquet_file(block.path)
    known = file.schema_arrow.names
    if missing := [key for key in keys if key not in known]:
        raise DataError(f"{block.path} has no column {missing[0]!r}; it has {', '.join(known)}.")
    table = file.read_row_group(block.start, columns=list(keys)).to_pydict()
    return [_column(table, key, block.path) for key in keys]


def _load_dataset(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"Reading {path} needs datasets: pip install 'lightning-megatron[data]'.") from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} is no directory that datasets.save_to_disk wrote ({error}).") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(
            f"{path} holds the splits {', '.join(dataset)}: give one of them, such as {path / next(iter(dataset))}."
        )
    return dataset


def _dataset_blocks(path: Path) -> Iterator[Block]:
    rows = len(_load_dataset(path))
    size = input_bytes([path])
    for start in range(0, rows, _ROWS_PER_BLOCK):
        stop = min(start + _ROWS_PER_BLOCK, rows)
        yield Block(path, "dataset", start, stop, input_bytes=size * (stop - start) // rows)
