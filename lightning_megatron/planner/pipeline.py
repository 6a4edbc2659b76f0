"""Pipeline schedules, simulated: who runs what when, how long the step takes, and how much of it is bubble.

The orders are those that megatron-core runs. With equal stages the simulation gives the closed forms of Narayanan et
al. 2021 (arXiv:2104.04473, section 2.2), ``(p-1)/m`` of the ideal time for 1F1B and ``(p-1)/(v m)`` interleaved; with
uneven ones it gives what no closed form does. ZB-H1 (Qi et al. 2023, arXiv:2401.10241) is there for comparison only:
megatron-core does not run it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

from lightning_megatron.errors import LayoutError
from lightning_megatron.planner.assumptions import PIPELINE
from lightning_megatron.planner.hardware import unknown

ScheduleName = Literal["1f1b", "interleaved", "zb_h1"]
SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "interleaved", "zb_h1")

FORWARD, BACKWARD, WEIGHT = "F", "B", "W"


class Step(NamedTuple):
    """One entry of a stage's order: a pass of one micro-batch through one chunk."""

    kind: str
    """``F`` forward, ``B`` backward (in ZB-H1 of the input alone), ``W`` backward of the weights."""
    chunk: int
    microbatch: int


class Task(NamedTuple):
    """A step with its times, in seconds from the start of the schedule."""

    kind: str
    chunk: int
    microbatch: int
    start: float
    end: float


def num_warmup(pp: int, chunks: int, num_microbatches: int, stage: int) -> int:
    """Forward passes of chunks that ``stage`` runs before its first backward, less the one that precedes it directly.

    As ``get_pp_rank_microbatches`` of megatron-core's ``schedules.py`` counts them.
    """
    if chunks == 1:
        return min(num_microbatches, pp - stage - 1)
    return min(num_microbatches * chunks, 2 * (pp - stage - 1) + (chunks - 1) * pp)


def chunks_in_flight(pp: int, chunks: int, num_microbatches: int, stage: int) -> int:
    """Most chunk forwards whose activations ``stage`` holds at once.

    On stage 0 of the interleaved schedule that is ``1 + (p-1)/(p v)`` times the model's layers over the stages
    (arXiv:2205.05198, section 4.2.3).
    """
    return min(num_microbatches * chunks, num_warmup(pp, chunks, num_microbatches, stage) + 1)


def stage_order(name: ScheduleName, pp: int, chunks: int, num_microbatches: int, stage: int) -> list[Step]:
    """The order in which ``stage`` runs its passes.

    Raises:
        ValueError: no schedule has this name.
        LayoutError: the schedule cannot run these sizes.
    """
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    if name != "interleaved" and chunks != 1:
        raise LayoutError(f"The schedule {name} runs one chunk per stage, but there are {chunks}. Use interleaved.")
    if name == "interleaved" and 0 < num_microbatches % pp < pp and num_microbatches < pp:
        raise LayoutError(
            f"The interleaved schedule needs at least as many micro-batches as stages, but {num_microbatches} < {pp}."
        )
    table = _microbatch_table(pp, chunks, num_microbatches)
    forwards = [Step(FORWARD, chunk, microbatch) for microbatch, chunk in table]
    backwards = [Step(BACKWARD, chunks - 1 - chunk, microbatch) for microbatch, chunk in table]
    warmup = num_warmup(pp, chunks, num_microbatches, stage)
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += (forward, backward)
    order += backwards[len(forwards) - warmup :]
    return _defer_weights(order, lag=stage) if name == "zb_h1" else order


def _microbatch_table(pp: int, chunks: int, num_microbatches: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) in forward order: groups of ``pp`` micro-batches go through each chunk in turn."""
    return [
        (microbatch, chunk)
        for first in range(0, num_microbatches, pp)
        for chunk in range(chunks)
        for microbatch in range(first, min(first + pp, num_microbatches))
    ]


def _defer_weights(order: list[Step], lag: int) -> list[Step]:
    """ZB-H1: a stage runs its weight gradients ``lag`` micro-batches late, so that they fill the drain's bubble.

    Stage ``i`` of 1F1B holds ``i`` micro-batches fewer than stage 0, so deferring ``i`` costs no peak memory.
    """
    deferred: list[Step] = []
    pending: deque[Step] = deque()
    for step in order:
        deferred.append(step)
        if step.kind == BACKWARD:
            pending.append(Step(WEIGHT, step.chunk, step.microbatch))
            if len(pending) > lag:
                deferred.append(pending.popleft())
    return deferred + list(pending)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one micro-batch through each chunk of one stage."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    """Of inputs and weights together."""
    weight_fraction: float = 0.5
    """Part of the backward that computes weight gradients; only ZB-H1 separates it."""

    @property
    def total(self) -> float:
        """Forward and backward through all chunks."""
        return sum(self.forward) + sum(self.backward)


@dataclass(frozen=True)
class Timeline:
    """A simulated schedule. Times are seconds."""

    schedule: ScheduleName
    stages: tuple[tuple[Task, ...], ...]
    """What each stage runs, in order of time."""
    num_microbatches: int

    @cached_property
    def seconds(self) -> float:
        """From the first forward to the end of the last backward on any stage."""
        return max(tasks[-1].end for tasks in self.stages)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each stage computes."""
        return tuple(sum(task.end - task.start for task in tasks) for tasks in self.stages)

    @property
    def bubble_fraction(self) -> float:
        """Time lost over the ideal time, which is the busiest stage's: the papers' ``(p-1)/m``."""
        ideal = max(self.busy)
        return (self.seconds - ideal) / ideal

    def idle_fraction(self, stage: int) -> float:
        """Part of the whole time that ``stage`` waits."""
        return 1 - self.busy[stage] / self.seconds

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the simulation takes for granted."""
        return PIPELINE

    def peak_chunks(self, stage: int) -> int:
        """Most chunk forwards held at once: a forward adds one, its last backward frees it."""
        tasks = self.stages[stage]
        frees = WEIGHT if any(task.kind == WEIGHT for task in tasks) else BACKWARD
        held = accumulate((task.kind == FORWARD) - (task.kind == frees) for task in tasks)
        return max(held)


def simulate(
    name: ScheduleName, times: Sequence[StageTimes], num_microbatches: int, hop_seconds: float = 0.0
) -> Timeline:
    """Run the schedule ``name`` over stages that take ``times``.

    Args:
        name: A key of :data:`SCHEDULES`.
        times: One entry per stage; all with the same number of chunks.
        num_microbatches: Micro-batches per optimizer step.
        hop_seconds: Time for activations or their gradients to reach the neighbouring stage.

    Raises:
        ValueError: no schedule has this name, or there is no micro-batch.
        LayoutError: the schedule cannot run these sizes.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches={num_microbatches}, but must be at least 1.")
    pp, chunks = len(times), len(times[0].forward)
    orders = [stage_order(name, pp, chunks, num_microbatches, stage) for stage in range(pp)]
    tasks: list[list[Task]] = [[] for _ in range(pp)]
    clock = [0.0] * pp
    # When the pass of a micro-batch through a chunk of a stage is done, by (kind, chunk * pp + stage, micro-batch).
    done: dict[tuple[str, int, int], float] = {}
    queue = deque(range(pp))
    while queue:
        stage = queue.popleft()
        order, mine = orders[stage], tasks[stage]
        duration = _durations(times[stage], name)
        advanced = False
        for kind, chunk, microbatch in order[len(mine) :]:
            needed = _dependency(kind, chunk * pp + stage, pp * chunks)
            start = clock[stage]
            if needed is not None:
                arrival = done.get((kind, needed, microbatch))
                if arrival is None:
                    break
                # A hop between chunks of one stage (pp=1) costs nothing.
                start = max(start, arrival + hop_seconds) if pp > 1 else start
            end = start + duration[kind][chunk]
            done[kind, chunk * pp + stage, microbatch] = clock[stage] = end
            mine.append(Task(kind, chunk, microbatch, start, end))
            advanced = True
        if advanced:
            queue += {(stage - 1) % pp, (stage + 1) % pp}
    if any(len(mine) < len(order) for mine, order in zip(tasks, orders, strict=True)):
        raise LayoutError(f"The schedule {name} deadlocks with {pp} stages, {chunks} chunks, {num_microbatches}.")
    return Timeline(name, tuple(map(tuple, tasks)), num_microbatches)


def _durations(times: StageTimes, name: ScheduleName) -> dict[str, tuple[float, ...]]:
    if name != "zb_h1":
        return {FORWARD: times.forward, BACKWARD: times.backward}
    weight = times.weight_fraction
    return {
        FORWARD: times.forward,
        BACKWARD: tuple(seconds * (1 - weight) for seconds in times.backward),
        WEIGHT: tuple(seconds * weight for seconds in times.backward),
    }


def _dependency(kind: str, virtual_stage: int, num_virtual_stages: int) -> int | None:
    """The virtual stage whose pass of the same kind must be done first."""
    if kind == FORWARD and virtual_stage > 0:
        return virtual_stage - 1
    if kind == BACKWARD and virtual_stage < num_virtual_stages - 1:
        return virtual_stage + 1
    return None


def schedule_name(chunks: int) -> ScheduleName:
    """The schedule that megatron-core runs for this many chunks per stage."""
    return "interleaved" if chunks > 1 else "1f1b"


def predicted_seconds(times: Sequence[StageTimes], num_microbatches: int, hop_seconds: float = 0.0) -> float:
    """Seconds of the schedule without simulating it: steady state of the slowest stage, and filling and draining.

    Exact for equal stages without hops; what the search ranks by, before the best are simulated.
    """
    chunks = len(times[0].forward)
    totals = [stage.total for stage in times]
    slowest = max(totals)
    fill = (sum(totals) - slowest) / chunks + 2 * (len(times) - 1) * hop_seconds
    # Plain 1F1B waits for a hop in either direction every micro-batch; interleaving has other chunks to run meanwhile.
    wait = 2 * hop_seconds if chunks == 1 and len(times) > 1 else 0.0
    return num_microbatches * slowest + (num_microbatches - 1) * wait + fill


def simulated_seconds(
    times: Sequence[StageTimes],
    num_microbatches: int,
    hop_seconds: float = 0.0,
    *,
    limit: int | None = None,
    schedule: ScheduleName | None = None,
) -> tuple[float, Timeline]:
    """Seconds of the schedule, and a timeline of at most ``limit`` micro-batches (by default four rounds of stages).

    Past the warm-up every further micro-batch adds one period of the steady state, so a long schedule is simulated at
    two lengths and continued in a straight line. ``schedule`` is by default what megatron-core takes for these chunks.
    """
    pp = len(times)
    name = schedule or schedule_name(len(times[0].forward))
    longest = max(limit or 4 * pp, 2 * pp)
    if num_microbatches <= longest:
        timeline = simulate(name, times, num_microbatches, hop_seconds)
        return timeline.seconds, timeline
    # Whole rounds, with the remainder of the real number: an incomplete last round of the interleaved schedule drains
    # differently from a whole one.
    remainder = num_microbatches % pp
    long = longest // pp * pp - (pp if remainder else 0) + remainder
    short = long - pp
    timeline = simulate(name, times, long, hop_seconds)
    period = (timeline.seconds - simulate(name, times, short, hop_seconds).seconds) / pp
    return timeline.seconds + (num_microbatches - long) * period, timeline
