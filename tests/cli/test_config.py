"""``lightning-megatron config``: the questions, the file, and the conversion of Accelerate's."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_megatron.cli import config as command
from lightning_megatron.cli.accelerate import TRANSLATED, UNTRANSLATED, convert
from lightning_megatron.models.config import GPTConfig

# Every field of Accelerate 1.15's MegatronLMPlugin.
PLUGIN_FIELDS = shlex.split("""
tp_degree pp_degree num_micro_batches gradient_clipping sequence_parallelism recompute_activations
use_distributed_optimizer pipeline_model_parallel_split_rank num_layers_per_virtual_pipeline_stage is_train_batch_min
train_iters train_samples weight_decay_incr_style start_weight_decay end_weight_decay lr_decay_style lr_decay_iters
lr_decay_samples lr_warmup_iters lr_warmup_samples lr_warmup_fraction min_lr consumed_samples no_wd_decay_cond
scale_lr_cond lr_mult megatron_dataset_flag seq_length encoder_seq_length decoder_seq_length tensorboard_dir
set_all_logging_options eval_iters eval_interval return_logits custom_train_step_class custom_train_step_kwargs
custom_model_provider_function custom_prepare_model_function custom_megatron_datasets_provider_function
custom_get_batch_function custom_loss_function use_custom_fsdp overlap_cpu_optimizer_d2h_h2d no_load_optim no_save_optim
eod_mask_loss optimizer_cpu_offload use_precision_aware_optimizer decoder_last_pipeline_num_layers
recompute_granularity recompute_method recompute_num_layers attention_backend expert_model_parallel_size
context_parallel_size attention_dropout hidden_dropout attention_softmax_in_fp32 expert_tensor_parallel_size
calculate_per_token_loss use_rotary_position_embeddings
""")

# What the Accelerate guide's wizard writes.
GUIDE = """
compute_environment: LOCAL_MACHINE
distributed_type: MEGATRON_LM
downcast_bf16: 'no'
machine_rank: 0
main_training_function: main
megatron_lm_config:
  megatron_lm_gradient_clipping: 1.0
  megatron_lm_num_micro_batches: 2
  megatron_lm_pp_degree: 2
  megatron_lm_recompute_activations: true
  megatron_lm_sequence_parallelism: true
  megatron_lm_tp_degree: 2
  megatron_lm_use_distributed_optimizer: true
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
use_cpu: false
"""


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="lightning-megatron")
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["config", *arguments])
    return args.run(args)


def written(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def type_answers(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Answer the questions with ``answers``; returns the prompts, filled as they are asked."""
    prompts: list[str] = []
    rest = iter(answers)

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    return prompts


def test_questions_are_accelerates_in_its_order_with_its_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = type_answers(monkeypatch, "2", "", "2", "4", "", "no", "", "4", "bf16", "gpt2_large", "corpus", *[""] * 4)
    output = tmp_path / "mine.yaml"
    assert run("--output", str(output)) == 0
    assert prompts[:9] == [
        "What is the Tensor Parallelism degree/size? [1]: ",
        "Do you want to enable Sequence Parallelism? [YES/no]: ",
        "What is the Pipeline Parallelism degree/size? [1]: ",
        "What is the number of micro-batches? [1]: ",
        "Do you want to enable selective activation recomputation? [YES/no]: ",
        "Do you want to use distributed optimizer which shards optimizer state and gradients across data parallel "
        "ranks? [YES/no]: ",
        "What is the gradient clipping value based on global L2 Norm (0 to disable)? [1.0]: ",
        "How many GPU(s) should be used for distributed training? [1]: ",
        "Mixed precision: no, fp16 or bf16? [no]: ",
    ]
    assert prompts[11] == "How many tokens per sequence? [1024]: "
    config = written(output)
    assert config["defaults"] == ["pretrain", {"override precision": "bf16-mixed"}, "_self_"]
    assert config["parallel"] == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "micro_batch_size": 1,
        "use_distributed_optimizer": False,
    }
    assert config["data"] == {"data_path": "corpus", "seq_length": 1024, "global_batch_size": 4}
    assert config["optim"] == {"lr": 3e-4, "min_lr": 0.0, "clip_grad": 1.0}
    assert config["trainer"]["devices"] == 4
    assert GPTConfig(**config["model"]) == GPTConfig.gpt2("large", recompute_granularity="selective")


def test_questions_about_unused_parallelism_are_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts = type_answers(monkeypatch, *[""] * 20)
    assert run("-o", str(tmp_path / "a.yaml")) == 0
    assert len(prompts) == len(command.QUESTIONS) - 2
    assert not any("Sequence Parallelism" in prompt or "micro-batches?" in prompt for prompt in prompts)
    config = written(tmp_path / "a.yaml")
    assert config["parallel"]["sequence_parallel"] is False
    assert config["data"]["data_path"] == "???"  # Hydra's word for a value that must still be given


def test_a_wrong_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = type_answers(monkeypatch, "many", "0", "2", *[""] * 20)
    assert run("-o", str(tmp_path / "a.yaml"), "--num-gpus", "2") == 0
    assert [prompt.startswith("What is the Tensor") for prompt in prompts[:4]] == [True, True, True, False]
    error = capsys.readouterr().err
    assert "tp_degree=many is not a whole number." in error
    assert "tp_degree=0, but must be at least 1." in error


def test_flags_answer_without_a_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "run.yaml"
    flags = "--yes --tp-degree 2 --pp-degree 2 --num-micro-batches 3 --num-gpus 8 --micro-batch-size 4 --lr 1e-4"
    assert run("-o", str(output), *shlex.split(flags), "--model", "tinyllama_1b", "--recompute-activations", "no") == 0
    config = written(output)
    assert config["data"]["global_batch_size"] == 4 * 3 * 2
    assert config["data"]["seq_length"] == 2048
    assert config["model"]["num_query_groups"] == 4
    assert config["model"]["recompute_granularity"] is None
    assert config["optim"]["lr"] == 1e-4
    assert f"--config-dir {output.parent} --config-name run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--yes --model gpt2_larg", "model=gpt2_larg is not known. Did you mean gpt2_large"),
        ("--yes --mixed-precision bf17", "mixed_precision=bf17 is not known. Did you mean bf16"),
        ("--yes --tp-degree 2", "The world size of 1 is not divisible by tensor_model_parallel_size=2"),
        ("--yes --tp-degree 8 --num-gpus 8", "num_attention_heads=12 is not divisible by tensor_model_parallel_size=8"),
        ("--yes --sequence-parallelism yes", "tensor_model_parallel_size=1. Set tensor_model_parallel_size"),
        ("--yes --seq-length 2048", "seq_length=2048 is longer than the model's 1024 positions"),
        ("--yes --output file.json", "must end in .yaml"),
        ("--from-accelerate nowhere.yaml", "nowhere.yaml"),
        (
            "--tp-degree 1",
            "The input ended at 'What is the Pipeline Parallelism degree/size?'. Answer it with --pp-degree",
        ),
    ],
)
def test_wrong_flags_are_named_and_write_nothing(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    type_answers(monkeypatch)
    assert run(*shlex.split(flags)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.yaml"
    output.write_text("mine")
    assert run("--yes", "-o", str(output)) == 2
    assert "--force" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert run("--yes", "--force", "-o", str(output)) == 0
    assert written(output)["parallel"]["tensor_model_parallel_size"] == 1


# -------------------------------------------------------------- from Accelerate


def test_the_guides_file_becomes_the_guides_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "accelerate.yaml").write_text(GUIDE)
    flags = "--model gpt2_large --micro-batch-size 24 --data-path corpus"
    accelerate, output = str(tmp_path / "accelerate.yaml"), tmp_path / "ours.yaml"
    assert run("--from-accelerate", accelerate, "-o", str(output), *shlex.split(flags)) == 0
    config = written(output)
    assert config["parallel"] == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "micro_batch_size": 24,
        "use_distributed_optimizer": True,
    }
    assert config["data"]["global_batch_size"] == 48
    assert config["trainer"]["devices"] == 4
    assert config["model"]["recompute_granularity"] == "selective"
    assert config["defaults"][1] == {"override precision": "bf16-mixed"}
    out = capsys.readouterr().out
    for key in yaml.safe_load(GUIDE).keys() - {"megatron_lm_config", "distributed_type"}:
        assert f"{key}: " in out
    assert "megatron_lm_num_micro_batches: data.global_batch_size=48" in out


def test_every_field_of_the_plugin_is_translated_or_has_a_reason() -> None:
    assert set(PLUGIN_FIELDS) == TRANSLATED.keys() | UNTRANSLATED.keys()
    assert not TRANSLATED.keys() & UNTRANSLATED.keys()
    assert all(reason.endswith(".") or "=" in reason for reason in UNTRANSLATED.values())
    # Unset fields, which Accelerate writes as null, change nothing.
    nothing = convert(dict.fromkeys(PLUGIN_FIELDS), num_layers=12)
    assert nothing.settings == {
        "trainer.devices": 1,
        "trainer.num_nodes": 1,
        "parallel.micro_batch_size": 1,
        "data.global_batch_size": 1,
    }


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"megatron_lm_gradient_clipping": 0.5}, {"optim.clip_grad": 0.5}),
        (
            {"num_layers_per_virtual_pipeline_stage": 3, "pp_degree": 2, "num_processes": 2},
            {"parallel.virtual_pipeline_model_parallel_size": 6},
        ),
        ({"train_samples": 1000, "num_micro_batches": 4}, {"trainer.max_steps": 250, "data.global_batch_size": 4}),
        ({"lr_warmup_fraction": 0.1, "train_iters": 500}, {"optim.lr_warmup_steps": 50}),
        ({"lr_warmup_samples": 64, "num_micro_batches": 8}, {"optim.lr_warmup_steps": 8}),
        ({"lr_decay_samples": 6400, "num_micro_batches": 8}, {"optim.lr_decay_steps": 800}),
        ({"num_processes": 16, "num_machines": 2}, {"trainer.devices": 8, "trainer.num_nodes": 2}),
        ({"recompute_granularity": "full"}, {"model.recompute_method": "uniform", "model.recompute_num_layers": 1}),
        ({"use_rotary_position_embeddings": True}, {"model.position_embedding_type": "rope"}),
        ({"encoder_seq_length": 256}, {"data.seq_length": 256}),
        ({"encoder_seq_length": 256, "seq_length": 512}, {"data.seq_length": 512}),
        ({"eval_iters": 7, "eval_interval": 70}, {"trainer.limit_val_batches": 7, "trainer.val_check_interval": 70}),
        ({"mixed_precision": "fp16"}, {"precision": "16-mixed"}),
        ({"other_megatron_args": {"attention_head_type": "multiquery"}}, {"model.num_query_groups": 1}),
        ({"other_megatron_args": {"position_embedding_type": "rotary"}}, {"model.position_embedding_type": "rope"}),
        ({"other_megatron_args": {"num_layers": 24}}, {"model.num_layers": 24}),
    ],
)
def test_values_arrive_in_our_units(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    got = convert(fields, num_layers=36).settings
    assert {key: got.get(key) for key in settings} == settings


def test_selective_recompute_drops_what_belongs_to_full() -> None:
    fields = {"recompute_granularity": "selective", "recompute_method": "uniform", "recompute_num_layers": 1}
    settings = convert(fields, num_layers=12).settings
    assert settings["model.recompute_granularity"] == "selective"
    assert "model.recompute_method" not in settings


def test_what_has_no_meaning_here_says_why() -> None:
    fields = {
        "megatron_lm_optimizer_cpu_offload": True,
        "megatron_lm_custom_loss_function": "f",
        "megatron_lm_tp_degre": 2,
        "other_megatron_args": {"vocab_file": "v.json", "position_embedding_type": "alibi"},
    }
    reasons = {entry.key: entry.reason for entry in convert(fields, num_layers=12).untranslated}
    assert "distributed optimizer" in reasons["megatron_lm_optimizer_cpu_offload"]
    assert "loss" in reasons["megatron_lm_custom_loss_function"]
    assert "Did you mean tp_degree" in reasons["megatron_lm_tp_degre"]
    assert "data.tokenizer" in reasons["other_megatron_args.vocab_file"]
    assert "rope" in reasons["other_megatron_args.position_embedding_type"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distributed_type": "FSDP"}, "distributed_type=FSDP"),
        ({"num_processes": 6, "tp_degree": 4}, "num_processes=6 is not divisible by"),
        ({"num_processes": 3, "num_machines": 2}, "does not divide over num_machines=2"),
        ({"num_layers_per_virtual_pipeline_stage": 5}, "does not divide the 12 layers"),
        ({"lr_warmup_fraction": 0.1}, "lr_warmup_fraction needs"),
        ({"mixed_precision": "fp17"}, "mixed_precision=fp17 is not known"),
    ],
)
def test_files_that_cannot_be_run_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(fields, num_layers=12)


def test_flags_do_not_contradict_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accelerate = tmp_path / "accelerate.yaml"
    accelerate.write_text(GUIDE)
    assert run("--from-accelerate", str(accelerate), "--tp-degree", "4", "-o", str(tmp_path / "a.yaml")) == 2
    assert "--tp-degree is decided by" in capsys.readouterr().err
    accelerate.write_text("- 1")
    assert run("--from-accelerate", str(accelerate), "-o", str(tmp_path / "a.yaml")) == 2
    assert "holds no Accelerate configuration" in capsys.readouterr().err


def test_the_file_extends_the_recipes_configuration(tmp_path: Path) -> None:
    """Composed by Hydra with the repository's own conf/, every value is where the recipe reads it."""
    hydra = pytest.importorskip("hydra")
    conf = Path(__file__).parents[2] / "conf"
    if not (conf / "pretrain.yaml").is_file():
        pytest.skip("needs conf/pretrain.yaml")
    output = tmp_path / "mine.yaml"
    assert (
        run("--yes", "-o", str(output), *shlex.split("--mixed-precision bf16 --model gpt2_medium --data-path c")) == 0
    )
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = hydra.compose("mine", [f"hydra.searchpath=[file://{conf}]"])
    assert config.precision.precision == "bf16-mixed"
    assert config.model.hidden_size == 1024
    assert config.data.data_path == "c"
    assert config.parallel._target_.endswith("MegatronStrategy")
    assert config.trainer.max_steps == 1000
