"""What a device did in a few steps: its kernels, and how much of the communication ran beside other work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_KINDS = {"ReduceScatter": "reduce-scatter", "AllGather": "all-gather", "AllReduce": "all-reduce", "SendRecv": "p2p"}


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel's time on the device, in nanoseconds."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """Time in kernels of one kind of communication, and how much of it lies under kernels that compute."""

    total: int
    hidden: int

    @property
    def fraction(self) -> float:
        """Hidden part of the total."""
        return self.hidden / self.total if self.total else 0.0


def summary(spans: Sequence[Span], steps: int) -> dict[str, Any]:
    """Per step: communication and its hidden part, the kernels that took longest, and when any ran."""
    busy = _union(spans)
    total: Counter[str] = Counter()
    for span in spans:
        total[span.name[:80]] += span.end - span.start
    return {
        "overlap": {
            kind: {"ms": round(overlap.total / 1e6 / steps, 3), "hidden": round(overlap.fraction, 4)}
            for kind, overlap in overlaps(spans).items()
        },
        "busy": round(sum(end - start for start, end in busy) / (busy[-1][1] - busy[0][0]), 4),
        "kernel_ms": {name: round(time / 1e6 / steps, 3) for name, time in total.most_common(8)},
    }


def overlaps(spans: Iterable[Span]) -> dict[str, Overlap]:
    """By kind of communication, and ``"all"`` together. Waiting for the other rank is part of a kernel's time."""
    communication: dict[str, list[Span]] = {}
    compute = []
    for span in spans:
        if span.name.startswith(("nccl:", "Memcpy", "Memset", "ProfilerStep")):
            continue  # annotations and copies, not kernels
        if span.name.startswith("nccl"):
            kind = next((kind for word, kind in _KINDS.items() if word in span.name), "other")
            communication.setdefault(kind, []).append(span)
            communication.setdefault("all", []).append(span)
        else:
            compute.append(span)
    busy = _union(compute)
    return {kind: _overlap(_union(spans), busy) for kind, spans in communication.items()}


def _union(spans: Sequence[Span]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], span.end))
        else:
            merged.append((span.start, span.end))
    return merged


def _overlap(these: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> Overlap:
    hidden, first = 0, 0
    for start, end in these:
        while first < len(others) and others[first][1] <= start:
            first += 1
        index = first
        while index < len(others) and others[index][0] < end:
            hidden += min(end, others[index][1]) - max(start, others[index][0])
            index += 1
    return Overlap(sum(end - start for start, end in these), hidden)


def kernels(profiler: Any) -> list[Span]:
    """What ran on the device while ``torch.profiler.profile`` watched."""
    import torch

    return [
        Span(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
