"""Short fits of small models on any layout, and what tests compare of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

import lightning_megatron as lm
from lightning_megatron.models.language_module import LanguageModelModule
from tests.helpers import Record, quiet_trainer

Batch = dict[str, torch.Tensor]
LAYOUT_KEYS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "sp": "sequence_parallel",
    "mbs": "micro_batch_size",
}


class Shared:
    """The same global batch each step, of which each replica gets its share."""

    def __init__(self, module: lm.MegatronModule, batch: Batch, steps: int) -> None:
        self.module, self.batch, self.steps = module, batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Any:
        strategy = self.module.trainer.strategy
        size = next(iter(self.batch.values())).size(0) // strategy.data_parallel_size
        start = strategy.data_parallel_rank * size
        for _ in range(self.steps):
            yield {key: value[start : start + size] for key, value in self.batch.items()}


def strategy(**layout: Any) -> lm.MegatronStrategy:
    """A strategy from short names of sizes."""
    return lm.MegatronStrategy(**{LAYOUT_KEYS.get(key, key): value for key, value in layout.items()})


def fit(make: Callable[[], lm.MegatronModule], batch: Batch, layout: dict[str, Any], steps: int = 3) -> list[Any]:
    """Losses, gradient norms and logged metrics of a fit; runs on every rank."""
    module, record = make(), Record()
    trainer = quiet_trainer(
        strategy(**layout), int(os.environ["WORLD_SIZE"]), max_steps=steps, max_epochs=1, callbacks=[record]
    )
    trainer.fit(module, Shared(module, batch, steps))
    return [record.losses, record.norms, {k: float(v) for k, v in trainer.logged_metrics.items()}]


def evaluate(make: Callable[[], LanguageModelModule], batch: Batch, layout: dict[str, Any]) -> Any:
    """What ``predict`` returns for one batch; runs on every rank."""
    module = make()
    module.return_logits = module.return_logits or True
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]))
    return trainer.predict(module, Shared(module, batch, 1))[0]


def assert_same(run: list[Any], reference: list[Any], tolerance: float = 1e-5) -> None:
    """Losses within ``tolerance``, gradient norms within ten times that, relative."""
    assert max(abs(a - b) for a, b in zip(run[0], reference[0], strict=True)) < tolerance, (run[0], reference[0])
    for ours, theirs in zip(run[1], reference[1], strict=True):
        assert abs(ours - theirs) < 10 * tolerance * max(1.0, theirs), (run[1], reference[1])
