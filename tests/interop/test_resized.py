"""Vocabularies with added tokens: what the old ones compute stays, and transformers loads the new size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.interop.convert import Conversion, convert
from tests.cli.test_convert import command
from tests.helpers import quiet_trainer
from tests.interop import tiny
from tests.models.runs import Batch, Shared, strategy
from tests.ranks import RankPool

MORE = tiny.VOCAB + 7
WORDS = {"eos_token": "w1", "bos_token": "w1"}


def _check(name: str, model: Any, path: Path) -> Any:
    """The directory holds the model with more tokens, as transformers resizes it; returns what was loaded."""
    found, report = type(model).from_pretrained(path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.config.vocab_size == found.get_input_embeddings().weight.shape[0] == MORE
    batch = tiny.batch(name)
    expected, logits = tiny.outputs(model, batch)[1], tiny.outputs(found.eval(), batch)[1]
    assert logits.shape[-1] == MORE
    torch.testing.assert_close(logits[..., : tiny.VOCAB], expected, atol=1e-6, rtol=0)
    tied = model.config.tie_word_embeddings
    model.resize_token_embeddings(MORE)
    for get in ("get_input_embeddings", *(() if tied else ("get_output_embeddings",))):
        ours, theirs = getattr(found, get)(), getattr(model, get)()
        assert torch.equal(ours.weight[: tiny.VOCAB], theirs.weight[: tiny.VOCAB])
        # transformers draws around the mean of the old rows, with 3e-5 of their deviation.
        torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-4, rtol=0)
        if getattr(theirs, "bias", None) is not None:
            torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-4, rtol=0)
    return found


@pytest.mark.parametrize("name", tiny.some("gpt2", "llama"))
def test_converted(name: str, tmp_path: Path) -> None:
    model = tiny.save(name, tmp_path / "theirs")
    tiny.tokenizer(tmp_path / "tokenizer", MORE, **WORDS)
    for number, (source, to) in enumerate((("theirs", "lightning"), ("theirs", "huggingface"), ("0", "huggingface"))):
        convert(
            Conversion(
                load_path=tmp_path / source,
                save_path=tmp_path / str(number),
                to=to,
                tokenizer=tmp_path / "tokenizer",
            )
        )
    for path in ("1", "2"):
        if name not in ("t5_v1_1", "mt5"):  # whose class of this version ties what the file does not
            _check(name, tiny.build(name), tmp_path / path)
        assert (tmp_path / path / "tokenizer.json").is_file()
    del model


def _resized(path: str, tokenizer: str, batch: Batch, out: str, lora: lm.LoRAConfig | None) -> Any:
    """Logits of old tokens, then of a step on new ones; runs on every rank."""
    changes = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "make_vocab_size_divisible_by": 4}
    module = lm.from_pretrained(
        path, lm.OptimizerConfig(lr=1e-2), return_logits="every_rank", tokenizer=tokenizer, **changes
    )
    module.lora = lora
    trainer = quiet_trainer(strategy(tp=2), int(os.environ["WORLD_SIZE"]))
    logits = trainer.predict(module, Shared(module, batch, 1))[0]["logits"]
    module.save_pretrained(f"{out}/resized")
    trained = {key: torch.full_like(value, MORE - 2) for key, value in batch.items()}
    trainer = quiet_trainer(strategy(tp=2), int(os.environ["WORLD_SIZE"]), max_steps=1, max_epochs=1)
    trainer.fit(module, Shared(module, trained, 1))
    module.save_pretrained(f"{out}/trained")
    return logits


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", lm.LoRAConfig(rank=2, train_embeddings=True)),
        pytest.param("gpt2", None, marks=pytest.mark.slow),
        pytest.param("llama_tied", lm.LoRAConfig(rank=2, train_embeddings=True), marks=pytest.mark.slow),
    ],
)
def test_trained_at_tp2(ranks: RankPool, name: str, lora: lm.LoRAConfig | None, tmp_path: Path) -> None:
    """Logits of the old tokens, and rows of the new ones, which a step moves."""
    model, batch = tiny.save(name, tmp_path / "theirs"), tiny.batch(name)
    tiny.tokenizer(tmp_path / "tokenizer", MORE, **WORDS)
    expected = tiny.outputs(model, batch)[1]
    for logits in ranks.run(
        _resized, 2, str(tmp_path / "theirs"), str(tmp_path / "tokenizer"), batch, str(tmp_path), lora
    ):
        assert logits.shape[-1] == MORE
        torch.testing.assert_close(logits[..., : tiny.VOCAB], expected, atol=2e-5, rtol=0)
    before = _check(name, model, tmp_path / "resized").get_input_embeddings().weight
    trained = type(model).from_pretrained(tmp_path / "trained")
    after = trained.get_input_embeddings().weight
    assert (after[MORE - 2] - before[MORE - 2]).abs().max() > 1e-3
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["vocab_size"] == MORE
    assert (tmp_path / "trained" / "tokenizer.json").is_file()


def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    tiny.save("gpt2", tmp_path)
    tiny.tokenizer(tmp_path, 40, **WORDS)
    assert lm.from_pretrained(tmp_path, tokenizer=tmp_path).config.vocab_size == tiny.VOCAB  # padded, not too small
    assert lm.from_pretrained(tmp_path, vocab_size=MORE).config.vocab_size == MORE
    with pytest.raises(lm.CheckpointError, match=r"vocab_size=88, but .* has 89 tokens. Tokens can be added, not"):
        lm.from_pretrained(tmp_path, vocab_size=88)
    with pytest.raises(lm.CheckpointError, match="vocab_size=True is no whole number"):
        lm.from_pretrained(tmp_path, vocab_size=True)


@pytest.mark.slow
def test_verified(ranks: RankPool, tmp_path: Path) -> None:
    tiny.save("qwen2", tmp_path / "theirs")
    tiny.tokenizer(tmp_path / "tokenizer", MORE, **WORDS)
    paths = ["--load-path", tmp_path / "theirs", "--save-path", tmp_path / "ours", "--to", "lightning"]
    [(code, out, err)] = ranks.run(command, 1, *paths, "--tokenizer-name", tmp_path / "tokenizer", "--verify")
    assert code == 0, err
    assert "with 7 added tokens" in out
    assert "the same model" in out
