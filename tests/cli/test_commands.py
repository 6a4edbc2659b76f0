"""Every command with no argument, with a wrong one, and with --help: a short answer and the right exit code."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lightning_megatron as lm
from lightning_megatron.cli.main import COMMANDS, RECIPES, available, main
from lightning_megatron.cli.preflight import preflight
from tests.helpers import quiet_trainer, tiny_config


def answer(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    try:
        code = main(list(arguments))
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_all_commands_are_there(capsys: Any) -> None:
    assert {*COMMANDS, *RECIPES} == set(available())
    code, out, _ = answer(capsys)
    assert code == 2
    assert all(name in out for name in available())
    code, out, _ = answer(capsys, "--help")
    assert code == 0
    assert all(name in out for name in available())


def test_an_unknown_command_names_the_nearest(capsys: Any) -> None:
    code, _, err = answer(capsys, "pretain")
    assert code == 2
    assert "Did you mean pretrain" in err
    code, _, err = answer(capsys, "--verion")
    assert code == 2


@pytest.mark.parametrize("command", [name for name in available() if name not in RECIPES])
def test_help(capsys: Any, command: str) -> None:
    code, out, err = answer(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: lightning-megatron {command}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("preprocess", "required: inputs"),
        ("plan", "For example:"),
        ("config", "--yes"),
        ("generate", "required: checkpoint"),
        ("convert", "required: --load-path"),
        ("schedule", "For example:"),
        ("report", "required: RUN"),
    ],
)
def test_no_argument(capsys: Any, monkeypatch: Any, tmp_path: Any, command: str, message: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.chdir(tmp_path)
    code, _, err = answer(capsys, command)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [name for name in available() if name not in RECIPES])
def test_a_wrong_option_is_refused_with_the_usage_of_the_command(capsys: Any, command: str) -> None:
    code, out, err = answer(capsys, command, "x", "--no-such-option")
    assert (code, out) == (2, "")
    assert err.startswith(f"usage: lightning-megatron {command}")


def test_a_wrong_option_names_the_nearest(capsys: Any) -> None:
    assert "Did you mean --top?" in answer(capsys, "plan", "--topp", "3")[2]
    assert "Did you mean --devices?" in answer(capsys, "doctor", "--devises", "3")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("plan", "gpt2_large"), 2, "is not key=value"),
        (("plan", "model=gpt2_lagre"), 2, "Did you mean gpt2_large"),
        (("report", "/no/such/run"), 1, "There is no directory"),
        (("doctor", "/no/such.ckpt"), 1, "There is no checkpoint"),
        (("generate", "/no/such.ckpt", "--tokenizer", "/no", "--prompt", "x"), 2, "error:"),
        (("generate", "/no/such.ckpt", "--tokenizer", "/no"), 2, "at least one --prompt"),
        (("convert", "--load-path", "/no/such", "--save-path", "x", "--to", "huggingface"), 2, "error:"),
        (("preprocess", "/no/such.txt", "--output", "x", "--tokenizer", "/no"), 1, "error:"),
        (("config", "--yes", "--tp-degree", "many"), 2, "error:"),
        (("config", "--from-accelerate", "/no/such.yaml"), 2, "There is no file --from-accelerate=/no/such.yaml"),
        (("generate", "x.ckpt", "--prompts", "/no/such"), 2, "There is no file --prompts=/no/such"),
        (("generate", "x.ckpt", "--tokenizer", "/no", "--prompt", "x"), 2, "from '/no': it does not exist"),
        (("convert", "--load-path", "x"), 2, "--save-path and --to are needed"),
        (("plan", "model=gpt2_large", "gpus=0"), 2, "gpus=0, but must be at least 1"),
        (
            ("plan", "model=gpt2_large", "gpus=6", "tensor_model_parallel_size=3"),
            2,
            "No layout with tensor_model_parallel_size=3 divides gpus=6, num_layers=36, num_attention_heads=20",
        ),
    ],
)
def test_wrong_values(capsys: Any, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, _, err = answer(capsys, *arguments)
    assert found == code
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pretrain", "--help"), 0, "usage: lightning-megatron pretrain"),
        (("pretrain",), 2, "data.data_path has no value"),
        (("pretrain", "modle=gpt_tiny"), 2, "Did you mean 'model'?"),
        (("pretrain", "gpt_tiny"), 2, "is not field=value"),
        (("finetune", "--help"), 0, "usage: lightning-megatron finetune"),
        (("finetune", "save_path=x"), 2, "pretrained has no value"),
        (("pretrain", "--model", "gpt2"), 2, "--model is no option. Fields are written without dashes"),
        (("pretrain", "--confg-name=x"), 2, "Did you mean --config-name?"),
        (("pretrain", "data.data_path=a=b"), 2, "cannot be read: mismatched input '='"),
        (("pretrain", "model=nonexistent"), 2, "model=nonexistent is none of bert_345m"),
        (
            ("pretrain", "data.data_path=x", "trainer.max_steps=abc"),
            2,
            "trainer.max_steps='abc' is not of the type int",
        ),
        (("pretrain", "data.data_path=x", "task=trian"), 2, "task=trian is none of fit, validate, test"),
        (("pretrain", "data.data_path=/no/such"), 1, "1 of 1 datasets in data_path do not exist: /no/such"),
        (("pretrain", "data.data_path=/no/such", "ckpt_path=last.ckpt"), 1, "do not exist"),
        (("finetune", "pretrained=/no/such", "data.train_path=x", "save_path=y"), 1, "/no/such does not exist"),
        (("demo", "--help"), 0, "--steps"),
        (("demo", "--steps", "0"), 2, "--steps=0, but must be at least 1"),
        (("demo", "--stepz", "3"), 2, "unrecognized arguments"),
    ],
)
def test_recipes_as_commands(
    capsys: Any, monkeypatch: Any, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", [])  # recipes put theirs there, for launchers
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which they set
    monkeypatch.chdir(tmp_path)
    found, out, err = answer(capsys, *arguments)
    assert found == code
    assert message in out + err
    assert len(err.splitlines()) <= 12


def test_other_ranks_say_which_they_are(capsys: Any, monkeypatch: Any) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert answer(capsys, "pretrain", "trainer.max_step=3")[2].startswith("error on rank 3: There is no field")


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "lightning_megatron", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == lm.__version__


def test_a_reader_who_has_enough() -> None:
    command = f"{sys.executable} -m lightning_megatron.cli.main pretrain --help | true; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (1, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_lightning_refuses_is_one_line(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.chdir(tmp_path)
    code, _, err = answer(capsys, "pretrain", "data.data_path=x", "trainer.accelerator=gpu")
    shown = "Change trainer.*, which --cfg job --package trainer shows."
    assert (code, err) == (1, f"error: trainer: No supported gpu backend found! {shown}\n")


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed(capsys: Any, monkeypatch: Any, tmp_path: Path, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.chdir(tmp_path)
    code, _, err = answer(capsys, "pretrain", "data.data_path=x", f"logger={package}")
    assert code == 1
    assert err.startswith(f"error: logger.{package}: ")
    assert "pip install" in err
    assert len(err.splitlines()) == 1


def test_preflight(tmp_path: Path) -> None:
    """What each rank would raise is raised before there are ranks."""
    module = lm.GPTModule(tiny_config())
    examples = tmp_path / "train.jsonl"
    examples.write_text('{"prompt": "a", "completion": "b"}\n')

    def check(tp: int = 1, path: Path = examples, seq_length: int = 16, ckpt_path: str | None = None) -> None:
        trainer = quiet_trainer(lm.MegatronStrategy(tensor_model_parallel_size=tp), tp)
        data = lm.data.FineTuningData(path, tokenizer="x", seq_length=seq_length, global_batch_size=2)
        preflight(trainer, module, data, ckpt_path=ckpt_path)

    check()
    check(tp=2, ckpt_path="last")
    with pytest.raises(lm.LayoutError, match=r"num_attention_heads=4 .* by .*=3. Sizes that fit the model: 1, 2, 4\."):
        check(tp=3)
    with pytest.raises(lm.DataError, match="does not exist: give a JSON-lines file"):
        check(path=tmp_path / "nowhere")
    with pytest.raises(lm.DataError, match=r"data.seq_length=17 is longer than .*=16. Set data.seq_length=16 or less"):
        check(seq_length=17)
    with pytest.raises(lm.CheckpointError, match=r"There is no checkpoint at ckpt_path=last\.ckpt"):
        check(ckpt_path="last.ckpt")


def test_a_directory_of_hugging_face_is_no_checkpoint_but_can_become_one(capsys: Any, tmp_path: Path) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path)
    code, _, err = answer(capsys, "generate", str(tmp_path), "--prompt", "x")
    assert code == 2
    assert f"`lightning-megatron convert --load-path {tmp_path} --to lightning --save-path NEW` makes one" in err


def test_a_missing_text_draws_no_bar(capsys: Any, tmp_path: Path) -> None:
    code, out, err = answer(capsys, "preprocess", "/no.txt", "--output", str(tmp_path / "o"), "--tokenizer", "/no")
    assert (code, out, err) == (1, "", "error: The input /no.txt does not exist.\n")


def test_help_and_plans_are_quick() -> None:
    """Neither imports torch; a plan for 16,384 GPUs takes less than two seconds."""
    code = """
import contextlib, io, sys, time
from lightning_megatron.cli.main import main
for arguments in (["pretrain", "--help"], ["pretrain"], ["plan", "--help"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(arguments)
started = time.process_time()
assert main(["plan", "model=llama3_70b", "gpus=16384", "gpu=h100", "global_batch_size=16384"]) == 0
print(time.process_time() - started, [name for name in ("torch", "lightning", "megatron") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    seconds, imported = run.stdout.splitlines()[-1].split(maxsplit=1)
    assert "16384 x h100" in run.stdout
    assert float(seconds) < 2
    assert imported == "[]"
