"""One layout of the self-test: a few steps of a tiny GPT, in the processes that are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, override

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_megatron.models.config import GPTConfig
from lightning_megatron.models.gpt_module import GPTModule
from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.strategy import MegatronStrategy

STEPS = 3
_BATCH, _SEQUENCE, _VOCABULARY = 8, 32, 128


class _Losses(pl.Callback):
    """What each step's loss was."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


class _Batches:
    """The same batch in every step, of which each replica gets its share."""

    def __init__(self, module: GPTModule) -> None:
        self._module = module

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        strategy = self._module.strategy
        share = _BATCH // strategy.data_parallel_size
        first = strategy.data_parallel_rank * share
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(0, _VOCABULARY, (_BATCH, _SEQUENCE + 1), generator=generator)
        for _ in range(STEPS):
            yield {"tokens": text[first : first + share, :-1], "labels": text[first : first + share, 1:]}


def train(layout: str, devices: int, accelerator: str) -> tuple[float, ...]:
    """The losses of a few steps at ``layout``; bf16 on a GPU, fp32 on a CPU."""
    config = GPTConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=_VOCABULARY,
        make_vocab_size_divisible_by=32,  # the same padding, and so the same initial weights, at any layout
        max_position_embeddings=_SEQUENCE,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    module = GPTModule(config, OptimizerConfig(lr=1e-2, lr_decay_style="constant"))
    seen = _Losses()
    on_cpu = accelerator == "cpu"
    trainer = pl.Trainer(
        strategy=MegatronStrategy(layout, micro_batch_size=2, use_distributed_optimizer=True),
        accelerator="cpu" if on_cpu else "gpu",
        devices=devices,
        precision="32-true" if on_cpu else "bf16-mixed",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[seen],
    )
    trainer.fit(module, _Batches(module))
    return tuple(seen.losses)
