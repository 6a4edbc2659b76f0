"""``lightning-megatron plan`` as a user types it."""

import argparse
import io
import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console

from lightning_megatron.cli import plan as command
from lightning_megatron.cli import plan_tables
from lightning_megatron.cli.configuration import conf_dir
from lightning_megatron.planner import plan
from lightning_megatron.planner.request import build_request, parse_arguments


def run(line: str) -> int:
    parser = argparse.ArgumentParser(prog="lightning-megatron")
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["plan", *shlex.split(line)])
    return args.run(args)


def test_the_example_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model=gpt2_large gpus=64 gpu=h100 global_batch_size=512") == 0
    out = capsys.readouterr().out
    assert "774,030,080 parameters on 64 x h100 (8 nodes of 8)" in out
    assert "Best: tp1 dp64 mbs8" in out
    assert (
        "lightning-megatron pretrain model=gpt2_large data.data_path=PREFIX data.global_batch_size=512 "
        "precision=bf16-mixed trainer.devices=8 trainer.num_nodes=8 "
        "parallel.micro_batch_size=8 parallel.use_distributed_optimizer=true"
    ) in out
    assert "Assumed:" in out
    for table in ("Layouts, fastest first", "Memory per rank", "Where a step goes", "The same layout otherwise"):
        assert table in out


def test_parameters_per_rank_of_the_accelerate_guide(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model=gpt2_large gpus=4 layout=tp2_pp2_sp global_batch_size=48 micro_batch_size=24") == 0
    out = capsys.readouterr().out
    assert "210,753,280" in out
    assert "209,445,120" in out
    (bubble,) = [line for line in out.splitlines() if line.startswith("Bubble of 2 micro-batches: 1F1B ")]
    assert bubble.split()[5].rstrip(";") in next(line for line in out.splitlines() if line.startswith(" tp2_pp2_sp "))
    assert "in its place ZB-H1" in bubble


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model=llama_7b gpus=16 global_batch_size=64 --json --top 2") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"]["parameters"] == 6_738_415_616
    assert len(answer["layouts"]) == 2
    first, second = answer["layouts"]
    assert first["seconds"]["total"] <= second["seconds"]["total"]
    assert first["memory"][0]["total"] == pytest.approx(
        sum(size for part, size in first["memory"][0].items() if part != "total")
    )
    assert first["parallel"]["micro_batch_size"] >= 1


def test_an_uneven_layout_survives_shell_and_hydra(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model=llama3_405b gpus=16384 global_batch_size=2048 --top 1") == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if "parallel.pipeline_model_parallel_layout" in line
    )
    (value,) = [word for word in shlex.split(line) if "pipeline_model_parallel_layout" in word]
    override_parser = pytest.importorskip("hydra.core.override_parser.overrides_parser")
    (override,) = override_parser.OverridesParser.create().parse_overrides([value])
    assert override.value() == "Et*1|(t*2|)*62t*1L"


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"model=gpt2_small gpus=4 pipeline_model_parallel_size=4 --plot {tmp_path}") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "timeline.png"]
    assert "timeline.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model=gpt2_larg", "model=gpt2_larg is not known. Did you mean gpt2_large"),
        ("model=gpt2_large gpu=h10", "gpu=h10 is not known. Did you mean h100"),
        ("model=gpt2_large hiden_size=3", "key=hiden_size is not known. Did you mean hidden_size"),
        ("model=gpt2_large gpus=many", "gpus=many is not a whole number."),
        ("model=gpt2_large hidden_dropout=nan", "hidden_dropout=nan is not a number."),
        ("model=gpt2_large sequence_parallel=maybe", "sequence_parallel=maybe is not true or false."),
        ("model=gpt2_large gpus", "'gpus' is not key=value"),
        ("gpus=8", "model= is missing. Known models: gpt_tiny"),
        ("model=bert_345m rotary_base=1e6", "model=bert_345m: field=rotary_base is not known"),
        ("model=gpt2_large layers=apex", "layers=apex is not known. Known: fused, megatron_core"),
        ("model=gpt2_large layers=fused attention=torch_softmax", "layers=fused computes attention=flash"),
        ("model=gpt2_large gpus=0", "gpus=0, but must be at least 1."),
        ("model=gpt2_large seq_length=4096", "longer than the 1024 position embeddings"),
        ("model=gpt2_large precision=fp16", "precision=fp16 is not known. Known: bf16-mixed, bf16-true"),
        ("model=gpt2_large inter_node=ib_nd", "inter_node=ib_nd is not known. Did you mean ib_ndr"),
        ("model=gpt2_large layout=tp2_xx3", "'xx3' in the layout 'tp2_xx3'"),
        ("model=gpt2_large layout=tp2 pipeline_model_parallel_size=2", "layout=tp2 already decides"),
        ("model=gpt2_large num_attention_heads=7", "hidden_size=1280 is not divisible by num_attention_heads=7"),
        ("model=gpt3_175b gpus=8", "Nothing fits"),
        ("model=gpt2_small --top 0", "--top=0, but must be at least 1."),
    ],
)
def test_wrong_arguments_are_named(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err


def test_no_argument_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("") == 2
    error = capsys.readouterr().err
    assert "lightning-megatron plan model=gpt2_large gpus=64" in error
    assert "llama_70b" in error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    out = capsys.readouterr().out
    assert "--plot" in out
    assert "gpus_per_node" in out


def test_groups_and_model_fields_are_accepted() -> None:
    request = build_request(
        parse_arguments(
            shlex.split(
                "model=gpt2_large model.num_layers=40 parallel.tensor_model_parallel_size=2 data.global_batch_size=64 "
                "vocab_size=50304 add_qkv_bias=none gpus=16 host_ms_per_layer=0 recompute_granularity=none "
                "intra_node=pcie5"
            )
        )
    )
    assert (request.model.num_layers, request.model.vocab_size, request.model.add_qkv_bias) == (40, 50304, None)
    assert request.constraints.tensor_model_parallel_size == 2
    assert request.constraints.recompute is not None
    assert request.constraints.recompute.granularity is None
    assert request.batch.global_batch_size == 64
    assert request.batch.seq_length == 1024
    assert request.runtime.host_seconds_per_layer == 0
    assert request.cluster.intra_node.name == "pcie5"


def test_default_batch_is_a_multiple_of_the_gpus() -> None:
    assert build_request({"model": "gpt2_small", "gpus": 96}).batch.global_batch_size == 576
    assert build_request({"model": "gpt2_small", "gpus": 10240}).batch.global_batch_size == 10240


def commands(out: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith("  lightning-megatron pretrain "))
    return shlex.split(line)[2:]


@pytest.mark.parametrize(
    "line",
    [
        "model=gpt2_large gpus=4 layout=tp2_pp2_sp global_batch_size=48 seq_length=512 hidden_dropout=0",
        "model=llama_7b gpus=16 global_batch_size=64 precision=bf16-true recompute_granularity=selective",
        "model=bert_345m gpus=8 gpu=a100",
        "model=t5_tiny gpus=2 global_batch_size=8",
        "model=moe_tiny gpus=1",
        "model=llama3_405b gpus=16384 global_batch_size=2048",
    ],
)
def test_the_printed_command_trains_what_was_planned(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{line} --json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert run(line) == 0
    overrides = commands(capsys.readouterr().out)
    with initialize_config_dir(str(conf_dir()), version_base=None):
        config = compose("pretrain", overrides=overrides)
    best = planned["layouts"][0]
    request = build_request(parse_arguments(shlex.split(line)))
    assert instantiate(config.model) == request.trained.replace(**best["model"])
    assert (config.data.global_batch_size, config.data.seq_length) == (
        planned["batch"]["global_batch_size"],
        planned["batch"]["seq_length"],
    )
    assert config.precision.precision == planned["batch"]["precision"]
    assert config.trainer.devices * config.trainer.num_nodes == planned["cluster"]["num_gpus"]
    assert {name: config.parallel[name] for name in best["parallel"]} == best["parallel"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_narrow_terminals_lose_columns_not_digits(width: int) -> None:
    request = build_request(parse_arguments(["model=llama_7b", "gpus=16", "global_batch_size=64"]))
    result = plan(request.model, request.cluster, request.batch)
    console = Console(width=width, file=io.StringIO(), record=True)
    for table in (plan_tables._ranking(result), plan_tables._memory_table(request, result.best)):
        console.print(table.fitting(console))
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert ("HFU" in text) == (width == 120)
    assert f"{result.best.mfu:.1%}" in text
