"""Files of other tools and of strangers: nothing in them runs, grows without bound, or passes damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import lightning_megatron as lm
from lightning_megatron.checkpoint.metadata import FILE, CheckpointMetadata, _crc32
from lightning_megatron.cli.accelerate import convert
from lightning_megatron.cli.main import main
from lightning_megatron.data.tokenizer import load_tokenizer
from lightning_megatron.errors import DataError
from lightning_megatron.interop.hugging_face import HuggingFaceDirectory


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


def test_code_of_a_tokenizer_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    told = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(DataError):
        load_tokenizer(tmp_path)
    assert not ran.exists()


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
