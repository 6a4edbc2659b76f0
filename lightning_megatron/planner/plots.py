"""Pictures of a plan: the pipeline's timeline, and memory by rank. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_megatron.planner.estimate import Estimate
from lightning_megatron.planner.hardware import GIB
from lightning_megatron.planner.pipeline import BACKWARD, FORWARD, WEIGHT, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers and in grey.
_PASS_COLORS = {FORWARD: "#56B4E9", BACKWARD: "#E69F00", WEIGHT: "#009E73"}
_PASS_NAMES = {FORWARD: "forward", BACKWARD: "backward", WEIGHT: "weight gradients"}
_PART_COLORS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#009E73",
    "activations": "#E69F00",
    "logits": "#D55E00",
    "optimizer step": "#CC79A7",
    "overhead": "#999999",
}
_MAX_LABELLED_TASKS = 1500  # more are too narrow to read and slow to draw
_DPI = 150


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    # The object interface, without pyplot: no global state, no display, safe in any process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def timeline_figure(timeline: Timeline, title: str | None = None) -> Figure:
    """A row per stage, a bar per pass; chunks of one stage get lighter. Numbers are micro-batches."""
    stages = len(timeline.stages)
    figure, axes = _new_figure(12, 1.6 + 0.35 * min(stages, 40))
    scale, unit = (1e3, "ms") if timeline.seconds < 1 else (1.0, "s")
    labelled = sum(map(len, timeline.stages)) <= _MAX_LABELLED_TASKS
    chunks = 1 + max(task.chunk for tasks in timeline.stages for task in tasks)
    for stage, tasks in enumerate(timeline.stages):
        for kind, color in _PASS_COLORS.items():
            for chunk in range(chunks):
                bars = [
                    (task.start * scale, (task.end - task.start) * scale)
                    for task in tasks
                    if task.kind == kind and task.chunk == chunk
                ]
                if bars:
                    axes.broken_barh(
                        bars,
                        (stage - 0.42, 0.84),
                        facecolors=color,
                        alpha=1 - 0.6 * chunk / max(chunks, 2),
                        edgecolor="white",
                        linewidth=0.4 if labelled else 0,
                        label=_PASS_NAMES[kind] if stage == 0 and chunk == 0 else None,
                    )
        if labelled:
            for task in tasks:
                middle = (task.start + task.end) / 2 * scale
                axes.text(middle, stage, str(task.microbatch), ha="center", va="center", fontsize=6, clip_on=True)
    axes.set(xlabel=f"time ({unit})", ylabel="pipeline stage", xlim=(0, timeline.seconds * scale))
    axes.set_yticks(range(stages) if stages <= 20 else range(0, stages, max(1, stages // 10)))
    axes.set_ylim(stages - 0.5, -0.5)
    axes.set_title(
        title
        or f"{timeline.schedule}: {stages} stages, {timeline.num_microbatches} micro-batches, "
        f"bubble {timeline.bubble_fraction:.1%} of the ideal time"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.6 / (1 + stages)), ncols=3, frameon=False)
    return figure


def memory_figure(estimate: Estimate, capacity: float | None = None, title: str | None = None) -> Figure:
    """A stacked bar per pipeline stage; ``capacity`` bytes draw the GPU's limit."""
    stages = estimate.memory
    figure, axes = _new_figure(max(5.0, 2.5 + 0.5 * min(len(stages), 40)), 4.5)
    positions = range(len(stages))
    bottom = [0.0] * len(stages)
    for part, color in _PART_COLORS.items():
        heights = [stage.parts()[part] / GIB for stage in stages]
        if any(heights):
            axes.bar(positions, heights, bottom=bottom, color=color, label=part, width=0.8)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    if capacity is not None:
        axes.axhline(capacity / GIB, color="black", linestyle="--", linewidth=1, label="GPU memory")
    axes.set(xlabel="pipeline stage", ylabel="GiB per rank", title=title or f"Memory by rank: {estimate.execution}")
    axes.set_xticks(positions if len(stages) <= 20 else range(0, len(stages), max(1, len(stages) // 10)))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def save_figures(estimate: Estimate, capacity: float, folder: str | Path) -> tuple[Path, Path]:
    """Write ``timeline.png`` and ``memory.png`` into ``folder``, which is made if need be; returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    timeline, memory = folder / "timeline.png", folder / "memory.png"
    timeline_figure(estimate.timeline()).savefig(timeline, dpi=_DPI)
    memory_figure(estimate, capacity).savefig(memory, dpi=_DPI)
    return timeline, memory
