"""Training runs that checkpoint tests make on each rank: what they return fits through a pipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_megatron as lm
from lightning_megatron.checkpoint.shard_files import ShardFiles
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config


@dataclass(frozen=True)
class Case:
    """A layout, a kind of optimizer and a precision."""

    world: int = 1
    layout: dict[str, Any] = field(default_factory=dict)
    distributed: bool = False
    precision: str = "32-true"
    ddp: dict[str, Any] = field(default_factory=dict)

    seed: int = 7

    def strategy(self) -> lm.MegatronStrategy:
        return lm.MegatronStrategy(
            **self.layout, micro_batch_size=2, use_distributed_optimizer=self.distributed, ddp=self.ddp, seed=self.seed
        )


def make_module(model: dict[str, Any] | None = None, **optimizer: Any) -> lm.GPTModule:
    options = {"lr": 1e-2, "lr_warmup_steps": 2, "lr_decay_steps": 40, **optimizer}
    return lm.GPTModule(tiny_config(**(model or {})), lm.OptimizerConfig(**options))


def make_trainer(case: Case, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {"precision": case.precision, "callbacks": list(callbacks), **kwargs}
    if case.precision == "16-mixed":  # Lightning turns the plain name into bf16 on a CPU
        scaling = lm.LossScaling(initial=2.0**8)
        options |= {"plugins": [lm.MegatronPrecision("16-mixed", scaling)], "precision": None}
    return quiet_trainer(case.strategy(), case.world, **options)


def train(
    case: Case,
    steps: int,
    *,
    save: str | Path | None = None,
    resume: str | Path | None = None,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **fit: Any,
) -> list[float]:
    """Train to ``steps`` in all, optionally from and to a checkpoint; the losses of the steps taken."""
    module, record = make_module(model, **(optimizer or {})), Record()
    trainer = make_trainer(case, record, max_steps=steps)
    trainer.fit(module, SharedLoader(module, length=160), ckpt_path=resume, **fit)
    if save is not None:
        trainer.save_checkpoint(save)
    return record.losses


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Every global tensor of a checkpoint, without random states and padding of the vocabulary."""
    files = ShardFiles.open(Path(path))
    found = {}
    for key, shape in files.shapes.items():
        if not key.startswith("rng."):
            box = whole(shape)
            found[key] = torch.full(shape, float("nan"), dtype=files.dtypes[key])
            assert files.read(key, box, found[key]) == box.numel, f"{key} is not stored exactly once"
    return found


def whole(shape: tuple[int, ...]) -> Any:
    from lightning_megatron.backends.shards import Box

    return Box((0,) * len(shape), tuple(shape))


def digest(path: str | Path) -> str:
    """A checksum of all tensors of a checkpoint."""
    total = hashlib.sha256()
    for key, value in sorted(tensors(path).items()):
        total.update(key.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
