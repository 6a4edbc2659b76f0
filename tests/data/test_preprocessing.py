import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lightning_megatron.data.indexed import IndexedDataset, bin_path, idx_path
from lightning_megatron.data.preprocessing import PreprocessOptions, Progress, preprocess
from lightning_megatron.data.preprocessing.sentences import simple_sentences
from lightning_megatron.data.preprocessing.sources import blocks, documents
from lightning_megatron.data.preprocessing.words import RememberedWords
from lightning_megatron.data.tokenizer import load_tokenizer
from lightning_megatron.errors import DataError

FILES = ["c_text_document.bin", "c_text_document.idx", "c_text_document.manifest.json"]
SMALL = PreprocessOptions(append_eod=True, block_bytes=20_000)


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


@pytest.fixture(scope="session")
def expected(jsonl: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """What Megatron's builder writes for the corpus, one document at a time."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("expected") / "megatron"
    tokenizer = load_tokenizer(tokenizer_dir)
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16)
    for line in jsonl.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(idx_path(prefix)))
    return contents(prefix)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_output_equals_megatrons_for_any_number_of_workers(
    jsonl: Path, tokenizer_dir: Path, expected: tuple[bytes, bytes], tmp_path: Path, workers: int
) -> None:
    reached: list[Progress] = []
    (prefix,) = preprocess([jsonl], tmp_path / "c", tokenizer_dir, SMALL, workers=workers, on_progress=reached.append)
    assert prefix == tmp_path / "c_text_document"
    assert contents(prefix) == expected
    assert reached[-1].input_bytes == reached[-1].total_bytes == jsonl.stat().st_size
    assert reached[-1].tokens == len(expected[0]) // 2
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 30])
def test_blocks_cut_no_line(jsonl: Path, texts: list[str], block_bytes: int) -> None:
    size = max(block_bytes, jsonl.stat().st_size // 3000)
    found = [text for block in blocks([jsonl], size) for text in documents(block, ["text"])[0]]
    assert found == texts


def compress_zstd(data: bytes) -> bytes:
    import zstandard

    # Two frames, as `cat a.zst b.zst` makes them.
    half = len(data) // 2
    return zstandard.ZstdCompressor().compress(data[:half]) + zstandard.ZstdCompressor().compress(data[half:])


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", compress_zstd)])
def test_compressed_input(jsonl: Path, tokenizer_dir: Path, expected, tmp_path: Path, suffix: str, compress) -> None:
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(compress(jsonl.read_bytes()))
    (prefix,) = preprocess([path], tmp_path / "c", tokenizer_dir, SMALL, workers=0)
    assert contents(prefix) == expected
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged or truncated"):
        preprocess([path], tmp_path / "d", tokenizer_dir, SMALL, workers=0)


def test_parquet_and_datasets_on_disk(jsonl, texts, tokenizer_dir, expected, tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    parquet = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), parquet, row_group_size=17)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "dataset"))
    for path in (parquet, tmp_path / "dataset"):
        (prefix,) = preprocess([path], tmp_path / f"{path.stem}_out", tokenizer_dir, SMALL, workers=0)
        assert contents(prefix) == expected
        with pytest.raises(DataError, match="has no column 'body'; it has text"):
            preprocess([path], tmp_path / "x", tokenizer_dir, PreprocessOptions(keys=("body",)), workers=0)


def test_text_files(texts: list[str], tokenizer_dir: Path, expected, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text("\x1e".join(texts))
    options = PreprocessOptions(append_eod=True, text_separator="\x1e")
    (prefix,) = preprocess([one], tmp_path / "c", tokenizer_dir, options, workers=0)
    assert contents(prefix) == expected
    (whole,) = preprocess([one], tmp_path / "w", tokenizer_dir, workers=0)
    assert IndexedDataset(whole).num_documents == 1


def test_several_keys_and_inputs(jsonl: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    options = PreprocessOptions(keys=("text", "title"))
    text, title = preprocess([jsonl, jsonl], tmp_path / "c", tokenizer_dir, options, workers=0)
    assert IndexedDataset(text).num_documents == IndexedDataset(title).num_documents == 240
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.decode(IndexedDataset(text)[3])[:20] == tokenizer.decode(IndexedDataset(title)[3])


def test_gigatoken_gives_the_same_bytes(jsonl: Path, tokenizer_dir: Path, expected, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    options = PreprocessOptions(append_eod=True, block_bytes=20_000, engine="gigatoken")
    (prefix,) = preprocess([jsonl], tmp_path / "c", tokenizer_dir, options, workers=0)
    assert contents(prefix) == expected


def test_gigatoken_overlooks_no_damage(tokenizer_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    path = tmp_path / "c.jsonl"
    options = PreprocessOptions(engine="gigatoken")
    for line, message in (('{"text": "b"', "is not JSON"), ('{"title": "b"}', "the key 'text' holds NoneType")):
        path.write_text('{"text": "' + "a" * 70_000 + f'"}}\n{line}\n')
        with pytest.raises(DataError, match=message):
            preprocess([path], tmp_path / f"o{len(line)}", tokenizer_dir, options, workers=0)


def test_special_tokens_of_the_tokenizer(jsonl: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    plain, with_bos = (
        preprocess([jsonl], tmp_path / f"{add}", tokenizer, PreprocessOptions(add_special_tokens=add), workers=0)[0]
        for add in (False, True)
    )
    for index in range(10):
        expected = [tokenizer.eos_token_id, *IndexedDataset(plain)[index]]
        assert IndexedDataset(with_bos)[index].tolist() == expected


class TestRememberedWords:
    def test_any_text_gives_the_tokenizers_ids(self, texts: list[str], tokenizer_dir: Path) -> None:
        backend = load_tokenizer(tokenizer_dir).backend_tokenizer
        assert RememberedWords.fits(backend)
        random = np.random.default_rng(0)
        alphabet = [
            *"aB1 '\"_-\n\t\r.sStT\u00e9\u00df\u2019\u201c\u2026\u2003\xa0\x85\x1c\u4e00\U0001f600\u0301",
            "<|endoftext|>",
            "'ll",
        ]
        noise = ["".join(random.choice(alphabet, random.integers(0, 40))) for _ in range(5000)]
        encode = RememberedWords(backend)
        for _ in range(2):  # learning the words, and remembering them
            tokens, lengths = encode([*texts, *noise])
            expected = [encoding.ids for encoding in backend.encode_batch([*texts, *noise], add_special_tokens=False)]
            assert lengths.tolist() == [len(ids) for ids in expected]
            assert tokens.tolist() == [token for ids in expected for token in ids]

    def test_other_tokenizers_are_not_taken(self, tokenizer_dir: Path) -> None:
        from tokenizers import normalizers, pre_tokenizers

        backend = load_tokenizer(tokenizer_dir).backend_tokenizer
        backend.normalizer = normalizers.NFC()
        assert not RememberedWords.fits(backend)
        backend = load_tokenizer(tokenizer_dir).backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        assert not RememberedWords.fits(backend)


class TestSentences:
    def test_sentences_become_sequences(
        self, jsonl: Path, texts: list[str], tokenizer_dir: Path, tmp_path: Path
    ) -> None:
        options = PreprocessOptions(split_sentences=True, sentence_splitter="simple", append_eod=True)
        (prefix,) = preprocess([jsonl], tmp_path / "c", tokenizer_dir, options, workers=0)
        assert prefix.name == "c_text_sentence"
        dataset, tokenizer = IndexedDataset(prefix), load_tokenizer(tokenizer_dir)
        assert dataset.num_documents == 120
        begin, end = dataset.document_indices[5:7]
        sentences = simple_sentences(texts[5])
        assert len(sentences) == end - begin
        decoded = [tokenizer.decode(dataset[int(index)]) for index in range(begin, end)]
        assert decoded == [*sentences[:-1], sentences[-1] + "<|endoftext|>"]

    def test_simple_splitter(self) -> None:
        text = 'Dr. Smith saw J. R. Brown. "Really?" He left!\n\nA list, e.g. this: 3.14 is pi. 42 is not'
        assert simple_sentences(text) == [
            "Dr. Smith saw J. R. Brown.",
            '"Really?"',
            "He left!",
            "A list, e.g. this: 3.14 is pi.",
            "42 is not",
        ]


class TestEmptyDocuments:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "c.jsonl"
        path.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
        return path

    def test_they_are_an_error(self, path: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"document 1 of the block .* has no tokens under the key 'text'"):
            preprocess([path], tmp_path / "o", tokenizer_dir, workers=0)

    @pytest.mark.parametrize(("treatment", "count"), [("skip", 2), ("keep", 3)])
    def test_or_left_out_or_kept(self, path, tokenizer_dir: Path, tmp_path: Path, treatment, count: int) -> None:
        options = PreprocessOptions(append_eod=True, empty_documents=treatment)
        (prefix,) = preprocess([path], tmp_path / "o", tokenizer_dir, options, workers=0)
        dataset = IndexedDataset(prefix)
        assert (dataset.num_documents, len(dataset)) == (count, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"the line at byte 14, is not JSON"),
        ("[]", r"the line at byte 14, is no JSON object"),
        ('{"body": "a"}', r"the line at byte 14: the key 'text' holds NoneType, .* has the keys body"),
    ],
)
def test_a_bad_line_is_named(tokenizer_dir: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        preprocess([path], tmp_path / "o", tokenizer_dir, workers=1)


def test_missing_and_unknown_inputs(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        preprocess([tmp_path / "nothing.jsonl"], tmp_path / "o", tokenizer_dir)
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match="has no known ending"):
        preprocess([tmp_path / "a.csv"], tmp_path / "o", tokenizer_dir, workers=0)


SLOW_RUN = """
import sys, time
from pathlib import Path
from lightning_megatron.data.preprocessing import PreprocessOptions, job
job._COMMIT_SECONDS = 0.0
def on_progress(reached):
    print(reached.documents, flush=True)
    time.sleep(0.05)
job.preprocess(sys.argv[1:2], sys.argv[2], sys.argv[3], PreprocessOptions(append_eod=True, block_bytes=20_000),
               workers=int(sys.argv[4]), on_progress=on_progress)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_restart_after_a_kill(jsonl: Path, tokenizer_dir: Path, expected, tmp_path: Path, workers: int) -> None:
    arguments = [str(jsonl), str(tmp_path / "c"), str(tokenizer_dir), str(workers)]
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    done = [int(process.stdout.readline()) for _ in range(3)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    prefix = tmp_path / "c_text_document"
    assert not idx_path(prefix).exists()
    assert not bin_path(prefix).exists()

    counts: list[int] = []
    preprocess(
        [jsonl], tmp_path / "c", tokenizer_dir, SMALL, workers=1, on_progress=lambda r: counts.append(r.documents)
    )
    assert counts[0] > done  # what was committed is not tokenized again
    assert contents(prefix) == expected
    time.sleep(0.8)  # the workers of the killed process end by themselves
    assert sorted(os.listdir(tmp_path)) == FILES


def test_a_finished_key_is_written_again_if_another_was_not(
    jsonl: Path, tokenizer_dir: Path, expected, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def killed(_: Progress) -> None:
        raise Killed

    with pytest.raises(Killed):
        preprocess([jsonl], tmp_path / "c", tokenizer_dir, SMALL, workers=0, on_progress=killed)
    (tmp_path / "c_text_document.bin.partial").unlink()  # as if it had got its name
    (prefix,) = preprocess([jsonl], tmp_path / "c", tokenizer_dir, SMALL, workers=0)
    assert contents(prefix) == expected


def test_an_error_keeps_what_was_done(jsonl: Path, tokenizer_dir: Path, expected, tmp_path: Path) -> None:
    lines = jsonl.read_bytes()
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(lines + b'{"text": ""}\n')
    with pytest.raises(DataError, match="has no tokens"):
        preprocess([bad], tmp_path / "c", tokenizer_dir, SMALL, workers=0)
    state = json.loads((tmp_path / "c.progress.json").read_text())
    assert state["blocks"] > 0
    skipping = PreprocessOptions(append_eod=True, block_bytes=20_000, empty_documents="skip")
    (prefix,) = preprocess([bad], tmp_path / "c", tokenizer_dir, skipping, workers=0)
    assert contents(prefix) == expected


def test_another_job_is_not_continued(jsonl: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "c.progress.json").write_text('{"job": "other", "blocks": 1, "positions": []}')
    with pytest.raises(DataError, match="belongs to an interrupted run with other inputs"):
        preprocess([jsonl], tmp_path / "c", tokenizer_dir, SMALL, workers=0)


def test_two_runs_do_not_write_one_output(jsonl: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", lock, str(tmp_path / "c.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(DataError, match="Another process is writing"):
            preprocess([jsonl], tmp_path / "c", tokenizer_dir, SMALL, workers=0)
        other.communicate(b"\n")
