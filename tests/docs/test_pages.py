"""Every Python and shell block of README and docs runs, and the tables of the migration pages are whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_megatron.cli.accelerate import TRANSLATED, UNTRANSLATED
from tests.docs.blocks import Block, blocks

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRELUDE = "import lightning as L\nimport lightning_megatron as lm\n"
# What is printed is of the size that its reader has; what runs is of a laptop's.
SMALL = "num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=512, max_position_embeddings=64"
SMALLER = (
    ('gpt2("large")', f'gpt2("large").replace({SMALL})'),
    ("model=gpt2_large", " ".join(["model=gpt_tiny", *(f"model.{field}" for field in SMALL.split(", "))])),
    ("devices=8", "devices=4"),
    ("max_steps=1000", "max_steps=2"),
    ("data.seq_length=1024", "data.seq_length=64"),
    ("seq_length=1024", "seq_length=64, num_workers=0"),  # the ranks of the pool may have no workers
    ("global_batch_size=512", "global_batch_size=8"),
    ("L.Trainer(", 'L.Trainer(accelerator="cpu", enable_progress_bar=False, '),
    ("lightning-megatron pretrain", "lightning-megatron pretrain trainer.accelerator=cpu"),
    ("train.jsonl", "train.jsonl trainer.accelerator=cpu trainer.max_steps=2 data.seq_length=64"),
    ("lightning-megatron doctor", "lightning-megatron doctor --accelerator cpu --timeout 200"),
    ("pretrain.py", "pretrain.py trainer.accelerator=cpu"),
)


def smaller(source: str) -> str:
    for printed, run in SMALLER:
        source = source.replace(printed, run)
    return source


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `corpus.bin`, `tokenizer/`, `recipes/`, and the command on its path."""
    from lightning_megatron.data import IndexedDatasetWriter, load_tokenizer, train_byte_level_bpe

    directory = tmp_path_factory.mktemp("docs")
    texts = [f"The module number {n} returns a new value, and the {n + 1}th does not. " * 4 for n in range(200)]
    tokenizer = load_tokenizer(train_byte_level_bpe(texts, 512, directory / "tokenizer"))
    with IndexedDatasetWriter(directory / "corpus") as writer:
        for tokens in tokenizer(texts)["input_ids"]:
            writer.add_document([*tokens, tokenizer.eos_token_id])
    pretrained(directory / "path" / "to" / "Qwen2.5-0.5B", tokenizer)
    (directory / "train.jsonl").write_text('{"prompt": "The module", "completion": " returns"}\n' * 32)
    for name in ("recipes", "conf"):
        (directory / name).symlink_to(ROOT / name)
    command = directory / "bin" / "lightning-megatron"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lightning_megatron.cli.main "$@"\n')
    command.chmod(0o755)
    (directory / "bin" / "python").symlink_to(sys.executable)
    return directory


def pretrained(path: Path, tokenizer: Any) -> None:
    """A small model of the architecture that the pages name, without a download."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(**sizes, intermediate_size=64, vocab_size=512, max_position_embeddings=64)
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def shell(block: Block, place: Path) -> None:
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    # A link into a virtual environment is not one, so its packages are named.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(path for path in sys.path if "site-packages" in path)])
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", smaller(block.source)],
        cwd=place, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"line {block.line}\n{result.stdout[-1000:]}{result.stderr[-4000:]}"


def execute(source: str, name: str, directory: str) -> None:
    before = os.getcwd()
    os.chdir(directory)
    try:
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)


def python(block: Block, page: Path, ranks: Any, place: Path) -> None:
    source = PRELUDE + smaller(block.source)
    processes = 4 if "devices=4" in source else 1
    ranks.run(execute, processes, source, f"{page.name}:{block.line}", str(place))


def run(page: Path, ranks: Any, place: Path, *, slow: bool) -> None:
    for block in blocks(page):
        if block.slow != slow:
            continue
        if block.language == "python":
            python(block, page, ranks, place)
        elif block.language == "bash":
            shell(block, place)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.stem != "README" or page.parent.name == "docs"))
        for page in PAGES
    ],
    ids=lambda page: page.stem,
)
def test_blocks_run(ranks: Any, place: Path, page: Path) -> None:
    run(page, ranks, place, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.slow for block in blocks(page))], ids=lambda page: page.stem
)
def test_slow_blocks_run(ranks: Any, place: Path, page: Path) -> None:
    run(page, ranks, place, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_sound(page: Path) -> None:
    text = page.read_text()
    assert text.count("```") == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= {"python", "bash", "text"}
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


# ------------------------------------------------------------------------------------------------------ whole tables


def first_column(page: str) -> set[str]:
    """What is in backquotes in the first column of a page's tables."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_field_of_accelerates_plugin() -> None:
    assert {*TRANSLATED, *UNTRANSLATED} <= first_column("from_accelerate.md")
    text = (ROOT / "docs/from_accelerate.md").read_text()
    for field, reason in UNTRANSLATED.items():
        assert f"| `{field}` | {reason} |" in text


NEMO = [
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "pipeline_model_parallel_comm_backend",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "virtual_pipeline_model_parallel_size",
    "microbatch_group_size_per_vp_stage",
    "context_parallel_size",
    "sequence_parallel",
    "expert_model_parallel_size",
    "moe_extended_tp",
    "expert_tensor_parallel_size",
    "encoder_tensor_model_parallel_size",
    "encoder_pipeline_model_parallel_size",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "data_sampler",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "find_unused_parameters",
    "ckpt_load_optimizer",
    "ckpt_save_optimizer",
    "ckpt_load_main_params",
    "ddp",
    "fsdp",
    "lazy_init",
    "pipeline_dtype",
    "use_te_rng_tracker",
    "use_sharp",
    "save_ckpt_format",
    "ckpt_async_save",
    "ckpt_torch_dist_multiproc",
    "ckpt_assume_constant_structure",
    "ckpt_parallel_save",
    "ckpt_parallel_save_within_dp",
    "ckpt_parallel_load",
    "ckpt_parallel_save_optim",
    "ckpt_load_directly_on_device",
    "ckpt_load_strictness",
    "setup_optimizers",
    "init_model_parallel",
    "replace_progress_bar",
    "progress_interval",
    "restore_config",
    "megatron_log_level",
    "use_tp_pp_dp_mapping",
    "num_distributed_optimizer_instances",
    "nccl_communicator_config_path",
    "pipeline_model_parallel_layout",
    "use_gloo_process_groups",
]


def test_every_parameter_of_nemos_strategy() -> None:
    import inspect

    import lightning_megatron as lm

    assert set(NEMO) <= first_column("from_nemo.md")
    ours = inspect.signature(lm.MegatronStrategy).parameters
    for name in re.findall(
        r"^\| `(\w+)` \| the same(?:, as a string)? \|$", (ROOT / "docs/from_nemo.md").read_text(), re.M
    ):
        assert name in ours, name


def test_places_that_the_megatron_page_names_exist() -> None:
    from lightning_megatron.cli.configuration import compose

    config = compose("pretrain", ["data.data_path=corpus"])
    text = (ROOT / "docs/from_megatron_lm.md").read_text()
    for group in ("parallel", "model", "data", "optim"):
        section = re.search(rf"^## [^\n]*`{group}\.`\n(.*?)(?=^## )", text, re.M | re.S)
        assert section is not None, group
        for right in re.findall(r"^\| .* \| (.*) \|$", section[1], re.M):
            for name in re.findall(r"`([a-z0-9_]+)(?:: [\w.]+)?`", right):
                assert name in config[group] or name in ("alibi", "process_group_backend"), (group, name)
