import errno
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_megatron.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path, merge, token_dtype
from lightning_megatron.errors import DataError
from tests.data.corpora import write_random_dataset


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_equal_megatron_builder(tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    documents = [
        [random.integers(0, 60000, random.integers(1, 9)) for _ in range(random.integers(1, 4))] for _ in range(50)
    ]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    builder = IndexedDatasetBuilder(str(bin_path(theirs)), dtype=dtype)
    with IndexedDatasetWriter(ours, dtype) as writer:
        for document in documents:
            tokens, lengths = np.concatenate(document), [len(sentence) for sentence in document]
            builder.add_document(torch.from_numpy(tokens), lengths)
            writer.add_document(tokens, lengths)
    builder.finalize(str(idx_path(theirs)))
    assert contents(ours) == contents(theirs)


def test_merge_bytes_equal_megatron_builder(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    parts = [write_random_dataset(tmp_path / f"part{i}", 20 + i, seed=i, empty=True) for i in range(3)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge(parts, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert IndexedDataset(tmp_path / "ours").num_documents == 63


def test_add_documents_at_once_equals_one_by_one(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "one") as one, IndexedDatasetWriter(tmp_path / "many") as many:
        one.add_document([1, 2, 3], [1, 2])
        one.add_document([])
        one.add_document([4])
        many.add_documents([1, 2, 3, 4], [1, 2, 0, 1], [2, 1, 1])
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("reader", ["mmap", "lazy", "cached"])
def test_readers_give_the_same_samples(dataset_prefix: Path, reader: str) -> None:
    reference = IndexedDataset(dataset_prefix)
    dataset = IndexedDataset(dataset_prefix, reader)  # type: ignore[arg-type]
    for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert copy.reader == reader
        assert all(np.array_equal(copy[i], reference[i]) for i in range(len(reference)))
        assert np.array_equal(copy.get(3, 1, 2), reference[3][1:3])


def test_unknown_reader(dataset_prefix: Path) -> None:
    with pytest.raises(DataError, match=r"'mmapp'.*mmap, lazy, cached"):
        IndexedDataset(dataset_prefix, "mmapp")  # type: ignore[arg-type]


def test_empty_dataset(tmp_path: Path) -> None:
    IndexedDatasetWriter(tmp_path / "empty").close()
    dataset = IndexedDataset(tmp_path / "empty")
    assert (len(dataset), dataset.num_tokens, dataset.num_documents) == (0, 0, 0)


def test_token_dtype_is_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (None, 1, 65499, 65500, 65536, 1 << 20):
        assert token_dtype(size) == DType.optimal_dtype(size)


class TestDamage:
    def test_missing_file(self, dataset_prefix: Path) -> None:
        bin_path(dataset_prefix).unlink()
        with pytest.raises(DataError, match=r"corpus\.bin does not exist"):
            IndexedDataset(dataset_prefix)

    def test_truncated_bin(self, dataset_prefix: Path) -> None:
        data = bin_path(dataset_prefix).read_bytes()
        bin_path(dataset_prefix).write_bytes(data[:-10])
        with pytest.raises(DataError, match=rf"describes {len(data)} bytes, the file has {len(data) - 10}"):
            IndexedDataset(dataset_prefix)

    @pytest.mark.parametrize("keep", [0, 20, 100])
    def test_truncated_idx(self, dataset_prefix: Path, keep: int) -> None:
        idx_path(dataset_prefix).write_bytes(idx_path(dataset_prefix).read_bytes()[:keep])
        with pytest.raises(DataError, match=rf"{keep}"):
            IndexedDataset(dataset_prefix)

    def test_not_an_index(self, dataset_prefix: Path) -> None:
        idx_path(dataset_prefix).write_bytes(b"x" * 4096)
        with pytest.raises(DataError, match="not a Megatron index"):
            IndexedDataset(dataset_prefix)

    def test_wrong_offset(self, dataset_prefix: Path) -> None:
        data = bytearray(idx_path(dataset_prefix).read_bytes())
        struct.pack_into("<q", data, 34 + 200 * 4 + 7 * 8, 12345)
        idx_path(dataset_prefix).write_bytes(data)
        with pytest.raises(DataError, match="sequence 7 begins at byte 12345"):
            IndexedDataset(dataset_prefix)


class TestWriting:
    def test_token_beyond_the_type(self, tmp_path: Path) -> None:
        with (
            pytest.raises(DataError, match=r"70000 do not fit uint16"),
            IndexedDatasetWriter(tmp_path / "x", np.uint16) as w,
        ):
            w.add_document([1, 70000])
        assert list(tmp_path.iterdir()) == []

    def test_lengths_that_disagree(self, tmp_path: Path) -> None:
        with IndexedDatasetWriter(tmp_path / "x") as writer, pytest.raises(DataError, match="3 tokens"):
            writer.add_document([1, 2, 3], [1, 1])

    def test_sequence_longer_than_the_format(self, tmp_path: Path) -> None:
        tokens = np.broadcast_to(np.int32(1), (2**31,))
        with (
            IndexedDatasetWriter(tmp_path / "x") as writer,
            pytest.raises(DataError, match="2147483648 tokens exceeds"),
        ):
            writer.add_document(tokens)

    def test_an_exception_leaves_nothing(self, tmp_path: Path) -> None:
        def write_and_fail() -> None:
            with IndexedDatasetWriter(tmp_path / "x") as writer:
                writer.add_document([1])
                raise KeyError

        with pytest.raises(KeyError):
            write_and_fail()
        assert list(tmp_path.iterdir()) == []

    def test_an_unfinished_dataset_is_not_taken_for_whole(self, tmp_path: Path) -> None:
        writer = IndexedDatasetWriter(tmp_path / "x")
        writer.add_document([1])
        with pytest.raises(DataError, match="does not exist"):
            IndexedDataset(tmp_path / "x")
        writer.discard()

    def test_disk_full(self, tmp_path: Path) -> None:
        writer = IndexedDatasetWriter(tmp_path / "x")
        writer._file.close()
        writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(DataError, match="is full") as caught:
            writer.add_document([1, 2, 3])
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC

    def test_merging_different_types(self, tmp_path: Path) -> None:
        write_random_dataset(tmp_path / "a", 3)
        with IndexedDatasetWriter(tmp_path / "b", np.int32) as writer:
            writer.add_document([1])
        with pytest.raises(DataError, match="holds int32 tokens"):
            merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
        assert not idx_path(tmp_path / "c").exists()
