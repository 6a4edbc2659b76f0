"""The whole way on a laptop: real text, a tokenizer, an indexed dataset, training at TP=2 x PP=2 with sequence
parallelism and the distributed optimizer, the checkpoint in another layout, generated text, a plot and a summary.

python recipes/demo.py [--steps 240] [--run-dir demo_run]
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RECIPES = Path(__file__).parent
SEQUENCE = 128
VOCABULARY = 4096
SPLIT = "950,50,0"


@dataclass(frozen=True)
class Layouts:
    """What to train and to resume with on this machine."""

    devices: int
    train: tuple[str, ...]
    resume: tuple[str, ...]


def layouts() -> Layouts:
    """Four processes at TP=2 x PP=2 and then PP=2 x DP=2; fewer on a machine with one, two or three GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    pipeline = "parallel.micro_batch_size=4"
    if gpus == 0 or gpus >= 4:
        return Layouts(4, ("parallel=tp2_pp2", pipeline), ("parallel=pp2", pipeline))
    if gpus >= 2:
        return Layouts(2, ("parallel=tp2",), ("parallel=pp2", pipeline))
    return Layouts(1, ("parallel=single",), ("parallel=single", "parallel.use_distributed_optimizer=false"))


def prepare(directory: Path) -> tuple[Path, Path, float]:
    """Corpus, tokenizer and dataset: the dataset's prefix, the tokenizer's directory, the unigram perplexity."""
    from lightning_megatron.data import (
        IndexedDataset,
        IndexedDatasetWriter,
        load_tokenizer,
        train_byte_level_bpe,
        unigram_perplexity,
    )
    from lightning_megatron.data.blend import split_bounds
    from lightning_megatron.data.corpus import python_documentation
    from lightning_megatron.data.indexed import token_dtype

    documents = list(python_documentation())
    size = sum(len(document.encode()) for document in documents)
    tokenizer_dir = train_byte_level_bpe(documents, VOCABULARY, directory / "tokenizer")
    tokenizer = load_tokenizer(tokenizer_dir)
    prefix = directory / "corpus"
    with IndexedDatasetWriter(prefix, token_dtype(len(tokenizer))) as writer:
        for tokens in tokenizer(documents)["input_ids"]:
            writer.add_document([*tokens, tokenizer.eos_token_id])
    dataset = IndexedDataset(prefix)
    bounds = split_bounds(SPLIT, len(documents))
    train, valid = (np.concatenate([dataset[index] for index in bounds[name]]) for name in ("train", "valid"))
    counts = np.bincount(train, minlength=len(tokenizer))
    baseline = unigram_perplexity(counts, valid)
    say(
        f"corpus: {len(documents):,} documents, {size / 1e6:.1f} MB of text, {len(train) + len(valid):,} tokens of a "
        f"vocabulary of {len(tokenizer):,}; a unigram model has a validation perplexity of {baseline:.1f}"
    )
    return prefix, tokenizer_dir, baseline


def pretrain(directory: Path, devices: int, *overrides: str) -> None:
    """Run `recipes/pretrain.py` in processes of its own, as from the shell."""
    command = [
        *(sys.executable, str(RECIPES / "pretrain.py"), f"trainer.devices={devices}"),
        *(f"data.data_path={directory / 'corpus'}", f"data.tokenizer={directory / 'tokenizer'}"),
        *(f"data.split='{SPLIT}'", "data.global_batch_size=16", *overrides),
    ]
    say("$ " + " ".join([Path(command[0]).name, *command[1:]]))
    result = subprocess.run(
        command, check=False, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    )
    if result.returncode:
        sys.exit(f"error: pretraining ended with exit code {result.returncode}; what it printed is above.")


def logged(run: Path, column: str) -> list[tuple[int, float]]:
    """Step and value of a logged column, from the newest CSV log of a run."""
    newest = max((run / "csv").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with newest.open() as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def plot(train: Sequence[tuple[int, float]], valid: Sequence[tuple[int, float]], baseline: float, file: Path) -> None:
    """Loss curves, beside the loss of the unigram model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*train, strict=True), label="training", linewidth=1)
    axes.plot(*zip(*valid, strict=True), "o-", label="validation")
    axes.axhline(math.log(baseline), color="grey", linestyle="--", label="unigram model")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="GPT on Python's documentation")
    axes.legend()
    figure.savefig(file, dpi=120)


def say(text: str) -> None:
    """One line of the demo's own."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print("demo", style="bold green", end=" ")
    console.print(text, markup=False)


def main() -> None:
    """Run the demo."""
    from lightning_megatron.reporting.page import render
    from lightning_megatron.reporting.run import read_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps to train (default: 240)")
    parser.add_argument("--run-dir", type=Path, default=Path("demo_run"), help="where everything goes")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps={arguments.steps}, but must be at least 1")
    started = time.monotonic()
    directory: Path = arguments.run_dir
    if (directory / "train" / "checkpoints").is_dir():
        parser.error(f"--run-dir={directory} holds an earlier demo; give another directory, or remove it")
    directory.mkdir(parents=True, exist_ok=True)
    _, _, baseline = prepare(directory)
    layout = layouts()
    run = directory / "train"
    pretrain(
        directory,
        layout.devices,
        *layout.train,
        f"run_dir={run}",
        f"trainer.max_steps={arguments.steps}",
        f"trainer.val_check_interval={max(1, arguments.steps // 4)}",
        f"trainer.log_every_n_steps={max(1, min(10, arguments.steps // 4))}",
        *("optim.lr=2e-3", "optim.min_lr=2e-4", f"optim.lr_warmup_steps={arguments.steps // 20}"),
        *("callbacks=sample", 'callbacks.sample.prompts=["Return a new","The following"]'),
        *(
            "+callbacks.sample.do_sample=true",
            "+callbacks.sample.top_k=20",
            "+callbacks.sample.temperature=0.8",
            "+callbacks.sample.repetition_penalty=1.2",
        ),
        *("model.hidden_dropout=0.0", "model.attention_dropout=0.0", "trainer.num_sanity_val_steps=1"),
    )
    resumed = directory / "resumed"
    pretrain(directory, layout.devices, *layout.resume, f"run_dir={resumed}", "task=validate",
             f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}")  # fmt: skip
    valid = logged(run, "val_loss")
    before, after = valid[-1][1], logged(resumed, "val_loss")[-1][1]
    plot(logged(run, "train_loss"), valid, baseline, directory / "loss.png")
    speed = logged(run, "tokens_per_s")[-1][1]
    summary = {
        "steps": arguments.steps,
        "layout": layout.train[0],
        "resumed_layout": layout.resume[0],
        "validation_loss": before,
        "validation_loss_resumed": after,
        "difference": abs(before - after),
        "validation_perplexity": math.exp(before),
        "unigram_perplexity": baseline,
        "tokens_per_s": speed,
        "seconds": round(time.monotonic() - started, 1),
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    say(f"validation loss {before:.6f} as trained ({layout.train[0]}), {after:.6f} resumed ({layout.resume[0]}): "
        f"difference {abs(before - after):.1e}")  # fmt: skip
    say(f"validation perplexity {math.exp(before):.1f}; unigram model {baseline:.1f}; {speed:,.0f} tokens/s")
    (directory / "report.html").write_text(render(read_run(run)), encoding="utf-8")
    say(f"the run on one page: {directory / 'report.html'}")
    say(f"loss curve: {directory / 'loss.png'}; summary: {directory / 'summary.json'}; {summary['seconds']} s in all")
    if abs(before - after) >= 1e-4:
        raise SystemExit(f"The resumed checkpoint validates differently: {before} and {after}.")


if __name__ == "__main__":
    main()
