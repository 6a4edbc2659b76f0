"""Megatron's indexed dataset (`.bin` + `.idx`): reader, writer and merge, in numpy alone.

`prefix.bin` holds token ids back to back. `prefix.idx` says where they begin::

    b"MMIDIDX\\0\\0"  uint64 version=1  uint8 dtype code  uint64 S sequences  uint64 D+1 document boundaries
    int32[S] tokens per sequence   int64[S] byte offset of each sequence   int64[D+1] first sequence of each document
    (int8[S] modes, multimodal files only)

A document is one or more sequences (sentences, for BERT). The bytes equal those of
``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder``.
"""

import errno
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.errors import DataError

Reader = Literal["mmap", "lazy", "cached"]
TokenArray = NDArray[Any]
PathLike = str | os.PathLike[str]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.number[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
# Megatron keeps a margin below 2**16, so that a vocabulary may be padded without changing the file's type.
_UINT16_VOCABULARY = 65500
_MAX_SEQUENCE = np.iinfo(np.int32).max


def bin_path(prefix: PathLike) -> Path:
    """Path of the token file of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: PathLike) -> Path:
    """Path of the index file of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.idx")


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
        DataError: A file is missing, truncated, or not an index of this format.
    """

    def __init__(self, prefix: PathLike, reader: Reader = "mmap") -> None:
        if reader not in get_args(Reader):
            raise DataError(f"reader={reader!r} is not known: use one of {', '.join(get_args(Reader))}.")
        self.prefix = Path(prefix)
        self.reader: Reader = reader
        self._open()

    def _open(self) -> None:
        for path in (bin_path(self.prefix), idx_path(self.prefix)):
            if not path.is_file():
                raise DataError(
                    f"{path} does not exist. An indexed dataset is the two files {self.prefix.name}.bin and "
                    f"{self.prefix.name}.idx; give their common prefix, and create them with `lightning-megatron "
                    "preprocess`."
                )
        self.dtype, num_sequences, num_boundaries = self._read_header()
        index: NDArray[np.uint8] = np.memmap(idx_path(self.prefix), mode="r", dtype=np.uint8)
        start = _HEADER.size
        self.sequence_lengths: NDArray[np.int32] = np.frombuffer(index, np.int32, num_sequences, start)
        start += self.sequence_lengths.nbytes
        self.sequence_pointers: NDArray[np.int64] = np.frombuffer(index, np.int64, num_sequences, start)
        start += self.sequence_pointers.nbytes
        self.document_indices: NDArray[np.int64] = np.frombuffer(index, np.int64, num_boundaries, start)
        self._check_extent()
        self._tokens: TokenArray | None = None
        self._file: int | None = None
        if self.reader == "mmap" and self.num_tokens:
            self._tokens = np.memmap(bin_path(self.prefix), mode="r", dtype=self.dtype)
        elif self.reader == "cached":
            self._tokens = np.fromfile(bin_path(self.prefix), dtype=self.dtype)
        elif self.reader == "lazy":
            self._file = os.open(bin_path(self.prefix), os.O_RDONLY)

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        path = idx_path(self.prefix)
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise DataError(
                f"{path} is truncated: {size} bytes, {_HEADER.size} needed for its header. Preprocess it again."
            )
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise DataError(
                f"{path} is not a Megatron index: magic {magic!r}, version {version}, dtype code {code}; needed "
                f"{_MAGIC!r}, 1, and 1 to {max(_DTYPES)}. Preprocess the text again."
            )
        needed = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
        # Multimodal files append one int8 mode a sequence; training on text ignores them.
        if size not in (needed, needed + num_sequences):
            raise DataError(
                f"{path} is damaged: {num_sequences} sequences and {num_boundaries} document boundaries need "
                f"{needed} bytes, the file has {size}. Copy it again, or preprocess the text again."
            )
        return np.dtype(_DTYPES[code]), num_sequences, num_boundaries

    def _check_extent(self) -> None:
        """The `.bin` has exactly the bytes that the index describes, and the documents cover all sequences."""
        needed = 0
        if len(self):
            needed = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        path = bin_path(self.prefix)
        size = path.stat().st_size
        if size != needed:
            raise DataError(
                f"{path} does not belong to its index: the index describes {needed} bytes, the file has {size}. "
                "It was truncated or replaced: copy both files again, or preprocess the text again."
            )
        if not len(self.document_indices) or self.document_indices[0] != 0 or self.document_indices[-1] != len(self):
            raise DataError(
                f"{idx_path(self.prefix)} is damaged: its documents do not cover its {len(self)} sequences. "
                "Preprocess it again."
            )

    def verify(self) -> None:
        """Check every offset and boundary of the index (the constructor checks the ends only).

        Raises:
            DataError: An offset or boundary that no writer produces.
        """
        ends = np.cumsum(self.sequence_lengths, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate(([0], ends[:-1])) if len(self) else ends
        if not np.array_equal(starts, self.sequence_pointers):
            bad = int(np.argmax(starts != self.sequence_pointers))
            raise DataError(
                f"{idx_path(self.prefix)} is damaged: sequence {bad} begins at byte {self.sequence_pointers[bad]}, "
                f"the lengths before it add up to {starts[bad]}. Preprocess the text again."
            )
        if np.any(self.sequence_lengths < 0) or np.any(np.diff(self.document_indices) < 0):
            raise DataError(
                f"{idx_path(self.prefix)} is damaged: negative lengths or documents. Preprocess the text again."
            )

    @property
    def num_tokens(self) -> int:
        """Tokens in the file."""
        return bin_path(self.prefix).stat().st_size // self.dtype.itemsize

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
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize + offset
        if self._tokens is not None:
            return self._tokens[start : start + length]
        if self._file is None:  # an empty file cannot be mapped
            return np.empty(0, dtype=self.dtype)
        data = os.pread(self._file, length * self.dtype.itemsize, start * self.dtype.itemsize)
        return np.frombuffer(data, dtype=self.dtype)

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
        if self.dtype not in _CODES:
            raise DataError(
                f"dtype {self.dtype} has no code in the .idx format: use one of {', '.join(map(str, _CODES))}."
            )
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        suffix = partial_suffix or f"{os.getpid()}.partial"
        self._partial_bin = Path(f"{bin_path(prefix)}.{suffix}")
        self._partial_idx = Path(f"{idx_path(prefix)}.{suffix}")
        self._file: BinaryIO = self._partial_bin.open("r+b" if continued else "wb")
        if continued:
            self._file.truncate(continued * self.dtype.itemsize)
            self._file.seek(0, os.SEEK_END)
        self._lengths: list[NDArray[np.int32]] = []
        self._boundaries: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
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
        lengths = np.asarray(sequence_lengths, dtype=np.int64)
        counts = np.asarray(sequences_per_document, dtype=np.int64)
        if lengths.sum() != len(tokens) or counts.sum() != len(lengths):
            raise DataError(
                f"{len(tokens)} tokens for sequence lengths adding up to {lengths.sum()}, and {len(lengths)} sequences "
                f"for documents adding up to {counts.sum()}: they have to agree."
            )
        if len(lengths) and lengths.max() > _MAX_SEQUENCE:
            raise DataError(
                f"A sequence of {lengths.max()} tokens exceeds the format's limit of {_MAX_SEQUENCE}: split the "
                "document."
            )
        self._write(self._as_tokens(tokens).tobytes())
        self._append_index(lengths, np.cumsum(counts))
        self.num_tokens += len(tokens)

    def add_dataset(self, prefix: PathLike) -> None:
        """Append a whole indexed dataset of the same dtype, as a byte copy."""
        part = IndexedDataset(prefix, reader="lazy")
        if part.dtype != self.dtype:
            raise DataError(
                f"{bin_path(prefix)} holds {part.dtype} tokens, {self.prefix} {self.dtype}: they cannot be merged."
            )
        with bin_path(prefix).open("rb") as source, self._explaining_disk_full():
            shutil.copyfileobj(source, self._file, 16 << 20)
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
        with self._explaining_disk_full():
            self._file.write(data)

    def _explaining_disk_full(self) -> AbstractContextManager[None]:
        return _explaining_disk_full(self.prefix)

    def close(self) -> None:
        """Write the index and give both files their names; the `.idx` comes last, so it never lacks its `.bin`."""
        with self._explaining_disk_full():
            _flush(self._file)
            self._file.close()
            lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            boundaries = np.concatenate(self._boundaries)
            with self._partial_idx.open("wb") as file:
                file.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], len(lengths), len(boundaries)))
                file.write(lengths.tobytes())
                file.write((ends - lengths.astype(np.int64) * self.dtype.itemsize).tobytes())
                file.write(boundaries.tobytes())
                _flush(file)
        idx_path(self.prefix).unlink(missing_ok=True)
        self._partial_bin.replace(bin_path(self.prefix))
        self._partial_idx.replace(idx_path(self.prefix))

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial_bin.unlink(missing_ok=True)
        self._partial_idx.unlink(missing_ok=True)

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


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _explaining_disk_full(prefix: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(prefix.parent).free
        raise DataError(
            f"The disk of {prefix.parent} is full ({free >> 20} MiB free) while writing {prefix.name}. Nothing "
            "incomplete is taken for whole: free some space or choose another output, then start again."
        ) from error
