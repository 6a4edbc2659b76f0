"""The fused kernels on a GPU: values, CUDA graphs, and the loss curve in bf16 against the unfused one in fp32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.models.fused import graph
from tests.helpers import quiet_trainer

ROOT = Path(__file__).parents[2]
SEQUENCE, VOCAB, BATCH = 128, 500, 8
LEARNING_RATE = 3e-4
"""At 1e-3 the loss is so unsteady that unfused bf16 leaves unfused fp32 by 4.5% (here: by 0.05%), fused or not."""


@pytest.mark.parametrize("script", ["tests/models/check_kernels.py", "tests/backends/check_adam.py"])
def test_kernels_equal_plain_torch(script):
    environment = {**os.environ, "KERNEL_DEVICE": "cuda", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Batches:
    """Text with something to learn: each token is the one before plus a step that a sample keeps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Any:
        for step in range(self.steps):
            generator = torch.Generator().manual_seed(step)
            start, stride = torch.randint(1, VOCAB, (2, BATCH, 1), generator=generator)
            text = (start + stride % 7 * torch.arange(SEQUENCE + 1)) % VOCAB
            yield self.batch(text, generator)

    def batch(self, text: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """For a GPT."""
        return {"tokens": text[:, :-1], "labels": text[:, 1:]}


class Masked(Batches):
    def batch(self, text: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """For a BERT, some of whose samples are padded. Few words occur, which it learns quickly."""
        text = text[:, :-1] % 50
        masked = torch.rand(text.shape, generator=generator) < 0.15
        attention = torch.ones_like(text)
        attention[1::2, 100:] = 0
        labels = text.masked_fill(~masked | (attention == 0), -100)
        return {"input_ids": text.masked_fill(masked, 0), "labels": labels, "attention_mask": attention}


class Continued(Batches):
    def batch(self, text: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """For a T5: the first part of a text, and what comes after."""
        return {"input_ids": text[:, :80], "labels": text[:, 80:].contiguous()}


class Record(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.captured = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"])

    def on_train_end(self, trainer: Any, module: Any) -> None:
        layers = [m for m in module.modules() if getattr(m, "_graph", None) is not None]
        self.captured = sum(layer._graph.captured > 0 for layer in layers)


KINDS: dict[type, tuple[type, type]] = {
    lm.GPTConfig: (lm.GPTModule, Batches),
    lm.BertConfig: (lm.BertModule, Masked),
    lm.T5Config: (lm.T5Module, Continued),
}


def train(config: Any, precision: str, fused: bool, steps: int, micro_batch: int = BATCH) -> Record:
    build, batches = KINDS[type(config)]
    module = build(config, lm.OptimizerConfig(lr=LEARNING_RATE, lr_decay_style="constant"))
    module.fused = fused
    record = Record()
    trainer = quiet_trainer(
        lm.MegatronStrategy(micro_batch_size=micro_batch, seed=7),
        1,
        accelerator="gpu",
        precision=precision,
        max_steps=steps,
        callbacks=[record],
    )
    trainer.fit(module, batches(steps))
    return record


def config(name: str, **changes: Any) -> Any:
    sizes = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": VOCAB}
    sizes |= {"max_position_embeddings": SEQUENCE, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    if name == "bert":
        return lm.BertConfig(**sizes, add_binary_head=False).replace(**changes)
    if name == "t5":
        return lm.T5Config(**sizes, ffn_hidden_size=512).replace(**changes)
    if name == "alibi":
        changes["position_embedding_type"] = "alibi"
    if name == "experts":  # run by megatron-core's own layers
        changes |= {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.01}
    if name in ("llama", "experts"):
        return lm.GPTConfig.llama(**sizes, num_query_groups=2, ffn_hidden_size=512).replace(**changes)
    return lm.GPTConfig(**sizes).replace(**changes)


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi", "bert", "t5", "experts"])
def test_loss_curve_in_bf16_follows_unfused_fp32(name):
    expected = train(config(name), "32-true", fused=False, steps=60)
    actual = train(config(name), "bf16-mixed", fused=True, steps=60)
    assert actual.captured == {"bert": 0, "t5": 8, "experts": 0}.get(name, 4)  # BERT's batches are padded
    assert expected.captured == 0
    a, e = (torch.stack(record.losses).float().cpu() for record in (actual, expected))
    assert e[-1] < 0.95 * e[0]
    print(f"{name}: fp32 {e[0]:.4f} to {e[-1]:.4f}, bf16 {a[-1]:.4f}, worst step {float((a / e - 1).abs().max()):.3%}")
    torch.testing.assert_close(a, e, rtol=0.01, atol=0.0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {}),
        ("t5", {}),
        ("gpt2", {"attention_dropout": 0.1}),
        ("gpt2", {"attention_dropout": 0.1, "recompute_granularity": "selective"}),
        ("gpt2", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    ],
)
def test_graphs_change_nothing(name, changes, monkeypatch):
    """The same kernels in the same order, also for micro-batches of one step, which share the graphs."""
    model = config(name, hidden_dropout=0.1).replace(**changes)
    with_graphs = train(model, "bf16-mixed", fused=True, steps=8, micro_batch=BATCH // 2)
    monkeypatch.setattr(graph, "WARM_UP", 10**9)
    without = train(model, "bf16-mixed", fused=True, steps=8, micro_batch=BATCH // 2)
    assert (with_graphs.captured, without.captured) == (8 if name == "t5" else 4, 0)
    a, e = (torch.stack(record.losses).float().cpu() for record in (with_graphs, without))
    torch.testing.assert_close(a, e, rtol=2e-3, atol=2e-3)
