"""Checksums beside a dataset: when files are checked, and when an earlier check holds."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_megatron.data import cache, manifest
from lightning_megatron.data.index_format import Index
from lightning_megatron.data.indexed import IndexedDataset, bin_path, idx_path
from lightning_megatron.data.manifest import BLOCK_BYTES, BlockChecksums, Manifest, manifest_path, record_path
from lightning_megatron.data.preprocessing.resumable import Position, ResumableWriter
from lightning_megatron.errors import DataError
from tests.data.corpora import write_random_dataset


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The indices that were checked number by number, with every file treated as a large one."""
    monkeypatch.setattr(manifest, "ALWAYS_CHECKED", 0)
    monkeypatch.setattr(cache, "ALWAYS_CHECKED", 0)
    found: list[Path] = []
    check = Index.check

    def counted(self: Index, bin_bytes: int) -> None:
        found.append(self.path)
        check(self, bin_bytes)

    monkeypatch.setattr(Index, "check", counted)
    return found


def settle(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the files be older than the resolution of time stamps."""
    now = time.time_ns()
    monkeypatch.setattr(manifest.time, "time_ns", lambda: now + 5_000_000_000)


@pytest.mark.parametrize("ours", [True, False])
def test_a_large_index_is_checked_once(
    dataset_prefix: Path, checks: list[Path], monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    if not ours:
        manifest_path(dataset_prefix).unlink()
    IndexedDataset(dataset_prefix)
    assert len(checks) == 1
    IndexedDataset(dataset_prefix)
    assert len(checks) == 2  # the files are so new that they may have changed unnoticed
    settle(dataset_prefix, monkeypatch)
    IndexedDataset(dataset_prefix)
    first = IndexedDataset(dataset_prefix)
    assert len(checks) == 3
    assert first.idx_crc32 == manifest.file_crc32(idx_path(dataset_prefix))
    first.verify()
    assert len(checks) == 4
    times = idx_path(dataset_prefix).stat()
    data = bytearray(idx_path(dataset_prefix).read_bytes())
    data[40] ^= 1
    idx_path(dataset_prefix).write_bytes(data)
    os.utime(idx_path(dataset_prefix), ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match="is damaged: sequence"):
        IndexedDataset(dataset_prefix)


def test_an_index_of_another_tool_that_changed_alone(dataset_prefix: Path) -> None:
    manifest_path(dataset_prefix).unlink()
    IndexedDataset(dataset_prefix)
    data = bytearray(idx_path(dataset_prefix).read_bytes())
    data[-16:-8], whole = data[-24:-16], bytes(data)  # the last but one document becomes empty
    idx_path(dataset_prefix).write_bytes(data)
    with pytest.raises(DataError, match=r"corpus\.idx has changed .* remove .*checked\.json"):
        IndexedDataset(dataset_prefix)
    write_random_dataset(dataset_prefix, 20)
    manifest_path(dataset_prefix).unlink()
    assert len(IndexedDataset(dataset_prefix)) == 20
    record_path(dataset_prefix).unlink()
    bin_path(dataset_prefix).write_bytes(b"")
    idx_path(dataset_prefix).write_bytes(whole)
    with pytest.raises(DataError, match="does not belong to its index"):
        IndexedDataset(dataset_prefix)


def test_a_directory_that_cannot_be_written_needs_no_record(
    dataset_prefix: Path, checks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refused)
    for _ in range(2):
        assert len(IndexedDataset(dataset_prefix)) == 200
    assert len(checks) == 2
    assert not record_path(dataset_prefix).exists()


def test_tokens_are_verified(dataset_prefix: Path, checks: list[Path]) -> None:
    data = bytearray(bin_path(dataset_prefix).read_bytes())
    data[1000] ^= 4
    bin_path(dataset_prefix).write_bytes(data)
    dataset = IndexedDataset(dataset_prefix)  # a large file is not read whole at each start
    with pytest.raises(DataError, match=r"corpus\.bin is not the file that corpus\.manifest\.json .* bytes 0 to"):
        dataset.verify()
    manifest_path(dataset_prefix).unlink()
    assert dataset.verify() is False


def test_checksums_of_blocks() -> None:
    import zlib

    data = np.random.default_rng(0).integers(0, 256, 2 * BLOCK_BYTES + 5, dtype=np.uint8).tobytes()
    checksums = BlockChecksums()
    for start in range(0, len(data), 9 << 20):
        checksums.update(data[start : start + (9 << 20)])
    pieces = (data[:BLOCK_BYTES], data[BLOCK_BYTES : 2 * BLOCK_BYTES], data[-5:])
    assert checksums.blocks == tuple(map(zlib.crc32, pieces))
    assert checksums.crc32 == zlib.crc32(data)
    assert checksums.num_bytes == len(data)


@pytest.mark.parametrize("name", ["bin", "lengths", "boundaries"])
def test_damaged_unfinished_files_are_not_continued(tmp_path: Path, name: str) -> None:
    prefix = tmp_path / "c"
    writer = ResumableWriter(prefix, np.uint16, Position())
    writer.add_documents([1, 2, 3, 4], [1, 2, 0, 1], [2, 1, 1])
    writer.flush()
    position = writer.position
    writer.release()
    again = ResumableWriter(prefix, np.uint16, position)
    again.add_document([5])
    again.close()
    assert Manifest.load(prefix) is not None
    assert IndexedDataset(prefix).verify()
    assert IndexedDataset(prefix).sequence_lengths.tolist() == [1, 2, 0, 1, 1]

    writer = ResumableWriter(prefix, np.uint16, Position())
    writer.add_documents([1, 2, 3, 4], [1, 2, 0, 1], [2, 1, 1])
    writer.flush()
    writer.release()
    path = Path(f"{prefix}.{name}.partial")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"c\.\*\.partial of an interrupted run are damaged.*progress\.json"):
        ResumableWriter(prefix, np.uint16, position)
    assert IndexedDataset(prefix).verify()
