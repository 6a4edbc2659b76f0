"""Text files in pieces, limits of documents, and memory."""

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.data.preprocessing import PreprocessOptions, Progress, preprocess
from lightning_megatron.data.preprocessing import texts as text_files
from lightning_megatron.data.preprocessing.encoding import cuts_at_white_space
from lightning_megatron.data.preprocessing.sources import blocks, documents
from lightning_megatron.data.preprocessing.texts import text_parts
from lightning_megatron.data.tokenizer import load_tokenizer
from lightning_megatron.errors import DataError

MIB = 1 << 20


@pytest.fixture(scope="module")
def odd_text(texts: list[str]) -> bytes:
    """English with everything between words that white space and UTF-8 know, and bytes that are no UTF-8."""
    random = np.random.default_rng(0)
    between = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        " \n ",
        "\u3000 ",
        "\xa0 ",
        "\x85 ",
        "\u2003 ",
        "\u1680\n",
        "\x1c ",
        "\ufeff ",
    ]
    between += [
        "\u4e00\u3002\n",
        "\U0001f600 ",
        "\u00e9 ",
        "\u05d0 ",
        "'s ",
        "' ll",
        "12 3",
        ". . ",
        "\u0301 ",
        "\x00 ",
    ]
    pieces = [
        word.encode()
        + between[int(random.integers(len(between)))].encode()
        + (b"\xff\xe3 \x80 " if not number % 97 else b"")
        for number, word in enumerate(" ".join(texts[:20]).split())
    ]
    return b"".join(pieces)


def bert_tokenizer(texts: list[str]) -> object:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


@pytest.mark.parametrize("kind", ["byte-level", "wordpiece"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_pieces_give_the_ids_of_the_whole_text(
    texts: list[str],
    odd_text: bytes,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    suffix: str,
) -> None:
    monkeypatch.setattr(text_files, "_SEGMENT_BYTES", 100)
    tokenizer = load_tokenizer(tokenizer_dir if kind == "byte-level" else bert_tokenizer(texts))  # type: ignore[arg-type]
    assert cuts_at_white_space(tokenizer)
    path = tmp_path / f"c{suffix}"
    path.write_bytes(gzip.compress(odd_text) if suffix.endswith("gz") else odd_text)
    options = PreprocessOptions(append_eod=True, block_bytes=300)
    reached: list[Progress] = []
    (prefix,) = preprocess([path], tmp_path / "c", tokenizer, options, workers=0, on_progress=reached.append)
    assert len(reached) > 20
    assert reached[-1].input_bytes == path.stat().st_size
    dataset = IndexedDataset(prefix)
    expected = tokenizer(odd_text.decode(errors="replace"), add_special_tokens=False)["input_ids"]
    assert (len(dataset), dataset.num_documents) == (1, 1)
    assert dataset[0].tolist() == [*expected, tokenizer.eos_token_id]


def test_a_run_goes_on_in_the_middle_of_a_document(odd_text: bytes, tokenizer_dir: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill_at_tenth(_: Progress) -> None:
        counts.append(1)
        if len(counts) == 10:
            raise Killed

    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_bytes(odd_text[:20_000])
    options = PreprocessOptions(append_eod=True, block_bytes=700)
    (whole,) = preprocess(files, tmp_path / "whole", tokenizer_dir, options, workers=0)
    counts: list[int] = []
    with pytest.raises(Killed):
        preprocess(files, tmp_path / "cut", tokenizer_dir, options, workers=0, on_progress=kill_at_tenth)
    assert json.loads((tmp_path / "cut.progress.json").read_text())["positions"][0]["documents"] == 0
    (again,) = preprocess(files, tmp_path / "cut", tokenizer_dir, options, workers=0, on_progress=kill_at_tenth)
    assert len(counts) > 10
    for suffix in ("bin", "idx", "manifest.json"):
        assert Path(f"{again}.{suffix}").read_bytes() == Path(f"{whole}.{suffix}").read_bytes()


def test_other_tokenizers_get_whole_texts(tokenizer_dir: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken, pre_tokenizers

    metaspace = load_tokenizer(tokenizer_dir)
    metaspace.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert not cuts_at_white_space(metaspace)
    added = load_tokenizer(tokenizer_dir)
    added.add_tokens([AddedToken("two words", normalized=False)])
    assert not cuts_at_white_space(added)
    path = tmp_path / "c.txt"
    path.write_text("one word and " * 1000)
    options = PreprocessOptions(block_bytes=300, max_document_bytes=10_000)
    with pytest.raises(DataError, match=r"c\.txt: the document is longer than the limit of 10000 bytes.*--max-doc"):
        preprocess([path], tmp_path / "o", added, options, workers=0)
    (prefix,) = preprocess([path], tmp_path / "o", tokenizer_dir, options, workers=0)
    assert IndexedDataset(prefix).num_documents == 1


def test_documents_between_separators(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    parts = ["".join(random.choice([*"ab \n-"], random.integers(0, 40))) for _ in range(3000)]
    path = tmp_path / "c.txt"
    path.write_text("<-->".join(parts))
    expected = [part.encode() for part in "<-->".join(parts).split("<-->") if part.strip()]
    for size in (1, 7, 1000, MIB):
        found = [text for part in text_parts(path, size, "<-->", MIB, cut=True) for text in part.texts]
        assert found == expected
    path.write_text("<-->".join([*["a"] * 5, "b" * 51, "c"]))
    with pytest.raises(DataError, match="document 5 is longer than the limit of 50 bytes"):
        list(text_parts(path, 1000, "<-->", 50, cut=True))


@pytest.mark.parametrize("where", ["first", "middle", "last", "alone"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_above_the_limit(tmp_path: Path, where: str, suffix: str) -> None:
    import zstandard

    compress: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".jsonl.gz": gzip.compress}
    short, long = b'{"text": "a"}\n', b'{"text": "' + b"x" * 5000 + b'"}\n'
    lines = {"first": [long, short], "middle": [short, long, short], "last": [short, long[:-1]], "alone": [long]}[where]
    path = tmp_path / f"c{suffix}"
    path.write_bytes(compress.get(suffix, zstandard.ZstdCompressor().compress)(b"".join(lines)))
    offset = 0 if where in ("first", "alone") else len(short)

    def read(limit: int, block_bytes: int) -> int:
        found = blocks([path], block_bytes, max_document_bytes=limit)
        return sum(len(documents(block, ["text"])[0]) for block in found)

    for block_bytes in (10, 600, MIB):
        assert read(5013, block_bytes) == len(lines)
        with pytest.raises(DataError, match=r"the line that holds byte \d.* longer than the limit of 4000") as caught:
            read(4000, block_bytes)
        named = int(str(caught.value).split("holds byte ")[1].split(" ")[0].rstrip(","))
        assert offset <= named < offset + len(long)


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("suffix", "lines"), [(".gz", False), (".zst", False), (".zst", True)])
def test_memory_of_a_file_that_expands(tmp_path: Path, suffix: str, lines: bool) -> None:
    import zstandard

    piece = (b"\n" if lines else b" ") * (8 * MIB)
    path = tmp_path / f"c.jsonl{suffix}"
    compressor = zstandard.ZstdCompressor().compressobj()
    with gzip.open(path, "wb", 1) if suffix == ".gz" else path.open("wb") as file:
        for _ in range(32):
            file.write(piece if suffix == ".gz" else compressor.compress(piece))
        if suffix == ".zst":
            file.write(compressor.flush())
    found = blocks([path], MIB, max_document_bytes=16 * MIB)
    with peak_below(64 * MIB):
        if lines:
            assert sum(len(block.data or b"") for block in found) == 256 * MIB
        else:
            with pytest.raises(DataError, match="byte 0 of the decompressed text, is longer than the limit of 16777"):
                list(found)


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_memory_of_a_text_file(tmp_path: Path, separator: str | None) -> None:
    path = tmp_path / "c.txt"
    path.write_text(("some words of a text\n" * 50 + "\n") * (20 * MIB // 1051))
    with peak_below(10 * MIB):
        parts = text_parts(path, MIB, separator, 64 * MIB, cut=True)
        size = sum(sum(map(len, part.texts)) for part in parts)
    assert size > 18 * MIB


MEASURE = """
import resource, sys
from lightning_megatron.data.preprocessing import PreprocessOptions, preprocess
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
separator = sys.argv[4] if len(sys.argv) > 4 else None
preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], PreprocessOptions(text_separator=separator), workers=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
def test_a_text_file_takes_the_memory_of_json_lines(texts: list[str], tokenizer_dir: Path, tmp_path: Path) -> None:
    text = "\n".join(texts)[: MIB // 2]
    repeats = 40
    (tmp_path / "c.jsonl").write_text((json.dumps({"text": text}) + "\n") * repeats)
    (tmp_path / "whole.txt").write_text((text + "\n") * repeats)
    (tmp_path / "separated.txt").write_text((text + "\x1e") * repeats)

    def peak(name: str, *arguments: str) -> int:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / name), str(tmp_path / f"{name}_out")]
        done = subprocess.run([*command, str(tokenizer_dir), *arguments], check=True, capture_output=True, text=True)
        return int(done.stdout.split()[-1])

    lines, whole, separated = peak("c.jsonl"), peak("whole.txt"), peak("separated.txt", "\x1e")
    print(f"{lines} MiB as JSON lines, {whole} MiB as one text, {separated} MiB as separated texts")
    assert max(whole, separated) < 1.1 * lines
