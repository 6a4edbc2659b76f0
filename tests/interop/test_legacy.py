"""Megatron-LM's files of one rank each, in the shapes that were published."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_megatron as lm
from lightning_megatron.interop import legacy, safe_pickle
from lightning_megatron.interop.convert import Conversion, convert, open_model
from lightning_megatron.interop.core_model import CoreModel
from tests.interop import tiny


def write(name: str, tmp_path: Path, tensor: int, pipeline: int, **options: Any) -> tuple[Path, CoreModel]:
    """A tiny model in legacy files, and the source."""
    tiny.save(name, tmp_path / "theirs")
    job = Conversion(
        load_path=tmp_path / "theirs",
        save_path=tmp_path / "files",
        to="megatron-legacy",
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        make_vocab_size_divisible_by=4,
        **options,
    )
    return tmp_path / "files", convert(job)


def assert_same(found: CoreModel, expected: CoreModel, rows: int = tiny.VOCAB) -> None:
    """Every tensor, up to the padding of the vocabulary."""
    assert set(found.specs) == set(expected.specs)
    for name in expected.specs:
        cut = slice(rows) if name.startswith(("embedding.word", "output_layer")) else slice(None)
        assert torch.equal(found.read(name)[cut], expected.read(name)[cut]), name


def rewrite(path: Path, change: Any) -> None:
    """Change what each file holds."""
    for file in sorted(path.glob("*/mp_rank_*/model*.pt")):
        content = torch.load(file, weights_only=False)
        torch.save(change(content) or content, file)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama_tied", "megatron_bert", "megatron_bert_mlm", "t5", "mt5"])
@pytest.mark.parametrize(
    ("tensor", "pipeline"), [(2, 1), (2, 2), *(pytest.param(1, size, marks=pytest.mark.slow) for size in (1, 2))]
)
def test_any_layout(name: str, tensor: int, pipeline: int, tmp_path: Path) -> None:
    if "t5" in name and pipeline > 1:
        with pytest.raises(lm.CheckpointError, match="Files of a T5 in 2 pipeline stages have no agreed shape"):
            write(name, tmp_path, tensor, pipeline)
        return
    path, source = write(name, tmp_path, tensor, pipeline)
    assert (path / "latest_checkpointed_iteration.txt").read_text() == "release"
    names = {f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") for t in range(tensor) for p in range(pipeline)}
    assert {directory.name for directory in (path / "release").iterdir()} == names
    assert_same(open_model(path), source)


def test_shape_of_gpt(tmp_path: Path) -> None:
    """What other programs look for in the files of GPT-2, by name and shape."""
    path, source = write("gpt2", tmp_path, 2, 2)
    first, last = (
        torch.load(path / "release" / f"mp_rank_01_{stage:03d}" / "model_optim_rng.pt", weights_only=False)
        for stage in (0, 1)
    )
    assert first["checkpoint_version"] == 3.0
    args = first["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.padded_vocab_size) == (2, 2, 96)
    language = first["model"]["language_model"]
    assert language["embedding"]["word_embeddings"]["weight"].shape == (48, 32)
    assert language["embedding"]["position_embeddings"]["weight"].shape == (16, 32)
    layer = {key: tuple(value.shape) for key, value in language["encoder"].items()}
    assert layer["layers.0.self_attention.query_key_value.weight"] == (48, 32)
    assert layer["layers.0.self_attention.dense.weight"] == (32, 16)
    assert layer["layers.0.mlp.dense_4h_to_h.weight"] == (32, 64)
    assert "layers.0.post_attention_layernorm.bias" in layer
    assert not any(key.startswith(("layers.1.", "final_")) for key in layer)
    assert "final_layernorm.weight" in last["model"]["language_model"]["encoder"]
    copy, word = last["model"]["word_embeddings_for_head"]["weight"], "embedding.word_embeddings.weight"
    assert torch.equal(copy[: tiny.VOCAB - 48], source.read(word)[48 : tiny.VOCAB])
    # The second rank has the last two of four heads: of each its query, its key and its value.
    qkv = source.read("decoder.layers.0.self_attention.linear_qkv.weight")
    assert torch.equal(language["encoder"]["layers.0.self_attention.query_key_value.weight"], qkv[48:])


def test_distributed_optimizer(tmp_path: Path) -> None:
    """Its files are named otherwise, and each data-parallel rank has one of its own beside them."""
    path, source = write("gpt2", tmp_path, 2, 1, use_distributed_optimizer=True, data_parallel_size=2)
    files = {str(file.relative_to(path / "release")) for file in path.glob("release/*/*")}
    assert files == {f"mp_rank_{t:02d}/model_rng.pt" for t in (0, 1)} | {
        f"mp_rank_{t:02d}_{d:03d}/optim.pt" for t in (0, 1) for d in (0, 1)
    }
    assert_same(open_model(path), source)


def _old_names(content: dict[str, Any]) -> None:
    """As the first versions: no arguments, another name of the layers and of attention."""
    language = content["model"]["language_model"]
    layers = language.pop("encoder")
    language["transformer"] = {key.replace("self_attention", "attention"): value for key, value in layers.items()}
    del content["args"]


def _reorder(content: dict[str, Any], version: float, heads: int) -> None:
    layers = content["model"]["language_model"]["transformer"]
    for name, tensor in layers.items():
        if "query_key_value" in name:
            rows = tensor.view(heads, 3, -1, *tensor.shape[1:])  # heads, splits, width
            rows = rows.transpose(0, 1) if version == 0 else rows.transpose(1, 2)
            layers[name] = rows.reshape(tensor.shape)
    content["checkpoint_version"] = version
    if version == 0:
        del content["checkpoint_version"]


@pytest.mark.parametrize("name", ["gpt2", "megatron_bert"])
@pytest.mark.parametrize("version", [0, 1.0])
def test_old_versions(name: str, version: float, tmp_path: Path) -> None:
    path, source = write(name, tmp_path, 2, 1)

    def change(content: dict[str, Any]) -> None:
        _old_names(content)
        _reorder(content, version, heads=2)

    rewrite(path, change)
    with pytest.raises(lm.CheckpointError, match=r"has no 'args'.*--model-config"):
        open_model(path)
    assert_same(open_model(path, config=source.identity.config), source)


def test_flat_names_of_megatron_core_in_interleaved_chunks(tmp_path: Path) -> None:
    """As Megatron-LM writes with ``--ckpt-format torch`` and two chunks of one layer on each of two stages."""
    tiny.save("gpt2", tmp_path / "theirs")
    path, source = write("gpt2", tmp_path, 1, 1)
    names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }

    def flat(layer: int | None, *starts: str) -> dict[str, Any]:
        found: dict[str, Any] = {"decoder.layers.0.mlp.linear_fc1._extra_state": None}
        for name in source.specs:
            new = name
            for old, stored in names.items():
                new = new.replace(old, stored)
            if layer is not None and name.startswith(f"decoder.layers.{layer}."):
                found[new.replace(f"layers.{layer}", "layers.0")] = source.read(name)
            elif name.startswith(starts):
                found[new] = source.read(name)
        return found

    args = torch.load(next(path.glob("*/*/*.pt")), weights_only=False)["args"]
    del args.lightning_megatron
    word = "embedding.word_embeddings.weight"
    stages = [
        {"model0": flat(0, "embedding."), "model1": flat(None, "nothing")},
        {
            "model0": flat(1, "nothing"),
            "model1": {**flat(None, "decoder.final"), "output_layer.weight": source.read(word)},
        },
    ]
    for stage, chunks in enumerate(stages):
        directory = tmp_path / "flat" / "iter_0000012" / f"mp_rank_00_{stage:03d}"
        directory.mkdir(parents=True)
        content = {"args": args, "checkpoint_version": 3.0, "iteration": 12, **chunks}
        torch.save(content, directory / "model_optim_rng.pt", _use_new_zipfile_serialization=stage == 0)
    assert_same(open_model(tmp_path / "flat"), source)


def test_remarks_of_other_libraries(tmp_path: Path) -> None:
    """Random states of numpy, enums and whatever else Megatron-LM keeps are left unread, as inert objects."""
    path, source = write("gpt2", tmp_path, 1, 1)

    def change(content: dict[str, Any]) -> None:
        content["rng_state"] = [{"np_rng_state": np.random.get_state(), "path": Path("x")}]
        content["args"].kind = lm.ParallelLayout  # a class of ours, renamed below to one of Megatron-LM's

    rewrite(path, change)
    file = next(path.glob("*/*/*.pt"))
    file.write_bytes(file.read_bytes())
    with pytest.raises(lm.CheckpointError, match=r"asks for lightning_megatron\.layout\.ParallelLayout"):
        open_model(path)

    def restore(content: dict[str, Any]) -> None:
        content["args"].kind = torch.float16

    rewrite(path, restore)
    # Another library lets torch load a part of numpy, which alone does not go with the rest of it.
    with torch.serialization.safe_globals([np._core.multiarray._reconstruct]):  # type: ignore[attr-defined]
        assert_same(open_model(path), source)
        assert np._core.multiarray._reconstruct in torch.serialization.get_safe_globals()  # type: ignore[attr-defined]


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["beside", "in args"])
def test_malicious_pickle_is_not_run(zipped: bool, where: str, tmp_path: Path) -> None:
    path, _ = write("gpt2", tmp_path, 1, 1)
    file, trap = next(path.glob("*/*/*.pt")), tmp_path / "trap"
    content = torch.load(file, weights_only=False)
    if where == "beside":
        content["rng_state"] = _Malicious(trap)
    else:
        content["args"].trap = _Malicious(trap)
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        lm.CheckpointError, match=r"asks for (posix|os)\.system .*could run any code. Nothing of it was"
    ):
        open_model(path)
    assert not trap.exists()
    torch.load(file, weights_only=False)
    assert trap.exists(), "the pickle is harmless, so this test shows nothing"


def test_protocols_that_hide_names(tmp_path: Path) -> None:
    """Names from the stack or the memo, which newer protocols have, are not looked up either."""
    trap = tmp_path / "trap"
    for protocol in (2, 4, 5):
        file = tmp_path / f"{protocol}.pt"
        torch.save({"model": _Malicious(trap), "again": [_Malicious(trap)]}, file, pickle_protocol=protocol)
        with pytest.raises(lm.CheckpointError):
            safe_pickle.load(file)
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Malicious(trap), protocol=protocol))
        with pytest.raises(lm.CheckpointError):
            safe_pickle.load(tmp_path / "plain.pt")
    assert not trap.exists()


def test_inert_objects_do_nothing(tmp_path: Path) -> None:
    """A class of a module on the list is not imported, and its name shows what it would have been."""

    class Loss(argparse.Namespace):
        pass

    Loss.__module__, Loss.__qualname__, Loss.__name__ = "megatron.nowhere", "Scaler", "Scaler"
    import sys
    import types

    sys.modules["megatron.nowhere"] = types.SimpleNamespace(Scaler=Loss)  # type: ignore[assignment]
    try:
        torch.save({"scaler": Loss(scale=3)}, tmp_path / "a.pt")
    finally:
        del sys.modules["megatron.nowhere"]
    found = safe_pickle.load(tmp_path / "a.pt")["scaler"]
    assert repr(found) == "<megatron.nowhere.Scaler>"
    assert found.state == {"scale": 3}


def test_incomplete_files(tmp_path: Path) -> None:
    path, _ = write("gpt2", tmp_path, 2, 2)
    release = path / "release"
    whole = (release / "mp_rank_01_001" / "model_optim_rng.pt").read_bytes()
    (release / "mp_rank_01_001" / "model_optim_rng.pt").write_bytes(whole[:2000])
    with pytest.raises(lm.CheckpointError, match=r"mp_rank_01_001.*no whole file of torch.save \(2000 bytes\)"):
        open_model(path)
    (release / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(lm.CheckpointError, match=r"files of 3 ranks, but 2 .* x 2 .* have 4. Missing: mp_rank_01_001"):
        open_model(path)
    (path / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(lm.CheckpointError, match="names iter_0000005, which is not there"):
        open_model(path)


@pytest.mark.parametrize("version", [0.0, 1.0])
def test_orders_of_rows(version: float) -> None:
    """Two heads of width two: row numbers say the head, the kind and the place in it."""
    today = torch.tensor([[h * 100 + s * 10 + w for w in range(2)] for h in range(2) for s in range(3)]).flatten()
    if version == 0:
        old = [h * 100 + s * 10 + w for s in range(3) for h in range(2) for w in range(2)]
    else:
        old = [h * 100 + s * 10 + w for h in range(2) for w in range(2) for s in range(3)]
    found: Tensor = legacy._reordered(torch.tensor(old), version, heads=2, splits=3)
    assert torch.equal(found, today)


def test_target_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(lm.LayoutError, match=re.escape("num_attention_heads=4 is not divisible by tensor")):
        write("gpt2", tmp_path, 3, 1)
    assert not (tmp_path / "files").exists()
    with pytest.raises(lm.LayoutError, match="num_layers=2 leaves 2 layers for 4 pipeline stages"):
        convert(
            Conversion(
                load_path=tmp_path / "theirs",
                save_path=tmp_path / "files",
                to="megatron-legacy",
                pipeline_model_parallel_size=4,
            )
        )
    (tmp_path / "b").mkdir()
    with pytest.raises(
        lm.CheckpointError, match="num_query_groups=2 is not divisible by the target tensor-parallel size"
    ):
        write("qwen2", tmp_path / "b", 4, 1)
    assert not (tmp_path / "b" / "files").exists()


READ_BY_TRANSFORMERS: dict[str, tuple[str, ...]] = {
    "gpt2": (
        *("bias_gelu_fusion", "openai_gelu", "padded_vocab_size", "orig_vocab_size", "max_position_embeddings"),
        *("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "tensor_model_parallel_size"),
        *("pipeline_model_parallel_size", "tokenizer_type", "params_dtype", "data_parallel_size"),
    ),
    "megatron_bert": (
        *("tokenizer_type", "padded_vocab_size", "max_position_embeddings", "hidden_size", "num_layers"),
        *("num_attention_heads", "ffn_hidden_size"),
    ),
}
"""Arguments that the three converters of transformers 4.46 read or write, the last version that has all of them."""


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_what_converters_of_transformers_read(name: str, tmp_path: Path) -> None:
    """Arguments, keys, and their order: these converters stop at the first key of a stack that is no layer's."""
    path, source = write(name, tmp_path, 1, 1)
    content = torch.load(path / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    args, config = content["args"], source.identity.config
    assert all(name in args for name in READ_BY_TRANSFORMERS[name])
    assert (args.num_layers, args.hidden_size, args.num_attention_heads) == (2, 32, 4)
    assert args.ffn_hidden_size == config.ffn_size
    assert (args.orig_vocab_size, args.padded_vocab_size) == (tiny.VOCAB, 92)
    assert args.max_position_embeddings == config.max_position_embeddings
    assert (args.bias_gelu_fusion, args.openai_gelu) == (False, name == "gpt2")
    assert args.tokenizer_type == ("GPT2BPETokenizer" if name == "gpt2" else "BertWordPieceLowerCase")
    assert content["checkpoint_version"] >= 2.0
    language = content["model"]["language_model"]
    for table in ("word_embeddings", "position_embeddings"):
        assert language["embedding"][table]["weight"].shape[1] == 32
    keys = list(language["encoder"])
    layers = [key for key in keys if re.match(r"layers\.(\d+)\.([a-z0-9_.]+)\.([a-z]+)", key)]
    assert keys[: len(layers)] == layers
    assert keys[len(layers) :] == ["final_layernorm.weight", "final_layernorm.bias"]
    qkv = [key for key in layers if "query_key_value" in key]
    assert [key.rpartition(".")[2] for key in qkv] == ["weight", "bias"] * 2
    if name == "megatron_bert":
        assert set(content["model"]["lm_head"]) == {
            "dense.weight",
            "dense.bias",
            "layernorm.weight",
            "layernorm.bias",
            "bias",
        }
        assert set(content["model"]["binary_head"]) == {"weight", "bias"}
        assert set(language["pooler"]) == {"dense.weight", "dense.bias"}
