"""Weight decay, against ``torch.optim.AdamW`` with a group of matrices and a group of biases and norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_megatron as lm
from tests.checkpoint.runs import Case, make_trainer
from tests.helpers import SharedLoader, tiny_config

DECAY = 0.5
"""So large that decaying a vector shows at once."""


class Plain(lm.GPTModule):
    """Without a scheduler, or with one of torch's."""

    def __init__(self, scheduler: bool, kind: str = "adam", lora: lm.LoRAConfig | None = None) -> None:
        options = lm.OptimizerConfig(optimizer=kind, lr=1e-2, weight_decay=DECAY, clip_grad=0.0)
        super().__init__(tiny_config(num_layers=2), options)
        self.lora, self.scheduled = lora, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.strategy.build_optimizer(self.optimizer_config)
        if not self.scheduled:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]


class Beside(pl.Callback):
    """Steps copies of the weights by torch's optimizer, with the gradients of the fit."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.copies: dict[str, torch.Tensor] = {}
        self.worst = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trained = {n: p for n, p in pl_module.chunks[0].named_parameters() if p.requires_grad}
        self.copies = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
        groups = [
            {"params": [c for c in self.copies.values() if c.dim() > 1], "weight_decay": DECAY},
            {"params": [c for c in self.copies.values() if c.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer: torch.optim.Optimizer
        if self.kind == "adam":
            self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
        else:
            self.optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, gradient in trainer.strategy.gradients():
            self.copies[name].grad = gradient.detach().clone()
        for group in self.optimizer.param_groups:
            group["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.optimizer.step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        now = dict(pl_module.chunks[0].named_parameters())
        self.worst = max(self.worst, *(float((now[name] - copy).abs().max()) for name, copy in self.copies.items()))


def against_torch(kinds: list[tuple[bool, str, bool]]) -> list[float]:
    """The largest difference of any weight in each of the runs."""
    found = []
    for scheduler, kind, adapters in kinds:
        module = Plain(scheduler, kind, lm.LoRAConfig(rank=2) if adapters else None)
        beside = Beside(kind)
        trainer = make_trainer(Case(), beside, max_steps=4)
        trainer.fit(module, SharedLoader(module))
        found.append(beside.worst)
    return found


RUNS = [(False, "adam", False), (True, "adam", True), (True, "sgd", False)]


def test_vectors_do_not_decay_whatever_the_scheduler(ranks: Any) -> None:
    (found,) = ranks.run(against_torch, 1, RUNS)
    assert max(found) < 1e-6, dict(zip(RUNS, found, strict=True))


def decays(case: Case, path: Path, resume: Path | None) -> list[tuple[float, float]]:
    """``(wd_mult, weight_decay)`` of the groups at the last step."""
    module = Plain(scheduler=True)
    trainer = make_trainer(case, max_steps=2 if resume is None else 4)
    trainer.fit(module, SharedLoader(module), ckpt_path=resume)
    trainer.save_checkpoint(path)
    return [(group["wd_mult"], group["weight_decay"]) for group in trainer.optimizers[0].param_groups]


def decays_over_resumes(directory: Path) -> list[Any]:
    cases = [
        Case(2),
        Case(2, {"tensor_model_parallel_size": 2}, precision="bf16-mixed"),
        Case(2, distributed=True, precision="bf16-mixed"),
        Case(2, {"pipeline_model_parallel_size": 2}),
    ]
    paths = [directory / str(index) for index in range(len(cases))]
    before = [None, *paths]
    return [decays(case, path, resume) for case, path, resume in zip(cases, paths, before, strict=False)]


def test_groups_hold_their_decay_in_any_layout(ranks: Any, tmp_path: Path) -> None:
    for found in ranks.run(decays_over_resumes, 2, tmp_path):
        assert found == [[(1.0, DECAY), (0.0, 0.0)]] * 4


def sgd_over_a_resume(directory: Path) -> dict[str, list[float]]:
    """Largest differences from one run without the distributed optimizer, of runs that stop and change it."""
    layouts = {"plain": Case(2), "distributed": Case(2, distributed=True)}
    ends = {}
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        for first, second in (("plain", "plain"), ("distributed", "distributed"), ("distributed", "plain")):
            path = directory / f"{precision}-{first}-{second}"
            for name, resume, steps in ((first, None, 2), (second, path, 4)):
                case = Case(2, distributed=layouts[name].distributed, precision=precision)
                module = Plain(scheduler=False, kind="sgd")
                trainer = make_trainer(case, max_steps=steps)
                trainer.fit(module, SharedLoader(module), ckpt_path=resume)
                trainer.save_checkpoint(path)
            ends[precision, first, second] = [p.detach().float().clone() for p in module.parameters()]
    return {
        precision: [
            max(float((a - b).abs().max()) for a, b in zip(ends[precision, "plain", "plain"], end, strict=True))
            for (of, *_), end in ends.items()
            if of == precision
        ]
        for precision in ("32-true", "bf16-mixed", "16-mixed")
    }


@pytest.mark.slow
def test_sgd_with_the_distributed_optimizer(ranks: Any, tmp_path: Path) -> None:
    for found in ranks.run(sgd_over_a_resume, 2, tmp_path, timeout=600.0):
        assert max(found["32-true"]) < 1e-6
        assert max(found["bf16-mixed"]) <= 2**-9  # one rounding of a weight near one
        assert max(found["16-mixed"]) <= 2**-11
