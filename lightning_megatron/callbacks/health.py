"""Notices steps that would ruin a model."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_megatron.strategy import MegatronStrategy

_SHOWN = 10


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite."""


class NonFinite(pl.Callback):
    """Looks for NaN and infinity in the loss and the gradients before each optimizer step; all ranks agree.

    The message says which parameters and which samples (a batch's ``index``, if it has one; else the batch's number).
    Overflows of fp16 with dynamic loss scaling are not looked at: its scaler skips them.

    Args:
        policy: ``"raise"`` a :class:`NonFiniteError`, or ``"skip"`` the step with a warning.
        max_skips: skips in a row after which even ``"skip"`` raises.
    """

    def __init__(self, policy: Literal["raise", "skip"] = "raise", max_skips: int = 10) -> None:
        if policy not in ("raise", "skip"):
            raise ValueError(f"policy={policy!r} is neither 'raise' nor 'skip'.")
        self.policy = policy
        self.max_skips = max_skips
        self.skipped = 0
        """Steps skipped so far."""
        self._in_a_row = 0
        self._batch: Any = None
        self._batch_idx = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember what is in the step."""
        self._batch, self._batch_idx = batch, batch_idx

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Look, when the gradients of the step are complete.

        Raises:
            NonFiniteError: on all ranks.
        """
        strategy = trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        if strategy.precision_plugin.policy.params == torch.float16:
            return
        gradients = list(strategy.gradients())
        bad = ~torch.stack([torch.isfinite(buffer.sum()) for buffer in strategy.gradient_buffers()]).all()
        flag = bad.float()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag:
            self._in_a_row = 0
            return
        message = self._describe(gradients)
        self._in_a_row += 1
        if self.policy == "raise" or self._in_a_row > self.max_skips:
            raise NonFiniteError(message)
        self.skipped += 1
        rank_zero_warn(message + " The step is skipped.")
        strategy.megatron_optimizer.skip_next = True

    def _describe(self, gradients: list[tuple[str, Tensor]]) -> str:
        names = [name for name, gradient in gradients if not torch.isfinite(gradient).all()]
        index = self._batch.get("index") if isinstance(self._batch, dict) else None
        samples = index.tolist() if torch.is_tensor(index) and index.device.type != "meta" else None
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (names, samples))
        found = sorted({name for part, _ in everyone for name in part})
        ids = sorted({sample for _, part in everyone for sample in part or ()})
        where = f"samples {ids}" if ids else f"batch {self._batch_idx}"
        shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        return f"The gradient is not finite in {where}, for: {shown}."

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.skipped = state_dict["skipped"]
