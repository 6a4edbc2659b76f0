"""Full disks, directories that cannot be written or vanish, slow disks: one error, and what was whole stays whole."""

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_megatron.data.cache import cached_maps, digest
from lightning_megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from lightning_megatron.data.preprocessing import PreprocessOptions, Progress, job, preprocess
from lightning_megatron.errors import DataError
from tests.data.corpora import write_random_dataset

OPTIONS = PreprocessOptions(block_bytes=20_000)


@pytest.fixture(params=["full", "read-only"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A file system that holds a small dataset and is then full or read-only."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        write_random_dataset(directory / "corpus", 20)
        write_random_dataset(directory / "c_text_document", 20)
        if request.param == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        yield directory, "is full" if request.param == "full" else "cannot be .*Read-only file system"
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_disk_that_takes_no_more(small_disk: tuple[Path, str], jsonl: Path, tokenizer_dir: Path) -> None:
    directory, message = small_disk
    for workers in (0, 1):
        with pytest.raises(DataError, match=message):
            preprocess([jsonl], directory / "c", tokenizer_dir, OPTIONS, workers=workers)
        assert IndexedDataset(directory / "c_text_document").verify()
    maps = directory / "maps"
    with pytest.raises(DataError, match=r"Index maps cannot be cached in .* \((No space|Read-only)"):
        cached_maps(maps, {"x": 1}, lambda: {"a": np.arange(100_000)})
    assert not (maps / digest({"x": 1})).exists()
    assert len(IndexedDataset(directory / "corpus")) == 20


def failing(call: int, error: int) -> Callable[..., None]:
    """A function that fails at its call number `call`."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise OSError(error, os.strerror(error))

    return fail


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "is full"), (errno.EIO, "Input/output error")])
def test_every_flush_may_fail(
    jsonl: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    message: str,
) -> None:
    monkeypatch.setattr(job, "_COMMIT_SECONDS", 0.0)
    prefix = write_random_dataset(tmp_path / "c_text_document", 20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    messages: list[str] = []
    for call in range(1, 100):
        fail = failing(call, number)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            if call == 9:  # what was interrupted is not always continued
                for path in tmp_path.glob("*.pa*"):
                    path.unlink()
                (tmp_path / "c.progress.json").unlink(missing_ok=True)
            try:
                preprocess([jsonl], tmp_path / "c", tokenizer_dir, OPTIONS, workers=0)
            except DataError as error:
                messages.append(str(error))
            else:
                break
        for name, data in before.items():
            assert (tmp_path / name).read_bytes() == data
    assert len(messages) > 5
    assert all(message in said for said in messages)
    assert len(IndexedDataset(prefix)) == 120
    assert IndexedDataset(prefix).verify()
    assert {path.name for path in tmp_path.iterdir()} == set(before)


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), KeyboardInterrupt()])
def test_every_renaming_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    prefix = write_random_dataset(tmp_path / "c", 20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = Path.replace
    messages: list[str] = []
    for call in range(1, 20):
        calls: list[Path] = []

        def fail(self: Path, target: Path, calls: list[Path] = calls, call: int = call) -> Path:
            calls.append(self)
            if len(calls) == call:
                raise error
            return replace(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", fail)
            try:
                with IndexedDatasetWriter(prefix, np.uint16) as writer:
                    writer.add_document([1, 2, 3])
            except KeyboardInterrupt:
                pass
            except DataError as caught:
                messages.append(str(caught))
            else:
                break
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert IndexedDataset(prefix).verify()
    assert all("c cannot be written (Read-only" in said for said in messages)
    assert call == 8  # four files are set aside, of which one does not exist, and three are named
    assert IndexedDataset(prefix)[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_directory_that_vanishes(jsonl: Path, tokenizer_dir: Path, tmp_path: Path, workers: int) -> None:
    def vanish(_: Progress) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    with pytest.raises(DataError, match=r"the directory .*out does not exist"):
        preprocess([jsonl], tmp_path / "out" / "c", tokenizer_dir, OPTIONS, workers=workers, on_progress=vanish)
    with pytest.raises(DataError, match=r"Index maps cannot be cached in .*out \(No such file"):
        cached_maps(tmp_path / "out", {"x": 1}, lambda: vanish(None) or {"a": np.arange(3)})  # type: ignore[arg-type, func-returns-value]


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_something_else_in_the_way(jsonl: Path, tokenizer_dir: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match="cannot be written"):
        preprocess([jsonl], tmp_path / "out" / "c", tokenizer_dir, OPTIONS, workers=0)
    os.mkfifo(tmp_path / "c.lock")
    with pytest.raises(DataError, match=r"c\.lock is a pipe"):
        preprocess([jsonl], tmp_path / "c", tokenizer_dir, OPTIONS, workers=0)


def test_slow_flushes(jsonl: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads what is not whole: others wait, or are told that somebody writes."""
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.05))
    built: list[int] = []
    results: list[list[int]] = []

    def build() -> dict[str, np.ndarray]:
        built.append(1)
        return {"a": np.arange(5), "b": np.arange(6)}

    def load() -> None:
        results.append([len(array) for array in cached_maps(tmp_path / "maps", {"x": 1}, build).values()])

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[5, 6]] * 4
    assert len(built) == 1
    (prefix,) = preprocess([jsonl], tmp_path / "c", tokenizer_dir, OPTIONS, workers=0)
    assert IndexedDataset(prefix).verify()
