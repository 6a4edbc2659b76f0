"""The command line on a checkpoint, at another layout than the one that wrote it."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

from lightning_megatron.cli import generate
from tests.generation import reference
from tests.ranks import RankPool


def _tokenizer(path: Path) -> str:
    """A tokenizer of words ``w0`` to ``w119``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(reference.VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


def _save(config: Any, whole: Any, path: str) -> list[int]:
    module = reference.build(config, whole, {}, fit=True)
    module.trainer.save_checkpoint(path)
    return list(module.generate([[5, 17, 3]], max_new_tokens=9)[0].tokens)


def _command(arguments: list[str]) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        args = parser.parse_args(["generate", *arguments])
        code = args.run(args)
    return code, out.getvalue(), err.getvalue()


def test_text_of_a_checkpoint_at_another_layout(ranks: RankPool, tmp_path: Path) -> None:
    model = reference.gpt2()
    checkpoint, tokenizer = str(tmp_path / "checkpoint"), _tokenizer(tmp_path / "tokenizer.json")
    [tokens] = ranks.run(_save, 1, reference.gpt_config(model), reference.weights(model), checkpoint)
    arguments = [checkpoint, "--tokenizer", tokenizer, "--prompt", "w5 w17 w3", "--max-new-tokens", "9"]
    results = ranks.run(_command, 2, [*arguments, "--layout", "pp2", "--accelerator", "cpu"])
    assert [code for code, *_ in results] == [0, 0]
    assert results[0][1].split() == [f"w{token}" for token in tokens]
    assert "w5" not in results[1][1]  # one rank prints
    assert not any("Total length of" in err or "Be aware" in err for *_, err in results)


def test_mistakes_are_told(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path / "tokenizer.json")
    nowhere = str(tmp_path / "nowhere")
    code, _, message = _command([nowhere, "--tokenizer", tokenizer])
    assert (code, "Give at least one --prompt" in message) == (2, True)
    code, _, message = _command([nowhere, "--tokenizer", tokenizer, "--prompt", "w1"])
    assert (code, f"There is no checkpoint at {nowhere}" in message) == (2, True)
    code, _, message = _command([nowhere, "--prompt", "w1"])
    assert (code, f"There is no checkpoint at {nowhere}" in message) == (2, True)
    code, _, message = _command([nowhere, "--tokenizer", tokenizer, "--prompt", "w1", "--top-k", "5"])
    assert (code, "top_k=5 changes nothing" in message) == (2, True)
