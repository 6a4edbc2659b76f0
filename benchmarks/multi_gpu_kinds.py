"""The kinds of jobs of :mod:`benchmarks.multi_gpu`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, override

from lightning_megatron.layout import ParallelLayout

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a job's ranks are used."""

    gpus: int
    sizes: str = "tp1"
    """The short form of :class:`~lightning_megatron.ParallelLayout`."""
    distributed_optimizer: bool = False
    overlap: bool = False
    """Reduce gradients during the backward and, with the distributed optimizer, gather weights during the forward."""

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return ParallelLayout.parse(self.sizes).data_parallel_size(self.gpus)

    def __str__(self) -> str:
        replicas = self.data_parallel_size
        parts = [self.sizes] * (self.sizes != "tp1" or replicas == 1) + [f"dp{replicas}"] * (replicas > 1)
        words = [" distributed"] * self.distributed_optimizer + [" overlapped"] * self.overlap
        return "_".join(parts) + "".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far losses and gradient norms may be from those of one process."""

    loss: float
    norm: float
    relative: bool = False


FP32 = Tolerance(loss=1e-5, norm=1e-4)
BF16 = Tolerance(loss=2e-3, norm=2e-2, relative=True)
TOLERANCES: dict[Precision, Tolerance] = {"32-true": FP32, "bf16-mixed": BF16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing that ranks do together."""

    part: str
    name: str
    layout: Layout
    limit: float = 60.0
    """Seconds after which it counts as hung."""

    @property
    def key(self) -> str:
        """Its name among all jobs."""
        return f"{self.part}: {self.name}"

    def needs(self, other: Job) -> bool:
        """Whether it is of no use without the result of ``other``."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(Job):
    """A few steps of a small model, of which losses and gradient norms are compared."""

    steps: int
    """Optimizer steps at its end, those before a checkpoint included."""
    reference: str | None = None
    """Name of the job of this part that it must equal."""
    precision: Precision = "32-true"
    experts: bool = False
    """A mixture of experts instead of dense layers."""
    seed: int = 0
    """Of the initial weights, where there is no checkpoint."""
    save: str | None = None
    """Name of a checkpoint to write at its end."""
    load: str | None = None
    """Name of a checkpoint to go on from."""
    checkpoints: str | None = None
    """Name of a directory for a checkpoint of each step, from the last of which it goes on."""
    kill_at: int | None = None
    """The last rank is killed once this many steps are done; the others must stop with an error."""

    @override
    def needs(self, other: Job) -> bool:
        loads = isinstance(other, Training) and self.load is not None and self.load == other.save
        return self.part == other.part and (loads or self.reference == other.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation(Job):
    """Greedy continuations of a few prompts, from the weights of its reference."""

    reference: str | None = None

    @override
    def needs(self, other: Job) -> bool:
        return self.part == other.part and self.reference == other.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed(Job):
    """Steps of a model of :mod:`benchmarks.workloads`, timed."""

    model: str
    micro_batch_size: int
    num_micro_batches: int = 1
    warm_up: int = 5
    timed: int = 8
    baseline: str | None = None
    """The job on one GPU whose tokens/s are an efficiency of 1."""
    goal: float | None = None
    """Lowest efficiency that was asked for."""
    profiled: bool = False
    """Whether kernels are listed, and the overlap of communication with other work."""
    published: float | None = None
    """Seconds a step that somebody else has measured for the same job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding(Job):
    """Greedy tokens of a model of :mod:`benchmarks.workloads` with random weights in bf16, timed."""

    model: str
    batch: int
    prompt: int = 128
    new: int = 128
    repeats: int = 3
    baseline: str | None = None
    """The job on one GPU whose tokens/s are a ratio of 1."""
    goal: float | None = None
    """Lowest ratio that was asked for."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A job that cannot run here, and why."""

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs, part by part in this order, and what does not."""

    jobs: tuple[Job, ...]
    skipped: tuple[Skipped, ...] = field(default=())

    def part(self, part: str) -> tuple[Job, ...]:
        """The jobs of one part."""
        return tuple(job for job in self.jobs if job.part == part)
