"""Small models and batches that many tests share."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

import lightning_megatron as lm

VOCAB = 128
SEQUENCE = 16


def tiny_config(**changes: Any) -> lm.GPTConfig:
    """A GPT of four layers without dropout."""
    return lm.GPTConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=32,
        max_position_embeddings=SEQUENCE,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ).replace(**changes)


class Tokens(Dataset):
    """``[sequence]`` tokens and labels, the same for a given index."""

    def __init__(self, length: int = 64) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index % 8)  # repeated, so that it can be learnt
        text = torch.randint(0, VOCAB, (SEQUENCE + 1,), generator=generator)
        return {"tokens": text[:-1], "labels": text[1:], "index": torch.tensor(index)}


class SharedLoader:
    """Batches of ``global_batch_size`` samples in order, of which each replica gets its share.

    Not a ``DataLoader``, so Lightning puts no shuffling sampler into it.
    """

    def __init__(self, module: pl.LightningModule, global_batch_size: int = 8, length: int = 64) -> None:
        self.module = module
        self.global_batch_size = global_batch_size
        self.dataset = Tokens(length)

    def __len__(self) -> int:
        return len(self.dataset) // self.global_batch_size

    def __iter__(self) -> Any:
        strategy = self.module.trainer.strategy
        share = self.global_batch_size // strategy.data_parallel_size
        for step in range(len(self)):
            start = step * self.global_batch_size + strategy.data_parallel_rank * share
            samples = [self.dataset[index] for index in range(start, start + share)]
            yield {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def plain_loader(batch_size: int, length: int = 64, **kwargs: Any) -> DataLoader:
    """An ordinary DataLoader."""
    return DataLoader(Tokens(length), batch_size=batch_size, **kwargs)


def quiet_trainer(strategy: Any, devices: int, **kwargs: Any) -> pl.Trainer:
    """A Trainer on CPU that prints and writes nothing unless asked."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(strategy=strategy, devices=devices, **{**options, **kwargs})


class Record(pl.Callback):
    """Losses and gradient norms of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.samples: list[list[int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        norm = trainer.strategy.megatron_optimizer.grad_norm
        self.norms.append(float(norm) if norm is not None else float("nan"))
