"""Files of other tools and of strangers: nothing in them runs, grows without bound, or passes damaged."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

import lightning_megatron as lm
from lightning_megatron.checkpoint.metadata import FILE, CheckpointMetadata, _crc32
from lightning_megatron.cli.accelerate import convert
from lightning_megatron.cli.main import main
from lightning_megatron.data.tokenizer import load_tokenizer
from lightning_megatron.errors import DataError
from lightning_megatron.interop.hugging_face import HuggingFaceDirectory
from tests.interop import tiny


@pytest.mark.parametrize("field", ["eval_interval", "tensorboard_dir", "tp_degree", "seq_length"])
@pytest.mark.parametrize("value", [{"_target_": "pandas.read_pickle"}, [1], "${oc.env:HOME}", "a\x1b[2J"])
def test_accelerate_values_are_plain(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"megatron_lm_{field}"):
        convert({"megatron_lm_config": {f"megatron_lm_{field}": value}}, num_layers=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, value)
            for field in ("tp_degree", "seq_length", "eval_interval")
            for value in ("2", 2.5, True, 10**30)
        ),
        *(("sequence_parallelism", value) for value in ("true", 1)),
        *(("gradient_clipping", value) for value in ("1.0", float("nan"), float("inf"), False)),
        *((field, "none") for field in ("recompute_granularity", "lr_decay_style", "weight_decay_incr_style")),
        ("tensorboard_dir", 3),
        ("other_megatron_args", {"num_layers": "many"}),
    ],
)
def test_accelerate_values_have_the_type_of_their_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        convert({"megatron_lm_config": {f"megatron_lm_{field}": value}}, num_layers=2)


@pytest.mark.parametrize("field", ["num_processes", "num_machines", "use_cpu"])
@pytest.mark.parametrize("value", ["2", None, 1.5])
def test_accelerate_machines_have_the_type_of_their_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        convert({field: value, "megatron_lm_config": {}}, num_layers=2)


def test_yaml_aliases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bomb.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nmegatron_lm_config: {}\n")
    output = tmp_path / "out.yaml"
    assert main(["config", "--from-accelerate", str(tmp_path / "bomb.yaml"), "--output", str(output)]) == 2
    assert "YAML aliases" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("spelling", ["--load_path", "--load-path"])
def test_options_with_underscores(spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [spelling, str(tmp_path / "no_where"), "--save_path", str(tmp_path / "x"), "--to", "lightning"]
    assert main(["convert", *arguments, "--target_tensor_model_parallel_size", "1"]) == 2
    assert "no_where does not exist" in capsys.readouterr().err


def _own_tokenizer(path: Path, ran: Path) -> Path:
    """A tokenizer whose class stands beside it, in a file that leaves a trace."""
    tiny.tokenizer(path, eos_token="w1")
    code = f"from transformers import PreTrainedTokenizerFast\nopen({str(ran)!r}, 'w')\n"
    (path / "own.py").write_text(code + "class Own(PreTrainedTokenizerFast): pass\n")
    told = json.loads((path / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("command", ["preprocess", "convert", "generate"])
def test_code_of_a_tokenizer_runs_only_by_a_flag(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    tokenizer = str(_own_tokenizer(tmp_path / f"own_{command}", ran))
    tiny.save("gpt2", tmp_path / "model")
    (tmp_path / "text.jsonl").write_text('{"text": "w2 w3"}\n')
    arguments = {
        "preprocess": [str(tmp_path / "text.jsonl"), "--output", str(tmp_path / "data"), "--tokenizer", tokenizer],
        "convert": [
            *("--load-path", str(tmp_path / "model"), "--save-path", str(tmp_path / "ours"), "--to", "huggingface"),
            *("--tokenizer-name", tokenizer),
        ],
        "generate": [str(tmp_path / "no_checkpoint"), "--prompt", "w2", "--tokenizer", tokenizer],
    }[command]
    assert main([command, *arguments]) in (1, 2)
    error = " ".join(capsys.readouterr().err.split())
    assert "It has code of its own, which is not run unless you trust it: --trust-remote-code" in error
    assert not ran.exists()
    main([command, *arguments, "--trust-remote-code"])
    assert ran.exists()


def _no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names and addresses that are asked for, none of which answers."""
    asked: list[str] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(str(arguments))
        raise OSError("no network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for offline in ("huggingface_hub.constants.HF_HUB_OFFLINE", "transformers.utils.hub.is_offline_mode"):
        monkeypatch.setattr(offline, False if offline.endswith("OFFLINE") else lambda: False)
    return asked


@pytest.mark.parametrize("name", ["nosuch", "some/repository", "a//b", "x" * 300, "http://example.org/x"])
def test_names_are_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, begun = _no_network(monkeypatch), time.monotonic()
    with pytest.raises(DataError, match=r"--from-hub|it does not exist"):
        load_tokenizer(name)
    assert time.monotonic() - begun < 2.0
    assert not asked


def test_a_name_that_was_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--words" / "snapshots" / "0123"
    tiny.tokenizer(snapshot, eos_token="w1")
    (tmp_path / "models--some--words" / "refs").mkdir()
    (tmp_path / "models--some--words" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = _no_network(monkeypatch)
    assert len(load_tokenizer("some/words")) == tiny.VOCAB
    assert not asked
    with pytest.raises(DataError, match="No tokenizer could be loaded from 'some/others'"):
        load_tokenizer("some/others", from_hub=True)
    assert asked


def test_files_of_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    for number, name in enumerate(("tokenizer.json", "vocab.txt", "tokenizer_config.json")):
        path = tmp_path / str(number)
        tiny.tokenizer(path, eos_token="w1")
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
        with pytest.raises(DataError, match="not a regular file"):
            load_tokenizer(path)


@pytest.mark.parametrize("change", [{"files": 3}, {"files": {"a": 1}}, {"model": []}, {"layout": None}, {"more": 1}])
def test_damaged_metadata(change: dict[str, object], tmp_path: Path) -> None:
    """Whose checksum is right all the same."""
    CheckpointMetadata({"module": "GPTModule"}, {}, 1).write(tmp_path)
    data = json.loads((tmp_path / FILE).read_text()) | change
    del data["crc32"]
    (tmp_path / FILE).write_text(json.dumps({**data, "crc32": _crc32(data)}))
    with pytest.raises(lm.CheckpointError, match=f"{FILE} is damaged"):
        CheckpointMetadata.read(tmp_path)


def test_configurations_that_have_no_end(tmp_path: Path) -> None:
    for text in ("[" * 100_000, '{"model_type": NaN}', '{"n_layer": 1, "n_layer": 2}', "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(lm.CheckpointError, match="no JSON of a configuration"):
            HuggingFaceDirectory.open(tmp_path)
    (tmp_path / "config.json").unlink()
    os.symlink("/dev/zero", tmp_path / "config.json")
    with pytest.raises(lm.CheckpointError, match="not a regular file"):
        HuggingFaceDirectory.open(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(lm.CheckpointError, match="not a regular file"):
        HuggingFaceDirectory.open(tmp_path)
