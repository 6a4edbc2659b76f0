import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from lightning_megatron.data.cache import cached_maps, digest, fingerprint
from lightning_megatron.data.gpt import GPTDataset
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.errors import DataError
from tests.data.corpora import write_random_dataset

fork = multiprocessing.get_context("fork")


def build(directory: Path, seconds: float) -> dict[str, np.ndarray]:
    (directory / f"built.{os.getpid()}").touch()
    time.sleep(seconds)
    return {"a": np.arange(5)}


def load(directory: Path, seconds: float) -> None:
    maps = cached_maps(directory / "maps", {"x": 1}, lambda: build(directory, seconds))
    assert maps["a"].tolist() == [0, 1, 2, 3, 4]


def test_concurrent_starts_build_once(tmp_path: Path) -> None:
    processes = [fork.Process(target=load, args=(tmp_path, 0.3)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("built.*"))) == 1


def test_a_killed_builder_is_replaced(tmp_path: Path) -> None:
    victim = fork.Process(target=load, args=(tmp_path, 60))
    victim.start()
    while not list(tmp_path.glob("built.*")):
        time.sleep(0.01)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    started = time.monotonic()
    load(tmp_path, 0)
    assert time.monotonic() - started < 5
    assert len(list(tmp_path.glob("built.*"))) == 2


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    entry = digest({"x": 1})
    (tmp_path / f"{entry}.abc.partial").mkdir()
    cached_maps(tmp_path, {"x": 1}, lambda: {"a": np.arange(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [entry, f"{entry}.lock"]


def test_a_half_written_entry_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays"):  # the second array cannot be stored
        cached_maps(tmp_path, {"x": 1}, lambda: {"a": np.arange(3), "b": np.array([None])})
    assert list(cached_maps(tmp_path, {"x": 1}, lambda: {"a": np.arange(4)})) == ["a"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_rewritten_dataset_invalidates_its_maps(tmp_path: Path) -> None:
    prefix = write_random_dataset(tmp_path / "corpus", 30)
    before, first = fingerprint(IndexedDataset(prefix)), GPTDataset(IndexedDataset(prefix), range(30), 16)
    write_random_dataset(prefix, 30, seed=9)
    second = GPTDataset(IndexedDataset(prefix), range(30), 16)
    assert fingerprint(IndexedDataset(prefix)) != before
    assert len(second) == (int(second.dataset.sequence_lengths.sum()) - 1) // 16 != len(first)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be cached in /proc/maps .*cache_dir"):
        cached_maps(Path("/proc/maps"), {"x": 1}, lambda: {"a": np.arange(1)})
