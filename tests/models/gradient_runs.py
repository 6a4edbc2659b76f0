"""Gradients of the first optimizer step of a fit, and the same by plain autograd in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

import lightning_megatron as lm
from tests.helpers import Record, quiet_trainer
from tests.models.runs import Batch, strategy


class Parts:
    """A global batch of each optimizer step in ``parts`` of every replica, for ``accumulate_grad_batches=parts``."""

    def __init__(self, module: lm.MegatronModule, batch: Batch, parts: int, steps: int = 1) -> None:
        self.module, self.batch, self.parts, self.steps = module, batch, parts, steps

    def __len__(self) -> int:
        return self.parts * self.steps

    def __iter__(self) -> Any:
        strategy = self.module.trainer.strategy
        pieces = strategy.data_parallel_size * self.parts
        size = next(iter(self.batch.values())).size(0) // pieces
        for _ in range(self.steps):
            for part in range(self.parts):
                start = (part * strategy.data_parallel_size + strategy.data_parallel_rank) * size
                yield {key: value[start : start + size] for key, value in self.batch.items()}


class Unsized(torch.utils.data.IterableDataset):
    """The same as a stream of unknown length."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def __iter__(self) -> Any:
        return iter(self.parts)


class Reference(pl.Callback):
    """Loss and gradient norm by plain autograd, before the first step, of a model in one process.

    Args:
        loss: from the module and what it makes of the batch, with gradient.
    """

    def __init__(self, loss: Callable[[Any, Batch], torch.Tensor], batch: Batch) -> None:
        self._loss, self._batch = loss, batch
        self.result: tuple[float, float] = (0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.eval()  # routers then attach no losses of their own
        loss = self._loss(pl_module, pl_module.prepare_batch(self._batch))
        weights = [p for p in pl_module.chunks.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        pl_module.train()
        self.result = float(loss), float(norm)


def reference(make: Callable[[], Any], batch: Batch, loss: Callable[[Any, Batch], torch.Tensor]) -> tuple[float, float]:
    """Loss and gradient norm by plain autograd; runs on one rank."""
    module, plain = make(), Reference(loss, batch)
    trainer = quiet_trainer(strategy(), 1, max_steps=1, callbacks=[plain])
    trainer.fit(module, Parts(module, batch, 1))
    return plain.result


def first_step(
    make: Callable[[], Any], batch: Batch, layout: dict[str, Any], parts: int = 1, **options: Any
) -> tuple[list[float], float]:
    """Losses of the batches of the first optimizer step, and its gradient norm; runs on every rank."""
    module, record = make(), Record()
    trainer = quiet_trainer(
        strategy(**layout),
        int(os.environ["WORLD_SIZE"]),
        max_steps=1,
        accumulate_grad_batches=parts,
        callbacks=[record],
        **options,
    )
    loader: Any = Parts(module, batch, parts, steps=2)
    trainer.fit(module, loader)
    return record.losses, record.norms[-1]


def token_losses(module: Any, batch: Batch) -> torch.Tensor:
    """Losses of each token of a GPT ``[batch, sequence]``."""
    return module.forward_step(module.chunks[0], dict(batch)).float()


def router_losses(module: Any, batch: Batch, micro_batch_size: int) -> torch.Tensor:
    """Main loss of a GPT with experts plus its routers' losses, each times its coefficient, over micro-batches."""
    config, samples = module.config, batch["tokens"].size(0)
    routers = [m for m in module.modules() if type(m).__name__ == "TopKRouter"]
    inputs: list[torch.Tensor] = []
    handles = [router.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for router in routers]
    total: Any = 0.0
    for start in range(0, samples, micro_batch_size):
        inputs.clear()
        part = {key: value[start : start + micro_batch_size] for key, value in batch.items()}
        losses = token_losses(module, part)
        total = total + (losses * part["loss_mask"]).sum() / batch["loss_mask"].sum().clamp(min=1e-9)
        for router, hidden in zip(routers, inputs, strict=True):
            logits = F.linear(hidden.flatten(0, 1), router.weight)
            scores = logits.softmax(dim=-1)
            chosen = F.one_hot(logits.topk(config.moe_router_topk).indices, config.num_moe_experts).sum(dim=1).float()
            balance = config.num_moe_experts * (scores.mean(0) * chosen.mean(0)).sum() / config.moe_router_topk
            z_loss = logits.logsumexp(dim=-1).square().mean()
            share = part["tokens"].size(0) / samples
            total = total + share * (config.moe_aux_loss_coeff * balance + config.moe_z_loss_coeff * z_loss)
    for handle in handles:
        handle.remove()
    return total
