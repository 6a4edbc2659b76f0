"""What a resumed run has of the run before: precision, rates, random states, and errors when it is of another model."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_megatron.checkpoint import average, consolidate, expand, verify
from lightning_megatron.cli import doctor
from lightning_megatron.errors import CheckpointError
from tests.checkpoint.runs import Case, make_module, make_trainer, tensors, train
from tests.helpers import SharedLoader
from tests.ranks import RankPool

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def _train(case: Case, steps: int, save: Path | None, resume: Path | None, options: dict | None = None) -> list[float]:
    return train(case, steps, save=save, resume=resume, **(options or {}))


@pytest.mark.parametrize(
    "case",
    [
        Case(2, TP2),
        pytest.param(Case(4, PP2, distributed=True, precision="bf16-mixed"), marks=pytest.mark.slow),
        pytest.param(Case(2, precision="16-mixed"), marks=pytest.mark.slow),
    ],
    ids=["tp2", "pp2dp2-bf16-distributed", "dp2-fp16"],
)
def test_same_layout_is_bit_identical_with_dropout(ranks: RankPool, tmp_path: Path, case: Case) -> None:
    options = {"model": DROPOUT}
    straight = ranks.run(_train, case.world, case, 6, tmp_path / "six", None, options)[0]
    first = ranks.run(_train, case.world, case, 3, tmp_path / "three", None, options)[0]
    then = ranks.run(_train, case.world, case, 6, tmp_path / "resumed", tmp_path / "three", options)[0]
    assert first + then == straight
    one, other = tensors(tmp_path / "six"), tensors(tmp_path / "resumed")
    assert all(torch.equal(one[key], other[key]) for key in one | other)


@pytest.mark.parametrize(
    ("source", "target", "tolerance"),
    [
        (Case(precision="bf16-mixed"), Case(2, distributed=True, precision="bf16-mixed"), 1e-4),
        (Case(2, distributed=True, precision="bf16-mixed"), Case(precision="32-true"), 2e-2),
        (Case(precision="32-true"), Case(2, distributed=True, precision="16-mixed"), 2e-2),
        (Case(precision="bf16-true"), Case(precision="bf16-mixed"), 2e-2),
    ],
    ids=["bf16-to-distributed", "bf16-to-fp32", "fp32-to-fp16", "no-masters-to-masters"],
)
def test_precision_and_masters(ranks: RankPool, tmp_path: Path, source: Case, target: Case, tolerance: float) -> None:
    path, again = tmp_path / "saved", tmp_path / "again"
    ranks.run(_train, source.world, source, 3, path, None)
    ranks.run(_train, target.world, target, 3, again, path)
    one, other = tensors(path), tensors(again)
    name = "decoder.layers.mlp.linear_fc1.weight"
    exact = one.get(f"optimizer.state.fp32_param.{name}", one[name])
    assert torch.equal(exact.float(), other.get(f"optimizer.state.fp32_param.{name}", other[name]).float())
    assert torch.equal(
        one[f"optimizer.state.exp_avg_sq.{name}"].float(), other[f"optimizer.state.exp_avg_sq.{name}"].float()
    )
    straight = ranks.run(_train, source.world, source, 5, None, path)[0]
    then = ranks.run(_train, target.world, target, 5, None, path)[0]
    assert then == pytest.approx(straight, abs=tolerance)


def _rates(case: Case, save: Path | None, resume: Path | None, optimizer: dict) -> list[float]:
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates, module = Rates(), make_module(**optimizer)
    trainer = make_trainer(case, rates, max_steps=6 if resume else 3)
    trainer.fit(module, SharedLoader(module, length=160), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return rates.seen


def test_this_runs_rates_win(ranks: RankPool, tmp_path: Path) -> None:
    linear = {"lr_decay_style": "linear", "lr_warmup_steps": 0, "lr_decay_steps": 10}
    ranks.run(_rates, 1, Case(), tmp_path / "saved", None, {"lr": 1e-2, **linear})
    rates = ranks.run(_rates, 1, Case(), None, tmp_path / "saved", {"lr": 2e-2, "min_lr": 1e-3, **linear})[0]
    expected = [1e-3 + (2e-2 - 1e-3) * (10 - step) / 10 for step in (3, 4, 5)]
    assert rates == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.fixture(scope="module")
def checkpoint(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "tp2.ckpt"
    ranks.run(_train, 2, Case(2, TP2), 2, path, None)
    return path


def _error(case: Case, path: Path, model: dict, strict: bool = True) -> str:
    module = make_module(model)
    module.strict_loading = strict
    trainer = make_trainer(case, max_steps=2)
    try:
        trainer.fit(module, SharedLoader(module), ckpt_path=path)
    except CheckpointError as error:
        return str(error)
    return ""


def test_shapes_of_another_model(ranks: RankPool, checkpoint: Path) -> None:
    for strict in (True, False):
        errors = ranks.run(_error, 2, Case(2, PP2), checkpoint, {"hidden_size": 64}, strict)
        assert errors[0] == errors[1]
        assert "decoder.final_layernorm.weight: [32] in the checkpoint, [64] in the model" in errors[0]


def test_names_of_another_model(ranks: RankPool, checkpoint: Path) -> None:
    untied = {"share_embeddings_and_output_weights": False}
    error = ranks.run(_error, 1, Case(), checkpoint, untied)[0]
    assert "3 names of the model are missing in it" in error  # the weight and its two moments
    assert "output_layer.weight" in error
    assert ranks.run(_error, 1, Case(), checkpoint, untied, False)[0] == ""


def test_nearest_names() -> None:
    from lightning_megatron.checkpoint.names import Mismatch

    found = Mismatch.between({"layers.fc_1.weight": ((2,), False)}, {"layers.fc1.weight": (2,)}, same_vocabulary=True)
    assert "layers.fc_1.weight (nearest there: layers.fc1.weight)" in found.describe(Path("x"))


def test_vocabulary_of_another_tokenizer(ranks: RankPool, checkpoint: Path) -> None:
    error = ranks.run(_error, 1, Case(), checkpoint, {"vocab_size": 120, "make_vocab_size_divisible_by": 8})[0]
    assert "[128, 32] in the checkpoint, [120, 32] in the model" in error


def test_no_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    assert "no checkpoint at" in ranks.run(_error, 1, Case(), tmp_path / "none", {})[0]
    (tmp_path / "half").mkdir()
    assert "lightning_megatron.json, which is written last" in ranks.run(_error, 1, Case(), tmp_path / "half", {})[0]


# ------------------------------------------------------------------------------------------------- damage and malice


def _copy(path: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(path, to)
    return to


def _examine(path: Path) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", str(path)])
    return args.run(args)


def test_doctor(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _examine(checkpoint) == 0
    said = capsys.readouterr().out
    assert "GPTModule" in said
    assert "exp_avg, exp_avg_sq" in said
    assert "tensor_model_parallel_size=2" in said
    damaged = _copy(checkpoint, tmp_path / "damaged")
    file = damaged / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert _examine(damaged) == 1
    said = capsys.readouterr().err
    assert "__0_0.distcp does not have its checksum" in said
    assert len([line for line in said.splitlines() if "is damaged in" in line]) <= 1
    (damaged / "lightning.pt").unlink()
    assert "lightning.pt is missing" in "\n".join(verify(damaged))


def test_damage_is_noticed_at_load(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    damaged = _copy(checkpoint, tmp_path / "damaged")
    from lightning_megatron.checkpoint.shard_files import ShardFiles

    chunk = ShardFiles.open(damaged).chunks["decoder.layers.mlp.linear_fc1.weight"][0]
    data = bytearray((damaged / chunk.file).read_bytes())
    data[chunk.start + chunk.length // 2] ^= 1
    (damaged / chunk.file).write_bytes(data)
    errors = ranks.run(_error, 2, Case(2, TP2), damaged, {})
    assert errors[0] == errors[1]
    assert "is damaged in decoder.layers.mlp.linear_fc1.weight" in errors[0]
    (damaged / chunk.file).write_bytes(data[:-100])
    assert (
        f"{chunk.file} has {len(data) - 100} bytes instead of {len(data)}"
        in ranks.run(_error, 1, Case(), damaged, {})[0]
    )


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ.get("EVIL", "/nonexistent/evil"),)


def _resum(path: Path) -> None:
    """What an attacker can do: make the checksums match."""
    from dataclasses import replace

    from lightning_megatron.checkpoint.metadata import CheckpointMetadata, FileSum

    metadata = CheckpointMetadata.read(path)
    replace(metadata, files={name: FileSum.of(path / name) for name in metadata.files}).write(path)


@pytest.mark.parametrize("file", [".metadata", "lightning.pt", "common.pt", "__0_0.distcp"])
def test_malicious_pickles_do_not_run(
    ranks: RankPool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    evil, mark = _copy(checkpoint, tmp_path / "evil"), tmp_path / "mark"
    monkeypatch.setenv("EVIL", str(mark))
    if file == ".metadata":
        (evil / file).write_bytes(pickle.dumps(_Evil()))
    elif file == "__0_0.distcp":
        from lightning_megatron.checkpoint.shard_files import ShardFiles

        chunk = next(c for cs in ShardFiles.open(evil).chunks.values() for c in cs if c.file == file)
        data = bytearray((evil / file).read_bytes())
        bomb = pickle.dumps(_Evil())
        data[chunk.start : chunk.start + chunk.length] = bomb.ljust(chunk.length, b"\0")
        (evil / file).write_bytes(data)
    else:
        torch.save(_Evil(), evil / file)
    _resum(evil)
    error = ranks.run(_error, 1, Case(), evil, {})[0]
    verify(evil)
    assert not mark.exists()
    if file != "common.pt":  # which is never read
        assert "unsafe" in error or "could run code" in error or "damaged" in error


# --------------------------------------------------------------------------------------- one file, averages, doctor


def test_consolidate_and_back(checkpoint: Path, tmp_path: Path) -> None:
    consolidate(checkpoint, tmp_path / "one.safetensors")
    expand(tmp_path / "one.safetensors", tmp_path / "back")
    one, other = tensors(checkpoint), tensors(tmp_path / "back")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert verify(tmp_path / "back") == []


def test_expanded_checkpoint_resumes(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    consolidate(checkpoint, tmp_path / "one.safetensors")
    expand(tmp_path / "one.safetensors", tmp_path / "back")
    case = Case(2, TP2)
    straight = ranks.run(_train, 2, case, 4, None, checkpoint)
    assert ranks.run(_train, 2, case, 4, None, tmp_path / "back") == straight


def test_average(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    ranks.run(_train, 1, Case(), 4, tmp_path / "later", checkpoint)
    average([checkpoint, tmp_path / "later"], tmp_path / "mean")
    one, other, mean = (tensors(path) for path in (checkpoint, tmp_path / "later", tmp_path / "mean"))
    name = "decoder.layers.mlp.linear_fc1.weight"
    torch.testing.assert_close(mean[name], (one[name] + other[name]) / 2, rtol=0, atol=1e-7)
    assert not torch.equal(one[name], other[name])
    assert not [key for key in mean if key.startswith("optimizer.")]
