"""Every command with no argument, with a wrong one, and with --help: a short answer and the right exit code."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from lightning_megatron.cli.main import COMMANDS, RECIPES, available, main


def answer(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    try:
        code = main(list(arguments))
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_all_commands_are_there(capsys: Any) -> None:
    assert {*COMMANDS, *RECIPES} == set(available())
    code, out, _ = answer(capsys)
    assert code == 2
    assert all(name in out for name in available())
    code, out, _ = answer(capsys, "--help")
    assert code == 0
    assert all(name in out for name in available())


def test_an_unknown_command_names_the_nearest(capsys: Any) -> None:
    code, _, err = answer(capsys, "pretain")
    assert code == 2
    assert "Did you mean pretrain" in err
    code, _, err = answer(capsys, "--verion")
    assert code == 2


@pytest.mark.parametrize("command", [name for name in available() if name not in RECIPES])
def test_help(capsys: Any, command: str) -> None:
    code, out, err = answer(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: lightning-megatron {command}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("preprocess", "required: inputs"),
        ("plan", "For example:"),
        ("config", "--yes"),
        ("generate", "required: checkpoint"),
        ("convert", "required: --load-path"),
        ("schedule", "For example:"),
        ("report", "required: RUN"),
    ],
)
def test_no_argument(capsys: Any, monkeypatch: Any, tmp_path: Any, command: str, message: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.chdir(tmp_path)
    code, _, err = answer(capsys, command)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [name for name in available() if name not in RECIPES])
def test_a_wrong_option_is_refused_with_the_usage_of_the_command(capsys: Any, command: str) -> None:
    code, out, err = answer(capsys, command, "x", "--no-such-option")
    assert (code, out) == (2, "")
    assert err.startswith(f"usage: lightning-megatron {command}")


def test_a_wrong_option_names_the_nearest(capsys: Any) -> None:
    assert "Did you mean --top?" in answer(capsys, "plan", "--topp", "3")[2]
    assert "Did you mean --devices?" in answer(capsys, "doctor", "--devises", "3")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("plan", "gpt2_large"), 2, "is not key=value"),
        (("plan", "model=gpt2_lagre"), 2, "Did you mean gpt2_large"),
        (("report", "/no/such/run"), 1, "There is no directory"),
        (("doctor", "/no/such.ckpt"), 1, "There is no checkpoint"),
        (("generate", "/no/such.ckpt", "--tokenizer", "/no", "--prompt", "x"), 2, "error:"),
        (("generate", "/no/such.ckpt", "--tokenizer", "/no"), 2, "at least one --prompt"),
        (("convert", "--load-path", "/no/such", "--save-path", "x", "--to", "huggingface"), 2, "error:"),
        (("preprocess", "/no/such.txt", "--output", "x", "--tokenizer", "/no"), 1, "error:"),
        (("config", "--yes", "--tp-degree", "many"), 2, "error:"),
    ],
)
def test_wrong_values(capsys: Any, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, _, err = answer(capsys, *arguments)
    assert found == code
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pretrain", "--help"), 0, "usage: lightning-megatron pretrain"),
        (("pretrain",), 2, "data.data_path has no value"),
        (("pretrain", "modle=gpt_tiny"), 2, "Did you mean 'model'?"),
        (("pretrain", "gpt_tiny"), 2, "is not field=value"),
        (("finetune", "--help"), 0, "usage: lightning-megatron finetune"),
        (("finetune", "save_path=x"), 2, "pretrained has no value"),
        (("demo", "--help"), 0, "--steps"),
        (("demo", "--stepz", "3"), 2, "unrecognized arguments"),
    ],
)
def test_recipes_as_commands(
    capsys: Any, monkeypatch: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", [])  # recipes put theirs there, for launchers
    found, out, err = answer(capsys, *arguments)
    assert found == code
    assert message in out + err
    assert len(err.splitlines()) <= 12
