"""End tokens and sampling settings outlive a conversion, as transformers' own Trainer would leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lightning_megatron as lm
from lightning_megatron.interop.convert import Conversion, convert
from tests.interop import tiny

SETTINGS = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
SOURCES: dict[str, dict[str, Any] | None] = {
    "several": {"eos_token_id": [1, 5, 7], "bos_token_id": 1, **SETTINGS},
    "one": {"eos_token_id": 1, "pad_token_id": 4, **SETTINGS},
    "without_end": SETTINGS,
    "no_file": None,
}
TOKENIZERS = {
    "same": {"eos_token": "w1", "bos_token": "w1"},
    "one_of_several": {"eos_token": "w5", "pad_token": "w6"},
    "another": {"eos_token": "w9", "bos_token": "w8", "pad_token": "w9"},
    "none": {},
}


def _source(path: Path, generation: dict[str, Any] | None, name: str = "gpt2", eos: Any = 1) -> Path:
    tiny.save(name, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def _settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What transformers reads: generation settings, and special tokens of the configuration."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(path)
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    told = GenerationConfig.from_pretrained(path).to_dict()
    for irrelevant in ("transformers_version", "_from_model_config"):
        told.pop(irrelevant, None)
    told = {name: value for name, value in told.items() if value not in (None, False)}
    return told, {role: getattr(config, role) for role in roles}


def _aligned(path: Path, tokenizer: Any, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a model that transformers aligned with the tokenizer."""
    from transformers import AutoModelForCausalLM
    from transformers.trainer_utils import align_special_tokens

    model = AutoModelForCausalLM.from_pretrained(path)
    align_special_tokens(model, tokenizer)
    model.save_pretrained(out)
    return _settings(out)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("source", SOURCES)
def test_with_a_tokenizer(source: str, tokenizer: str, tmp_path: Path) -> None:
    path = _source(tmp_path / "theirs", SOURCES[source], eos=[1, 5] if source == "several" else 1)
    given = tiny.tokenizer(tmp_path / "tokenizer", **TOKENIZERS[tokenizer])
    convert(Conversion(load_path=path, save_path=tmp_path / "ours", to="huggingface", tokenizer=given))
    expected, roles = _aligned(path, given, tmp_path / "aligned")
    if source != "several" and given.eos_token_id is not None:  # transformers would keep the one that it was as well
        expected["eos_token_id"] = given.eos_token_id
    assert _settings(tmp_path / "ours") == (expected, roles)


@pytest.mark.parametrize("between", ["lightning", "megatron-legacy", pytest.param("megatron", marks=pytest.mark.slow)])
def test_by_another_format(between: Any, tmp_path: Path) -> None:
    """Settings are kept where the directory that they came from is no longer known."""
    path = _source(tmp_path / "theirs", SOURCES["several"], eos=[1, 5])
    given = tiny.tokenizer(tmp_path / "tokenizer", **TOKENIZERS["one_of_several"])
    convert(Conversion(load_path=path, save_path=tmp_path / "between", to=between))
    for name, tokenizer in (("with", given), ("without", None)):
        convert(
            Conversion(load_path=tmp_path / "between", save_path=tmp_path / name, to="huggingface", tokenizer=tokenizer)
        )
    assert _settings(tmp_path / "with") == _aligned(path, given, tmp_path / "aligned")
    assert _settings(tmp_path / "without") == _settings(path)


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": "1"}', '{"eos_token_id": [1, true]}', '{"bos_token_id": [1]}', "[]", '{"top_p": NaN}']
)
def test_damaged_settings_are_named(text: str, tmp_path: Path) -> None:
    path = _source(tmp_path / "theirs", {})
    (path / "generation_config.json").write_text(text)
    with pytest.raises(lm.CheckpointError, match=r"generation_config.json holds no generation settings.*remove it"):
        lm.from_pretrained(path)
