"""FP8 layers on a GPU: values of the kernels, CUDA graphs, and the loss curve on the demo's corpus beside bf16's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.data import PretrainingData
from lightning_megatron.models.fused import graph
from tests.gpu.test_fused import BATCH, ROOT, Batches, Record, config
from tests.helpers import quiet_trainer

STEPS = 200
SEQUENCE, VOCABULARY = 128, 4096
"""Of recipes/demo.py."""
LEARNING_RATE = 1e-3
"""Half of the demo's, at which the GPT-2 is so unsteady that bf16 leaves fp32 by 0.8%."""

WITHOUT_WEIGHT_GRADIENTS = lm.Float8(weight_gradients=False)


@pytest.fixture(autouse=True)
def _capable() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")


def test_kernels_equal_plain_torch() -> None:
    environment = {**os.environ, "KERNEL_DEVICE": "cuda", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "tests/models/check_float8.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def fit(
    module: lm.GPTModule, data: Any, fp8: bool | lm.Float8, steps: int, micro_batch: int | None = None
) -> tuple[torch.Tensor, int]:
    """Losses of each step, and how many layers ran as CUDA graphs."""
    record = Record()
    trainer = quiet_trainer(
        lm.MegatronStrategy(micro_batch_size=micro_batch, seed=7),
        1,
        accelerator="auto",
        plugins=[lm.MegatronPrecision("bf16-mixed", fp8=fp8)],
        max_steps=steps,
        callbacks=[record],
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    return torch.stack(record.losses).float().cpu(), record.captured


def gpt(changes: dict[str, Any], lr: float = 3e-4) -> lm.GPTModule:
    return lm.GPTModule(config("llama", **changes), lm.OptimizerConfig(lr=lr, lr_decay_style="constant"))


@pytest.mark.parametrize("micro_batch", [BATCH, BATCH // 4])
@pytest.mark.parametrize("options", [lm.Float8(), WITHOUT_WEIGHT_GRADIENTS])
def test_graphs_change_nothing(monkeypatch: pytest.MonkeyPatch, options: lm.Float8, micro_batch: int) -> None:
    """Also where the micro-batches of a step share a graph, which adds to the gradients of all but the first."""
    actual, captured = fit(gpt({}), Batches(12), options, 12, micro_batch)
    monkeypatch.setattr(graph, "WARM_UP", 10**9)
    expected, not_captured = fit(gpt({}), Batches(12), options, 12, micro_batch)
    assert (captured, not_captured) == (4, 0)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


def test_biases_and_dropout() -> None:
    """What a Llama has not."""
    losses = []
    for fp8 in (False, True):
        module = lm.GPTModule(
            config("gpt2", hidden_dropout=0.1), lm.OptimizerConfig(lr=3e-4, lr_decay_style="constant")
        )
        losses.append(fit(module, Batches(40), fp8, 40)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.0)


# ---------------------------------------------------------------------------------------------------- demo's corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the demo's corpus and tokenizer."""
    for name in ("tokenizers", "transformers", "rich"):
        pytest.importorskip(name)
    from recipes.demo import prepare

    directory = tmp_path_factory.mktemp("demo")
    prepare(directory)
    return directory


def demo_losses(directory: Path, model: lm.GPTConfig, fp8: bool | lm.Float8) -> torch.Tensor:
    """Of ``STEPS`` steps on the demo's data."""
    data = PretrainingData(
        str(directory / "corpus"),
        seq_length=SEQUENCE,
        global_batch_size=16,
        tokenizer=str(directory / "tokenizer"),
        split="950,50,0",
        num_workers=0,
    )
    optimizer = lm.OptimizerConfig(
        lr=LEARNING_RATE, min_lr=LEARNING_RATE / 10, lr_warmup_steps=STEPS // 20, lr_decay_steps=STEPS
    )
    module = lm.GPTModule(model, optimizer)
    module.fused = True
    return fit(module, data, fp8, STEPS)[0]


def demo_model(name: str) -> lm.GPTConfig:
    sizes = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    sizes |= {"max_position_embeddings": SEQUENCE, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    if name == "llama":
        return lm.GPTConfig.llama(**sizes, num_query_groups=2, ffn_hidden_size=512)
    return lm.GPTConfig(**sizes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", lm.Float8()),
        ("llama", lm.Float8()),
        ("llama", lm.Float8(fast_accumulation="all")),
        ("gpt2", WITHOUT_WEIGHT_GRADIENTS),
        ("llama", WITHOUT_WEIGHT_GRADIENTS),
    ],
)
def test_loss_curve_on_the_demos_corpus_is_within_a_percent_of_bf16(
    corpus: Path, name: str, options: lm.Float8
) -> None:
    expected = demo_losses(corpus, demo_model(name), fp8=False)
    actual = demo_losses(corpus, demo_model(name), fp8=options)
    last = slice(STEPS - 20, STEPS)
    difference = float((actual[last].mean() / expected[last].mean() - 1).abs())
    worst = float((actual / expected - 1).abs().max())
    print(f"{name}: bf16 {expected[last].mean():.4f}, fp8 {actual[last].mean():.4f}, worst step {worst:.3%}")
    assert expected[last].mean() < 0.75 * expected[0]
    assert difference < 0.01
    assert worst < 0.02
