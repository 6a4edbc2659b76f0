"""Megatron's indexed dataset (`.bin` + `.idx`): reader, writer and merge, in numpy alone.

`prefix.bin` holds token ids back to back. `prefix.idx` says where they begin::

    b"MMIDIDX\\0\\0"  uint64 version=1  uint8 dtype code  uint64 S sequences  uint64 D+1 document boundaries
    int32[S] tokens per sequence   int64[S] byte offset of each sequence   int64[D+1] first sequence of each document
    (int8[S] modes, multimodal files only)

A document is one or more sequences (sentences, for BERT). The bytes equal those of
``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder``.
"""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.files import close_quietly, explaining_write_errors, flush, publish
from lightning_megatron.data.index_format import (
    DTYPE_CODES,
    HEADER,
    MAGIC,
    VERSION,
    PathLike,
    bin_path,
    idx_path,
)
from lightning_megatron.data.manifest import (
    BlockChecksums,
    Manifest,
    checked_index,
    manifest_path,
    record_path,
)
from lightning_megatron.errors import DataError

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "PathLike", "bin_path", "idx_path", "merge", "token_dtype"]

Reader = Literal["mmap", "lazy", "cached"]
TokenArray = NDArray[Any]

# Megatron keeps a margin below 2**16, so that a vocabulary may be padded without changing the file's type.
_UINT16_VOCABULARY = 65500
_MAX_SEQUENCE = np.iinfo(np.int32).max
_COPY_BYTES = 16 << 20


def token_dtype(vocab_size: int | None) -> type[np.number[Any]]:
    """Narrowest type that Megatron uses for token ids of this vocabulary: uint16 below 65500, else int32."""
    return np.uint16 if vocab_size is not None and vocab_size < _UINT16_VOCABULARY else np.int32


class IndexedDataset:
    """Read-only view of one indexed dataset.

    ``dataset[i]`` is sequence `i`, ``dataset.get(i, offset, length)`` a part of it, both as 1-D numpy arrays of
    ``dataset.dtype``. The object is pickled as its path, so data loader workers open the files themselves.

    Args:
        prefix: Path without `.bin` and `.idx`.
        reader: ``"mmap"`` maps the file; ``"lazy"`` reads it with `pread`, for file systems that map badly;
            ``"cached"`` holds all of it in memory.

    Raises:
        DataError: A file is missing, truncated, or not an index of this format, or any number of the index is wrong.
    """

    def __init__(self, prefix: PathLike, reader: Reader = "mmap") -> None:
        if reader not in get_args(Reader):
            raise DataError(f"reader={reader!r} is not known: use one of {', '.join(get_args(Reader))}.")
        self.prefix = Path(prefix)
        self.reader: Reader = reader
        self._open()

    def _open(self) -> None:
        index, self.idx_crc32 = checked_index(self.prefix)
        self.dtype = index.dtype
        self.sequence_lengths, self.sequence_pointers = index.lengths, index.pointers
        self.document_indices = index.boundaries
        self._bin_bytes = bin_path(self.prefix).stat().st_size
        self._tokens: TokenArray | None = None
        self._file: int | None = None
        if self.reader == "mmap" and self.num_tokens:
            self._tokens = np.memmap(bin_path(self.prefix), mode="r", dtype=self.dtype)
        elif self.reader == "cached":
            self._tokens = np.fromfile(bin_path(self.prefix), dtype=self.dtype)
        elif self.reader == "lazy":
            self._file = os.open(bin_path(self.prefix), os.O_RDONLY)

    def verify(self) -> bool:
        """Check the files whole, whatever was found before: the index, and all tokens against their checksums.

        Returns:
            Whether there are checksums. Datasets of other tools have none, and their tokens cannot be checked.

        Raises:
            DataError: Anything in the files is damaged.
        """
        checked_index(self.prefix, whole=True)
        return manifest_path(self.prefix).is_file()

    def require_token_ids(self) -> None:
        """Raise DataError if the file holds fractions, which no tokenizer makes."""
        if not np.issubdtype(self.dtype, np.integer):
            raise DataError(
                f"{idx_path(self.prefix)} says that its tokens are {self.dtype}, token ids are integers: it is damaged "
                "or holds no text. Preprocess the text again."
            )

    @property
    def num_tokens(self) -> int:
        """Tokens in the file."""
        return self._bin_bytes // self.dtype.itemsize

    @property
    def num_documents(self) -> int:
        """Documents in the file."""
        return len(self.document_indices) - 1

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> TokenArray:
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> TokenArray:
        """Tokens ``[offset, offset + length)`` of sequence `index`, to its end if `length` is None."""
        if length is None:
            length = int(self.sequence_lengths[index]) - offset
        itemsize = self.dtype.itemsize
        start = int(self.sequence_pointers[index]) // itemsize + offset
        if self._tokens is not None:
            return self._tokens[start : start + length]
        if self._file is None:  # an empty file cannot be mapped
            return np.empty(0, dtype=self.dtype)
        return np.frombuffer(self._read(self._file, start * itemsize, length * itemsize), dtype=self.dtype)

    def _read(self, file: int, start: int, size: int) -> bytes:
        pieces: list[bytes] = []
        while size:
            piece = os.pread(file, size, start)  # the system may return less than was asked for
            if not piece:
                raise DataError(
                    f"{bin_path(self.prefix)} ends at byte {start}, where {size} more are needed: it was truncated "
                    "while it was read. Copy it again, or preprocess the text again."
                )
            pieces.append(piece)
            start, size = start + len(piece), size - len(piece)
        return b"".join(pieces)

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "reader": self.reader}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.prefix = state["prefix"]
        self.reader = state["reader"]
        self._open()

    def __del__(self) -> None:
        file = self.__dict__.get("_file")
        if file is not None:
            os.close(file)


class IndexedDatasetWriter:
    """Writes an indexed dataset under temporary names and renames it when it is complete.

    As a context manager: leaving the block normally finishes the dataset, an exception removes what was written, and
    a killed process leaves only ``*.partial`` files, which nothing reads.

    Args:
        prefix: Path without `.bin` and `.idx`.
        dtype: Type of the token ids.
        partial_suffix: Ending of the temporary names; the process id by default.
        continued: Keep this many tokens of an earlier writer's temporary file.

    Raises:
        DataError: On any method: the disk is full, a token id does not fit `dtype`, a sequence exceeds 2**31-1 tokens.
    """

    def __init__(
        self,
        prefix: PathLike,
        dtype: type[np.number[Any]] = np.int32,
        *,
        partial_suffix: str | None = None,
        continued: int = 0,
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in DTYPE_CODES:
            raise DataError(
                f"dtype {self.dtype} has no code in the .idx format: use one of {', '.join(map(str, DTYPE_CODES))}."
            )
        suffix = partial_suffix or f"{os.getpid()}.partial"
        self._partial_bin = Path(f"{bin_path(prefix)}.{suffix}")
        self._partial_idx = Path(f"{idx_path(prefix)}.{suffix}")
        self._partial_manifest = Path(f"{manifest_path(prefix)}.{suffix}")
        with self._explaining_errors():
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._partial_bin.open("r+b" if continued else "wb")
        self._checksums = BlockChecksums()
        if continued:
            self._file.truncate(continued * self.dtype.itemsize)
            while piece := self._file.read(_COPY_BYTES):
                self._checksums.update(piece)
        self._lengths: list[NDArray[np.int32]] = []
        self._boundaries: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        self._begun_tokens = 0  # of a sequence that is not in the index yet
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0

    def add_document(self, tokens: Sequence[int] | TokenArray, lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: `[n]` token ids.
            lengths: Tokens of each of its sequences (sentences), adding up to `n`; None for a single sequence.
        """
        lengths = [len(tokens)] if lengths is None else lengths
        self.add_documents(tokens, lengths, [len(lengths)])

    def add_documents(
        self,
        tokens: Sequence[int] | TokenArray,
        sequence_lengths: Sequence[int] | NDArray[Any],
        sequences_per_document: Sequence[int] | NDArray[Any],
    ) -> None:
        """Append many documents: `[n]` tokens, `[s]` lengths adding up to `n`, `[d]` counts adding up to `s`."""
        lengths = np.array(sequence_lengths, dtype=np.int64)
        counts = np.asarray(sequences_per_document, dtype=np.int64)
        if lengths.sum() != len(tokens) or counts.sum() != len(lengths):
            raise DataError(
                f"{len(tokens)} tokens for sequence lengths adding up to {lengths.sum()}, and {len(lengths)} sequences "
                f"for documents adding up to {counts.sum()}: they have to agree."
            )
        if self._begun_tokens:
            lengths[0] += self._begun_tokens
        if len(lengths) and lengths.max() > _MAX_SEQUENCE:
            raise DataError(
                f"A sequence of {lengths.max()} tokens exceeds the format's limit of {_MAX_SEQUENCE}: split the "
                "document."
            )
        self._write(self._as_tokens(tokens).tobytes())
        self._append_index(lengths, np.cumsum(counts))
        self._begun_tokens = 0
        self.num_tokens += len(tokens)

    def add_part(self, tokens: Sequence[int] | TokenArray) -> None:
        """Append `[n]` tokens of a document that is continued by the first sequence of what is added next."""
        self._write(self._as_tokens(tokens).tobytes())
        self._begun_tokens += len(tokens)
        self.num_tokens += len(tokens)

    def add_dataset(self, prefix: PathLike) -> None:
        """Append a whole indexed dataset of the same dtype, as a byte copy that is checked where it has checksums."""
        part = IndexedDataset(prefix, reader="lazy")
        if part.dtype != self.dtype:
            raise DataError(
                f"{bin_path(prefix)} holds {part.dtype} tokens, {self.prefix} {self.dtype}: they cannot be merged."
            )
        manifest = Manifest.load(prefix)
        for block in _pieces(bin_path(prefix)) if manifest is None else manifest.blocks(prefix):
            self._write(block)
        self._append_index(part.sequence_lengths, part.document_indices[1:])
        self.num_tokens += part.num_tokens

    def _as_tokens(self, tokens: Sequence[int] | TokenArray) -> TokenArray:
        array = np.asarray(tokens)
        if array.dtype == self.dtype or not array.size:
            return array.astype(self.dtype, copy=False)
        if np.issubdtype(self.dtype, np.integer):
            limits = np.iinfo(self.dtype)
            if array.min() < limits.min or array.max() > limits.max:
                raise DataError(
                    f"Token ids {array.min()} to {array.max()} do not fit {self.dtype} ({limits.min} to {limits.max}): "
                    "the tokenizer produces more ids than its vocabulary size says; write with dtype int32."
                )
        return array.astype(self.dtype)

    def _append_index(self, lengths: NDArray[Any], boundaries: NDArray[Any]) -> None:
        self._lengths.append(lengths.astype(np.int32))
        self._boundaries.append(boundaries.astype(np.int64) + self.num_sequences)
        self.num_sequences += len(lengths)
        self.num_documents += len(boundaries)

    def _write(self, data: bytes) -> None:
        with self._explaining_errors():
            self._file.write(data)
        self._checksums.update(data)

    def _explaining_errors(self) -> AbstractContextManager[None]:
        return explaining_write_errors(self.prefix)

    def close(self) -> None:
        """Write index and checksums and give the files their names; the `.idx` comes last, so it never lacks them."""
        with self._explaining_errors():
            flush(self._file)
            self._file.close()
            idx_bytes, idx_crc32 = self._write_index()
            manifest = Manifest(idx_bytes, idx_crc32, self._checksums.num_bytes, self._checksums.blocks)
            with self._partial_manifest.open("wb") as file:
                file.write(manifest.text().encode())
                flush(file)
            publish(
                (
                    (self._partial_bin, bin_path(self.prefix)),
                    (self._partial_manifest, manifest_path(self.prefix)),
                    (self._partial_idx, idx_path(self.prefix)),
                ),
                outdated=(record_path(self.prefix),),
            )

    def _write_index(self) -> tuple[int, int]:
        """Write the index under its temporary name; returns its size and checksum."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        starts = np.cumsum(lengths, dtype=np.int64)
        starts -= lengths
        starts *= self.dtype.itemsize
        boundaries = np.concatenate(self._boundaries)
        header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype], len(lengths), len(boundaries))
        size = crc32 = 0
        with self._partial_idx.open("wb") as file:
            for part in (header, lengths.tobytes(), starts.tobytes(), boundaries.tobytes()):
                size, crc32 = size + file.write(part), zlib.crc32(part, crc32)
            flush(file)
        return size, crc32

    def discard(self) -> None:
        """Remove what was written."""
        close_quietly(self._file)
        for path in (self._partial_bin, self._partial_idx, self._partial_manifest):
            with suppress(OSError):  # such as of a directory that can no longer be written
                path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise


def merge(prefixes: Iterable[PathLike], output: PathLike) -> None:
    """Concatenate indexed datasets into one, in the given order.

    Raises:
        DataError: No input, inputs of different token types, or a damaged input.
    """
    prefixes = list(prefixes)
    if not prefixes:
        raise DataError("Nothing to merge: give at least one dataset prefix.")
    dtype = IndexedDataset(prefixes[0], reader="lazy").dtype
    with IndexedDatasetWriter(output, dtype.type) as writer:
        for prefix in prefixes:
            writer.add_dataset(prefix)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_COPY_BYTES):
            yield piece
