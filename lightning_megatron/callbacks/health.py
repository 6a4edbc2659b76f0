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

    The message says which parameters and which samples: their numbers in the dataset, if batches have an ``index`` as
    those of :mod:`lightning_megatron.data` do, else the number of the batch.
    Overflows of fp16 with dynamic loss scaling are not looked at: its scaler skips them.

    Args:
        policy: ``"raise"`` a :class:`NonFiniteError`, or ``"skip"`` the step with a warning.
        max_skips: skips in a row after which even ``"skip"`` raises.
    """

    reads_gradients = False  # sums over tokens are finite where means are

    def __init__(self, policy: Literal["raise", "skip"] = "raise", max_skips: int = 10) -> None:
        if policy not in ("raise", "skip"):
            raise ValueError(f"policy={policy!r} is neither 'raise' nor 'skip'.")
        self.policy = policy
        self.max_skips = max_skips
        self.skipped = 0
        """Steps skipped so far."""
        self._in_a_row = 0
        # Of the batches whose gradients a step accumulates.
        self._batches: list[tuple[int, Any]] = []
        self._losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember what is in the step."""
        self._batches.append((batch_idx, batch))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Remember the loss, which is the same on all ranks."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Look, when the gradients of the step are complete.

        Raises:
            NonFiniteError: on all ranks.
        """
        batches, self._batches = self._batches, []
        losses, self._losses = self._losses, []
        strategy = trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        if strategy.precision_plugin.policy.params == torch.float16:
            return
        numbers = [*losses, *(buffer.sum() for buffer in strategy.gradient_buffers())]
        flag = (~torch.stack([torch.isfinite(number.float()).reshape(()) for number in numbers]).all()).float()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        message = self._describe(strategy, batches, losses) if flag else None
        if message is None:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self.policy == "raise" or self._in_a_row > self.max_skips:
            raise NonFiniteError(message)
        self.skipped += 1
        rank_zero_warn(message + " The step is skipped.")
        strategy.megatron_optimizer.skip_next = True

    @staticmethod
    def _describe(strategy: MegatronStrategy, batches: list[tuple[int, Any]], losses: list[Tensor]) -> str | None:
        """What is not finite, and of which samples; ``None`` if it was the sum of large numbers alone."""
        stage = strategy.layout.coordinates(strategy.global_rank, strategy.world_size).pipeline
        of_stage = f" of stage {stage}" if strategy.layout.pipeline_model_parallel_size > 1 else ""
        bad = [name + of_stage for name, gradient in strategy.gradients() if not torch.isfinite(gradient).all()]
        samples = [sample for _, batch in batches for sample in _samples(batch)] if strategy.has_data else []
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (bad, samples))
        found = sorted({name for part, _ in everyone for name in part})
        finite_loss = all(bool(torch.isfinite(loss).all()) for loss in losses)
        if finite_loss and not found:
            return None
        ids = sorted({sample for _, part in everyone for sample in part})
        numbers = [number for number, _ in batches]
        where = f"samples {ids}" if ids else f"batch {', '.join(map(str, numbers))}"
        shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        what = ([] if finite_loss else ["The loss"]) + ([f"the gradient of {shown}"] if found else [])
        text = " and ".join(what)
        return f"{text[0].upper()}{text[1:]} {'are' if len(what) > 1 else 'is'} not finite in {where}."

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.skipped = state_dict["skipped"]


def _samples(batch: Any) -> list[int]:
    index = batch.get("index") if isinstance(batch, dict) else None
    return [number for number in index.tolist() if number >= 0] if torch.is_tensor(index) else []
