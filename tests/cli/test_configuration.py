"""Configurations compose, every mistake names the field and the nearest one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hydra.utils import instantiate

import lightning_megatron as lm
from lightning_megatron.checkpoint import CheckpointOptions
from lightning_megatron.cli.configuration import ConfigurationError, check, check_overrides, compose, conf_dir, recipe
from lightning_megatron.generation import GenerationConfig

DATA = "data.data_path=corpus"
OPTIONS = [
    (group.name, option.stem)
    for group in sorted(conf_dir().iterdir())
    if group.is_dir()
    for option in sorted(group.glob("*.yaml"))
]


NEEDS = {
    ("data", "finetuning"): ["data.train_path=examples.jsonl", "data.tokenizer=tokenizer"],
    ("data", "huggingface"): ["data.dataset=texts", "data.tokenizer=tokenizer"],
    ("callbacks", "finetuning"): [DATA, "callbacks.initial_weights.checkpoint=last.ckpt"],
}
"""What an option needs beside itself."""
ROOTS = {"generation": ("generate", ["checkpoint=last.ckpt"])}
"""Groups of another recipe than pretrain."""


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_shipped_option_composes_and_instantiates(group: str, option: str) -> None:
    root, needed = ROOTS.get(group, ("pretrain", NEEDS.get((group, option), [DATA])))
    config = compose(root, [f"{group}={option}", *needed])
    if group in ("model", "parallel", "optim", "precision", "data", "callbacks", "generation"):
        assert instantiate(config[group]) is not None


@pytest.mark.parametrize("option", ["finetuning", "huggingface"])
def test_data_of_other_kinds_takes_only_its_own_fields(option: str) -> None:
    with pytest.raises(ConfigurationError, match=r"'data\.global_batch'. Did you mean 'data.global_batch_size'"):
        compose("pretrain", [f"data={option}", *NEEDS["data", option], "data.global_batch=3"])
    with pytest.raises(ConfigurationError, match="has no value"):
        compose("pretrain", [f"data={option}"])


def test_every_field_of_the_dataclasses_is_in_the_configuration() -> None:
    config = compose("pretrain", [DATA])
    assert set(config.optim) - {"_target_"} == set(lm.OptimizerConfig.__dataclass_fields__)
    assert set(config.model) - {"_target_"} == set(lm.GPTConfig.__dataclass_fields__)
    assert set(lm.ParallelLayout.__dataclass_fields__) <= set(config.parallel)
    assert set(config.parallel.checkpoint) - {"_target_"} == set(CheckpointOptions.__dataclass_fields__)
    generation = compose("generate", ["checkpoint=last.ckpt"]).generation
    assert set(generation) - {"_target_"} == set(GenerationConfig.__dataclass_fields__)
    assert instantiate(config.optim) == lm.OptimizerConfig(min_lr=3e-5, weight_decay=0.1)


def test_a_users_directory_adds_groups_options_and_fields(tmp_path: Path) -> None:
    for group, name, text in (
        ("model", "mine", "defaults: [gpt_tiny]\nnum_layers: 3\n"),
        ("experiment", "short", "# @package _global_\ntrainer: {max_steps: 7}\nnote: short\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    given = ["model=mine", "+experiment=short", "note=long", "model.hidden_size=64"]
    check_overrides("pretrain", given, [tmp_path])
    for mistaken, words in (
        ("model=mien", "Did you mean 'mine'"),
        ("+experiment=sort", "Did you mean 'short'"),
        ("nope=1", "no field 'nope'"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            check_overrides("pretrain", [*given, mistaken], [tmp_path])
    script = "from lightning_megatron.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", script, "pretrain", "--config-dir", str(tmp_path), *given, "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "num_layers: 3" in done.stdout, done.stderr
    assert "note: long" in done.stdout


def test_each_job_of_a_sweep_has_a_directory_of_its_own(tmp_path: Path) -> None:
    @recipe("pretrain")
    def write(config: Any) -> None:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        (Path(config.run_dir) / "optim").write_text(f"{config.optim.lr} {config.trainer.default_root_dir}")

    arguments = ["--multirun", f"run_dir={tmp_path}", "optim.lr=0.1,0.2", "parallel=single", DATA]
    with patch("sys.argv", ["pretrain", *arguments]):
        write()
    assert [(tmp_path / f"{job}/optim").read_text() for job in (0, 1)] == [f"0.1 {tmp_path}/0", f"0.2 {tmp_path}/1"]
    check_overrides("pretrain", ["parallel=tp2_pp2,single", "parallel.micro_batch_size=2"])


def test_overrides_arrive() -> None:
    config = compose(
        "pretrain", [DATA, "model=gpt2_large", "parallel=tp2_pp2", "optim.lr=1e-3", "+trainer.profiler=simple"]
    )
    assert instantiate(config.model) == lm.GPTConfig.gpt2("large")
    strategy = instantiate(config.parallel)
    assert str(strategy.layout) == "tp2_pp2_sp"
    assert (config.optim.lr, config.data.seq_length, config.data.vocab_size) == (1e-3, 1024, 50257)
    assert config.trainer.profiler == "simple"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=64", "no field 'model.hiden_size'. Did you mean 'model.hidden_size'?"),
        ("optim.learning_rte=1", "no field 'optim.learning_rte'"),
        ("modle=gpt_tiny", "no field 'modle'. Did you mean 'model'?"),
        ("model=gpt2_lage", "model=gpt2_lage is none of .*. Did you mean 'gpt2_large'?"),
        ("precision=bf16", "precision=bf16 is none of .*bf16-mixed"),
        ("trainer.max_step=3", "no field 'trainer.max_step'. Did you mean 'trainer.max_steps'?"),
        ("model.hidden_size=abc", "model.hidden_size='abc' is not of the type int"),
        ("model.hidden_size=1.5", "model.hidden_size=1.5 is not of the type int"),
        ("model.activation=7", "model.activation=7 is not of the type Literal"),
        ("optim.lr=fast", "optim.lr='fast' is not of the type float"),
        ("parallel.sequence_parallel=2", "parallel.sequence_parallel=2 is not of the type bool"),
        ("trainer.max_steps=many", "trainer.max_steps='many' is not of the type int"),
        ("+trainer.max_stepz=3", "no field 'trainer.max_stepz'. Did you mean 'trainer.max_steps'?"),
        ("+model.depth=3", "no field 'model.depth'"),
        ("data.split=[1", "no viable alternative"),
    ],
)
def test_a_mistake_names_the_field_and_the_nearest(override: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compose("pretrain", [DATA, override])


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.data_path has no value"):
        compose("pretrain")


def test_mistakes_in_generating() -> None:
    with pytest.raises(ConfigurationError, match="checkpoint has no value"):
        compose("generate")
    with pytest.raises(ConfigurationError, match=r"'generation\.top_q'. Did you mean 'generation.top_"):
        compose("generate", ["checkpoint=last.ckpt", "generation.top_q=3"])
    with pytest.raises(ConfigurationError, match="generation=sampel is none of beams, greedy, sampled"):
        compose("generate", ["checkpoint=last.ckpt", "generation=sampel"])


def test_interpolations_without_an_end_are_errors() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.seq_length"):
        check(compose("pretrain", [DATA, "data.seq_length=${model.nothing}"]))


def test_conf_is_found() -> None:
    assert (conf_dir() / "pretrain.yaml").is_file()
    assert isinstance(conf_dir(), Path)
