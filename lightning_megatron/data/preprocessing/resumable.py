"""A writer of indexed datasets that can be killed and go on."""

import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.files import close_quietly, explaining_write_errors, flush
from lightning_megatron.data.index_format import regular_file
from lightning_megatron.data.indexed import IndexedDatasetWriter, PathLike
from lightning_megatron.errors import DataError

_LENGTH = np.dtype(np.int32)
_BOUNDARY = np.dtype(np.int64)
_LARGEST_PROGRESS = 1 << 20


@dataclass(frozen=True)
class Position:
    """How much of the partial files counts, and the checksums of that much."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0
    bin_crc32: int = 0
    lengths_crc32: int = 0
    boundaries_crc32: int = 0


class ResumableWriter(IndexedDatasetWriter):
    """An :class:`IndexedDatasetWriter` whose partial files outlive the process.

    What was added up to a :meth:`flush` can be continued by a writer that is given the :attr:`position` of then; what
    came after is cut off.

    Raises:
        DataError: The partial files are not those that `position` describes.
    """

    def __init__(self, prefix: PathLike, dtype: type[np.number[Any]], position: Position) -> None:
        super().__init__(prefix, dtype, partial_suffix="partial", continued=position.tokens)
        with self._explaining_errors():
            self._sidecars = {
                "lengths": _open_at(_partial(prefix, "lengths"), position.sequences * _LENGTH.itemsize),
                "boundaries": _open_at(_partial(prefix, "boundaries"), position.documents * _BOUNDARY.itemsize),
            }
        self._lengths_crc32 = self._boundaries_crc32 = 0
        if position.sequences:
            self._lengths.append(_read(self._sidecars["lengths"], _LENGTH))
            self._lengths_crc32 = zlib.crc32(self._lengths[-1].tobytes())
        if position.documents:
            self._boundaries.append(_read(self._sidecars["boundaries"], _BOUNDARY))
            self._boundaries_crc32 = zlib.crc32(self._boundaries[-1].tobytes())
        self.num_tokens, self.num_sequences = position.tokens, position.sequences
        self.num_documents = position.documents
        self._begun_tokens = position.tokens - sum(int(lengths.sum(dtype=np.int64)) for lengths in self._lengths)
        self._finished = False
        if self.position != position:
            self.release()
            raise DataError(
                f"The unfinished files {self.prefix.name}.*.partial of an interrupted run are damaged: checksums "
                f"differ from those in its progress.json. Remove the progress.json in {self.prefix.parent} to begin "
                "anew; what the interrupted run has done is lost."
            )

    @staticmethod
    def can_continue(prefix: PathLike, dtype: np.dtype[Any], position: Position) -> bool:
        """Whether the partial files reach `position`; not if the process was killed while it gave them their names."""
        needed = {
            "bin": position.tokens * dtype.itemsize,
            "lengths": position.sequences * _LENGTH.itemsize,
            "boundaries": position.documents * _BOUNDARY.itemsize,
        }
        paths = {name: _partial(prefix, name) for name in needed}
        return all(
            not size or (paths[name].is_file() and paths[name].stat().st_size >= size) for name, size in needed.items()
        )

    def _append_index(self, lengths: NDArray[Any], boundaries: NDArray[Any]) -> None:
        super()._append_index(lengths, boundaries)
        with self._explaining_errors():
            self._sidecars["lengths"].write(data := self._lengths[-1].tobytes())
            self._lengths_crc32 = zlib.crc32(data, self._lengths_crc32)
            self._sidecars["boundaries"].write(data := self._boundaries[-1].tobytes())
            self._boundaries_crc32 = zlib.crc32(data, self._boundaries_crc32)

    @property
    def position(self) -> Position:
        """How much has been added."""
        return Position(
            self.num_tokens,
            self.num_sequences,
            self.num_documents,
            self._checksums.crc32,
            self._lengths_crc32,
            self._boundaries_crc32,
        )

    def flush(self) -> None:
        """Make sure that all that was added is on the disk."""
        with self._explaining_errors():
            for file in (self._file, *self._sidecars.values()):
                flush(file)

    def close(self) -> None:
        super().close()
        self._remove_sidecars()

    def discard(self) -> None:
        super().discard()
        self._remove_sidecars()

    def _remove_sidecars(self) -> None:
        for file in self._sidecars.values():
            close_quietly(file)
            with suppress(OSError):
                Path(file.name).unlink(missing_ok=True)
        self._finished = True

    def release(self) -> None:
        """Close the files and leave them for another run, unless the dataset is complete."""
        if not self._finished:
            for file in (self._file, *self._sidecars.values()):
                close_quietly(file)


def _partial(prefix: PathLike, name: str) -> Path:
    return Path(f"{os.fspath(prefix)}.{name}.partial")


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open for appending behind the first `size` bytes, cutting off the rest."""
    file = path.open("r+b" if size else "w+b")
    file.truncate(size)
    file.seek(0)
    return file


def _read(file: BinaryIO, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(file.read(), dtype=dtype)


def load_progress(path: Path, job: str, outputs: int) -> tuple[int, list[Position]]:
    """Blocks done and the position of each output of an interrupted run of `job`; zero if there was none.

    Raises:
        DataError: The interrupted run was another job, or the file is damaged.
    """
    if regular_file(path) is None:
        return 0, [Position()] * outputs
    try:
        with path.open("rb") as file:
            state = json.loads(file.read(_LARGEST_PROGRESS))
        found = state["job"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"it holds no record of a run ({type(error).__name__}: {error})") from error
    if found != job:
        raise DataError(
            f"{path} belongs to an interrupted run with other inputs, tokenizer or options. Start that run again to "
            f"finish it, or remove {path.name} to begin anew."
        )
    try:
        blocks, positions = state["blocks"], [Position(**position) for position in state["positions"]]
        checksum, computed = state["crc32"], _crc32(job, blocks, positions)
    except (TypeError, KeyError) as error:
        raise _damaged(path, f"it holds no record of a run ({type(error).__name__}: {error})") from error
    if checksum != computed or len(positions) != outputs:
        raise _damaged(path, f"its checksum is {computed}, {checksum} was written")
    return blocks, positions


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is damaged: {what}. Remove {path.name} to begin anew; what an interrupted run has done is lost."
    )


def _crc32(job: str, blocks: int, positions: Sequence[Position]) -> int:
    return zlib.crc32(json.dumps([job, blocks, [asdict(position) for position in positions]]).encode())


def save_progress(path: Path, job: str, blocks: int, positions: Sequence[Position]) -> None:
    """Record that `blocks` blocks are in the partial files up to `positions`."""
    partial = path.with_suffix(".partial")
    state = {"job": job, "blocks": blocks, "positions": [asdict(position) for position in positions]}
    with explaining_write_errors(path):
        with partial.open("wb") as file:
            file.write(json.dumps({**state, "crc32": _crc32(job, blocks, positions)}).encode())
            flush(file)
        partial.replace(path)
