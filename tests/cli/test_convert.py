"""``lightning-megatron convert``: options, verification, and one clear error for each kind of bad input."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_megatron.cli import convert
from lightning_megatron.cli.main import available
from tests.interop import tiny
from tests.ranks import RankPool


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        args = parser.parse_args(["convert", *map(str, arguments)])
        code = args.run(args)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2") / "theirs"
    tiny.save("gpt2", path)
    return path


def test_is_a_command() -> None:
    assert "convert" in available()


@pytest.mark.parametrize(
    ("name", "to", "more"),
    [
        ("gpt2", "megatron-legacy", ["--target-tensor-model-parallel-size", 2, "--target-params-dtype", "fp16"]),
        pytest.param("bert", "lightning", [], marks=pytest.mark.slow),
        ("t5_v1_1", "megatron", ["--make-vocab-size-divisible-by", 8]),
        pytest.param("qwen2", "huggingface", ["--target-params-dtype", "bf16"], marks=pytest.mark.slow),
    ],
)
def test_verified(ranks: RankPool, name: str, to: str, more: list[Any], tmp_path: Path) -> None:
    tiny.save(name, tmp_path / "a")
    arguments = ["--load-path", tmp_path / "a", "--save-path", tmp_path / "b", "--to", to, "--verify", *more]
    [(code, out, err)] = ranks.run(command, 1, *arguments)
    assert code == 0, err
    assert "largest difference of logits: " in out
    assert "the same model" in out


def _verify_tampered(load: Path, save: Path) -> Any:
    from lightning_megatron.interop import convert as library

    job = library.convert

    def tampering(conversion: Any) -> Any:
        source = job(conversion)
        file = next(save.glob("release/mp_rank_01/*.pt"))
        content = torch.load(file, weights_only=False)
        layer = content["model"]["language_model"]["encoder"]
        layer["layers.1.mlp.dense_h_to_4h.bias"][0] += 0.1  # one element of all
        torch.save(content, file)
        return source

    library.convert = tampering
    try:
        more = ["--to", "megatron-legacy", "--target-tensor-model-parallel-size", 2, "--verify"]
        return command("--load-path", load, "--save-path", save, *more)
    finally:
        library.convert = job


def test_a_conversion_that_does_not_match(ranks: RankPool, gpt2: Path, tmp_path: Path) -> None:
    [(code, out, err)] = ranks.run(_verify_tampered, 1, gpt2, tmp_path / "b")
    assert code == 1
    assert "DIFFERENT MODELS" in out
    assert "do not use it" in err


def test_structure(gpt2: Path) -> None:
    code, out, _ = command("--load-path", gpt2, "--print-checkpoint-structure")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert lines["decoder.layers.1.self_attention.linear_qkv.weight"] == "float32   [96, 32]"
    code, _, err = command("--load-path", gpt2)
    assert (code, "--save-path and --to are needed" in err) == (2, True)


def refused(load: Path, save: Path, *more: object) -> str:
    """The one error of a command that leaves nothing behind."""
    before = sorted(save.parent.iterdir())
    code, out, err = command("--load-path", load, "--save-path", save, *(more or ("--to", "lightning")))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(save.parent.iterdir()) == before
    return err


def test_bad_directories(gpt2: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    assert "nowhere does not exist" in refused(tmp_path / "nowhere", save)
    (tmp_path / "empty").mkdir()
    assert "is no checkpoint: it has neither lightning_megatron.json" in refused(tmp_path / "empty", save)
    assert "exists already. Give a new or an empty directory" in refused(gpt2, gpt2)
    copy = Path(shutil.copytree(gpt2, tmp_path / "copy"))
    (copy / "config.json").write_text("[]")
    assert "no JSON of a configuration" in refused(copy, save)
    shutil.rmtree(copy)
    (copy / "a").mkdir(parents=True)
    shutil.copy(gpt2 / "config.json", copy)
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(copy, save)
    (copy / "pytorch_model.bin").write_bytes(b"")
    assert "holds pickled weights (pytorch_model.bin)" in refused(copy, save)


def test_unsupported_models(gpt2: Path, tmp_path: Path) -> None:
    copy, save = Path(shutil.copytree(gpt2, tmp_path / "copy")), tmp_path / "save"
    config = json.loads((gpt2 / "config.json").read_text())

    def write(**changes: Any) -> None:
        (copy / "config.json").write_text(json.dumps(config | changes))

    write(model_type="mixtral")
    message = refused(copy, save)
    assert "model_type='mixtral'" in message
    assert "The nearest that is, by name, is 'mistral'" in message
    write(activation_function="swish")
    assert "activation_function='swish' is none of ['gelu'" in refused(copy, save)
    write(vocab_size=90)
    assert "The vocabulary has 89 rows, but vocab_size=90" in refused(copy, save)
    write(n_layer=3)
    assert "Missing: transformer.h.2.attn.c_attn.weight" in refused(copy, save)
    write(n_layer=1)
    assert "Unknown: transformer.h.1.attn.c_attn.bias" in refused(copy, save)
    message = refused(gpt2, save, "--to", "megatron", "--target-tensor-model-parallel-size", 3)
    assert "num_attention_heads=4 is not divisible by tensor_model_parallel_size=3" in message
    assert "max_shard_size='lots' is no size" in refused(gpt2, save, "--to", "huggingface", "--max-shard-size", "lots")
    message = refused(gpt2, save, "--to", "huggingface", "--model-type", "llama")
    assert "No architecture of Hugging Face has the choices of this GPTConfig. llama: " in message


def test_damaged_shards(gpt2: Path, tmp_path: Path) -> None:
    copy, save = Path(shutil.copytree(gpt2, tmp_path / "copy")), tmp_path / "save"
    shards = sorted(copy.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    message = refused(copy, save)
    assert f"{shards[1]} is no whole safetensors file" in message
    assert f"It has {len(whole) - 100} bytes; was it cut short?" in message
    shards[1].write_bytes(whole[:4])
    assert "It has 4 bytes" in refused(copy, save)
    shards[1].unlink()
    assert f"lacks {shards[1].name}" in refused(copy, save)
    shards[1].write_bytes(whole)
    tensors = load_file(shards[1])
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shards[1])
    assert f"lacks {lost}, which the index says it has" in refused(copy, save)


def test_damaged_checkpoints_of_ours(gpt2: Path, tmp_path: Path) -> None:
    command("--load-path", gpt2, "--save-path", tmp_path / "ours", "--to", "lightning")
    shard = tmp_path / "ours" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-10])
    more = ("--to", "huggingface")
    assert f"__0_0.distcp has {len(data) - 10} bytes instead of" in refused(tmp_path / "ours", tmp_path / "save", *more)
    data[8000] ^= 1  # in the token embedding, which comes first
    shard.write_bytes(data)
    assert "its checksum does not match" in refused(tmp_path / "ours", tmp_path / "save", *more)
