import argparse
from pathlib import Path

import pytest

from lightning_megatron.cli.preprocess import add_parser
from lightning_megatron.data.indexed import IndexedDataset
from lightning_megatron.data.inspection import inspect
from tests.data.corpora import VOCABULARY, write_random_dataset


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(arguments)
    return args.run(args)


def test_preprocess_inspect_and_merge(jsonl: Path, tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    output, prefix = str(tmp_path / "c"), str(tmp_path / "c_text_document")
    assert call("preprocess", str(jsonl), "--tokenizer", str(tokenizer_dir), "--output", output, "--workers", "1") == 0
    assert prefix in capsys.readouterr().out
    assert call("preprocess", "--merge", prefix, prefix, "--output", str(tmp_path / "m")) == 0
    assert IndexedDataset(tmp_path / "m").num_documents == 240
    capsys.readouterr()
    assert call("preprocess", "--inspect", str(tmp_path / "m"), "--tokenizer", str(tokenizer_dir)) == 0
    shown = capsys.readouterr().out
    assert "240 (0 empty)" in shown
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path, capsys) -> None:
    assert call("preprocess", "--merge", str(tmp_path / "[x]"), "--output", str(tmp_path / "m")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "[x].bin does not exist" in error
    assert error.count("\n") == 1


def test_inspection_counts(tmp_path: Path) -> None:
    prefix = write_random_dataset(tmp_path / "c", 200, empty=True)
    found = inspect(prefix)
    dataset = IndexedDataset(prefix)
    assert found.tokens == found.document_lengths.sum() == dataset.sequence_lengths.sum()
    assert found.documents == 200
    assert found.empty_documents == int((dataset.sequence_lengths == 0).sum()) > 0
    assert found.largest_id == max(int(dataset[i].max()) for i in range(200) if len(dataset[i])) < VOCABULARY
    assert found.sample.split() == [str(token) for token in next(dataset[i] for i in range(200) if len(dataset[i]))]


def test_what_is_missing_is_named(jsonl: Path, capsys) -> None:
    assert call("preprocess", str(jsonl)) == 1
    assert capsys.readouterr().err == "error: Give --output and --tokenizer as well.\n"


def test_help(capsys) -> None:
    with pytest.raises(SystemExit):
        call("preprocess", "--help")
    assert "usage:" in capsys.readouterr().out
