"""Throughput of training: tokens per second, TFLOP/s, MFU, and where the time of a step goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_megatron.callbacks.clock import Moment, now
from lightning_megatron.models.config import TransformerModelConfig
from lightning_megatron.planner.hardware import accelerator_of_device
from lightning_megatron.planner.step_flops import batch_flops


@dataclass(frozen=True, slots=True)
class _Step:
    """Moments of one batch, and what it held."""

    before: Moment | None
    """End of the batch before, unless validation or a checkpoint came between."""
    start: Moment
    computed: Moment
    end: Moment
    tokens: int
    flops: float


@dataclass(frozen=True, slots=True)
class _Times:
    data: float
    schedule: float
    optimizer: float
    tokens: int
    flops: float

    @property
    def total(self) -> float:
        return self.data + self.schedule + self.optimizer


class Throughput(Callback):
    """Logs, averaged over the last ``window`` batches and for all ranks together:

    =====================  =============================================================================
    ``tokens_per_s``       tokens of all replicas; of a T5, those of encoder and decoder
    ``tflops_per_device``  model TFLOP/s of each device, without what recomputation repeats
    ``mfu``                that as a fraction of the device's peak (arXiv:2204.02311), where it is known
    ``step_time``          seconds of a batch, the sum of the next three
    ``data_time``          until the next batch is there: reading, moving, logging, other callbacks
    ``schedule_time``      forward and backward of all micro-batches, and the reduction of gradients
    ``optimizer_time``     clipping, update and gathering of weights; 0 while gradients accumulate
    =====================  =============================================================================

    Time of validation and of writing checkpoints does not count. On a GPU all times are the device's own, which the
    host never waits for; they arrive a step or two late.

    Args:
        window: batches to average over.
        peak_flops: FLOP/s of one device, for the MFU of devices that are not in ``planner.ACCELERATORS``, such as CPUs.
    """

    reads_gradients = False

    def __init__(self, window: int = 20, peak_flops: float | None = None) -> None:
        self._pending: deque[_Step] = deque()
        self._times: deque[_Times] = deque(maxlen=window)
        self._peak = peak_flops
        self._start: Moment | None = None
        self._computed: Moment | None = None
        self._end: Moment | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pending.clear()
        self._times.clear()
        self._end = None
        if self._peak is None:
            precision = str(getattr(trainer.strategy.precision_plugin, "precision", ""))
            self._peak = peak_flops(trainer.strategy.root_device, precision)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self._start, self._computed = now(trainer.strategy.root_device), None

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._computed = now(trainer.strategy.root_device)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        end = now(trainer.strategy.root_device)
        samples, lengths = sizes(batch)
        replicas: int = getattr(trainer.strategy, "data_parallel_size", trainer.world_size)
        config = getattr(pl_module, "config", None)
        known = isinstance(config, TransformerModelConfig) and bool(lengths)
        flops = batch_flops(config, samples, *lengths) if known else 0.0  # type: ignore[arg-type]
        assert self._start is not None
        self._pending.append(
            _Step(
                before=self._end,
                start=self._start,
                computed=self._computed or end,
                end=end,
                tokens=samples * sum(lengths) * replicas,
                flops=flops * replicas,
            )
        )
        self._end = end
        self._resolve()
        if self._times:
            self._log(trainer, pl_module)

    def _resolve(self) -> None:
        while self._pending and self._pending[0].end.reached():
            step = self._pending.popleft()
            self._times.append(
                _Times(
                    data=step.start.since(step.before) if step.before is not None else 0.0,
                    schedule=step.computed.since(step.start),
                    optimizer=step.end.since(step.computed),
                    tokens=step.tokens,
                    flops=step.flops,
                )
            )

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        count = len(self._times)
        seconds = max(sum(times.total for times in self._times), 1e-9)
        shown = {"tokens_per_s": sum(times.tokens for times in self._times) / seconds}
        others = {
            "step_time": seconds / count,
            "data_time": sum(times.data for times in self._times) / count,
            "schedule_time": sum(times.schedule for times in self._times) / count,
            "optimizer_time": sum(times.optimizer for times in self._times) / count,
        }
        flops = sum(times.flops for times in self._times) / seconds / trainer.world_size
        if flops:
            others["tflops_per_device"] = flops / 1e12
            if self._peak:
                shown["mfu"] = flops / self._peak
        # Tensors on the CPU, or Lightning would send the numbers to the device and wait for them to come back.
        for numbers, prog_bar in ((shown, True), (others, False)):
            tensors = {name: torch.tensor(number) for name, number in numbers.items()}
            pl_module.log_dict(tensors, prog_bar=prog_bar, batch_size=1)

    # ------------------------------------------------------------ what lies between two steps and does not count

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end = None

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end = None

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._end = None


def sizes(batch: Any) -> tuple[int, tuple[int, ...]]:
    """Samples of a batch, and the lengths of its sequences: one, or a T5's two; none where nothing is known."""
    if not isinstance(batch, Mapping):
        return 0, ()
    pair = (batch.get("encoder_tokens"), batch.get("decoder_tokens"))
    if all(torch.is_tensor(tokens) for tokens in pair):
        return pair[0].size(0), (pair[0].size(1), pair[1].size(1))  # type: ignore[union-attr]
    tokens = batch.get("tokens")
    if not torch.is_tensor(tokens):
        rows = [value for value in batch.values() if torch.is_tensor(value) and value.dim() == 2]
        tokens = max(rows, key=torch.Tensor.numel, default=None)
    return (0, ()) if tokens is None else (tokens.size(0), (tokens.size(1),))


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak dense FLOP/s of ``device`` for matrix products of this precision; ``None`` where it is not known."""
    if device.type != "cuda":
        return None
    try:
        accelerator = accelerator_of_device(torch.cuda.get_device_name(device))
    except ValueError:
        return None
    return accelerator.flops_fp32 if precision == "32-true" else accelerator.flops
