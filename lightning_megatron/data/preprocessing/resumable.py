"""A writer of indexed datasets that can be killed and go on."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lightning_megatron.data.indexed import IndexedDatasetWriter, PathLike
from lightning_megatron.errors import DataError

_LENGTH = np.dtype(np.int32)
_BOUNDARY = np.dtype(np.int64)


@dataclass(frozen=True)
class Position:
    """How much of the partial files counts."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class ResumableWriter(IndexedDatasetWriter):
    """An :class:`IndexedDatasetWriter` whose partial files outlive the process.

    What was added up to a :meth:`flush` can be continued by a writer that is given the :attr:`position` of then; what
    came after is cut off.
    """

    def __init__(self, prefix: PathLike, dtype: type[np.number[Any]], position: Position) -> None:
        super().__init__(prefix, dtype, partial_suffix="partial", continued=position.tokens)
        self._sidecars = {
            "lengths": _open_at(_partial(prefix, "lengths"), position.sequences * _LENGTH.itemsize),
            "boundaries": _open_at(_partial(prefix, "boundaries"), position.documents * _BOUNDARY.itemsize),
        }
        if position.sequences:
            self._lengths.append(_read(self._sidecars["lengths"], _LENGTH))
        if position.documents:
            self._boundaries.append(_read(self._sidecars["boundaries"], _BOUNDARY))
        self.num_tokens, self.num_sequences = position.tokens, position.sequences
        self.num_documents = position.documents
        self._finished = False

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
        with self._explaining_disk_full():
            self._sidecars["lengths"].write(self._lengths[-1].tobytes())
            self._sidecars["boundaries"].write(self._boundaries[-1].tobytes())

    @property
    def position(self) -> Position:
        """How much has been added."""
        return Position(self.num_tokens, self.num_sequences, self.num_documents)

    def flush(self) -> None:
        """Make sure that all that was added is on the disk."""
        with self._explaining_disk_full():
            for file in (self._file, *self._sidecars.values()):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        super().close()
        for file in self._sidecars.values():
            file.close()
            Path(file.name).unlink()
        self._finished = True

    def discard(self) -> None:
        super().discard()
        for file in self._sidecars.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)
        self._finished = True

    def release(self) -> None:
        """Close the files and leave them for another run, unless the dataset is complete."""
        if not self._finished:
            for file in (self._file, *self._sidecars.values()):
                file.close()


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
        DataError: The interrupted run was another job.
    """
    if not path.is_file():
        return 0, [Position()] * outputs
    state = json.loads(path.read_text())
    if state["job"] != job:
        raise DataError(
            f"{path} belongs to an interrupted run with other inputs, tokenizer or options. Start that run again to "
            f"finish it, or remove {path.name} to begin anew."
        )
    return state["blocks"], [Position(**position) for position in state["positions"]]


def save_progress(path: Path, job: str, blocks: int, positions: Sequence[Position]) -> None:
    """Record that `blocks` blocks are in the partial files up to `positions`."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        json.dump({"job": job, "blocks": blocks, "positions": [asdict(position) for position in positions]}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
