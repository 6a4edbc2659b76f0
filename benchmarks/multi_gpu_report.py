"""Judges what the jobs of :mod:`benchmarks.multi_gpu` found, and shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.multi_gpu_jobs import PARTS
from benchmarks.multi_gpu_kinds import TOLERANCES, Decoding, Generation, Job, Skipped, Speed, Tolerance, Training
from benchmarks.multi_gpu_launch import Failed, Finished, Killed, NotRun, Outcome

Status = Literal["holds", "measured", "below goal", "failed", "not run", "skipped"]
STYLES: dict[Status, str] = {"holds": "green", "failed": "bold red", "below goal": "yellow", "not run": "yellow"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the report."""

    part: str
    job: str
    status: Status
    summary: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def breaks(self) -> bool:
        """Whether something that must hold does not. Speed is measured, not required."""
        return self.status == "failed" and self.part != "b"

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


class Judge:
    """Compares each job with the one it refers to, which ran before it."""

    def __init__(self) -> None:
        self._finished: dict[str, Finished] = {}
        self._steps: dict[str, int] = {}

    def result(self, job: Job, outcome: Outcome) -> Result:
        """What became of a job."""
        match outcome:
            case NotRun(reason):
                return _result(job, "not run", reason)
            case Failed(reason, detail):
                return _result(job, "failed", reason, {"detail": detail})
            case Killed(after_s, exit_codes, errors):
                numbers = {"others_stopped_after_s": round(after_s, 1), "exit_codes": exit_codes, "errors": errors}
                return _result(job, "holds", f"the others stopped after {after_s:.1f} s: {errors[0]}", numbers)
            case Finished():
                self._finished[job.key] = outcome
                if isinstance(job, Training):
                    self._steps[job.key] = job.steps
                return self._judge(job, outcome)

    def _judge(self, job: Job, outcome: Finished) -> Result:
        if isinstance(job, Speed):
            return self._speed(job, outcome)
        if isinstance(job, Decoding):
            return self._decoding(job, outcome)
        if isinstance(job, Training) and job.kill_at is not None:
            return _result(job, "failed", "it ended before a rank could be killed")
        assert isinstance(job, Training | Generation)
        key = job.key if job.reference is None else f"{job.part}: {job.reference}"
        reference = self._finished[key]
        if isinstance(job, Training):
            return _training(job, outcome, reference, self._steps[key])
        return _texts(job, outcome, reference)

    def _speed(self, job: Speed, outcome: Finished) -> Result:
        first = outcome.ranks[0]
        numbers = {**first, "wall_s": outcome.wall_s}
        if "peak_gib" in first:
            numbers["peak_gib_by_rank"] = [round(rank["peak_gib"], 2) for rank in outcome.ranks]
            numbers["peak_gib"] = max(numbers["peak_gib_by_rank"])
        words = [f"{first['ms']:.1f} ms", f"{first['tokens_per_s_per_gpu']:,.0f} tokens/s per GPU"]
        if first.get("mfu") is not None:
            words.append(f"MFU {first['mfu']:.1%}")
        if "peak_gib" in numbers:
            words.append(f"{numbers['peak_gib']:.1f} GiB")
        status: Status = "measured"
        one = self._finished.get(f"b: {job.baseline}")
        if one is not None:
            efficiency = first["tokens_per_s_per_gpu"] / one.ranks[0]["tokens_per_s_per_gpu"]
            numbers |= {"efficiency": efficiency, "goal": job.goal}
            words.append(f"efficiency {efficiency:.3f}" + (f" (goal {job.goal})" if job.goal else ""))
            status = "below goal" if job.goal is not None and efficiency < job.goal else "measured"
        elif job.baseline is not None:
            words.append("no efficiency: the job on one GPU has no result")
        if job.published is not None:
            numbers["published_s"] = job.published
            words.append(f"{job.published / first['ms'] * 1e3:.2f} times as fast as {job.published} s")
        if "overlap" in first:
            words += [f"{kind} hidden {part['hidden']:.0%}" for kind, part in first["overlap"].items()]
        elif job.profiled:
            words.append("overlap not measured")
        return _result(job, status, ", ".join(words), numbers)

    def _decoding(self, job: Decoding, outcome: Finished) -> Result:
        first = outcome.ranks[0]
        words = [f"{first['tokens_per_s']:,.0f} tokens/s"]
        numbers: dict[str, Any] = {"tokens_per_s": first["tokens_per_s"], "wall_s": outcome.wall_s}
        one = self._finished.get(f"b: {job.baseline}")
        status: Status = "measured"
        if one is not None:
            ratio = first["tokens_per_s"] / one.ranks[0]["tokens_per_s"]
            numbers |= {"ratio": ratio, "goal": job.goal}
            words.append(f"{ratio:.2f} times one GPU" + (f" (goal {job.goal})" if job.goal else ""))
            status = "below goal" if job.goal is not None and ratio < job.goal else "measured"
        return _result(job, status, ", ".join(words), numbers)


def _result(job: Job, status: Status, summary: str, numbers: Mapping[str, Any] | None = None) -> Result:
    return Result(part=job.part, job=job.name, status=status, summary=summary, numbers=numbers or {})


def skipped(what: Skipped) -> Result:
    """The line of a job that cannot run here."""
    return _result(what.job, "skipped", what.reason)


def _training(job: Training, outcome: Finished, reference: Finished, reference_steps: int) -> Result:
    tolerance = TOLERANCES[job.precision]
    losses, norms = reference.ranks[0]["losses"], reference.ranks[0]["norms"]
    first = outcome.ranks[0]
    taken = len(first["losses"])
    # Both may have begun at a checkpoint.
    before = job.steps - taken - (reference_steps - len(losses))
    numbers: dict[str, Any] = {
        "losses": first["losses"],
        "norms": first["norms"],
        "loss_difference": max(_difference(rank["losses"], losses[before:], tolerance) for rank in outcome.ranks),
        "norm_difference": max(_difference(rank["norms"], norms[before:], tolerance) for rank in outcome.ranks),
        "tolerance": asdict(tolerance),
        "wall_s": outcome.wall_s,
    }
    resumed = job.load is not None or job.checkpoints is not None
    if resumed and not 0 < taken < job.steps:
        return _result(job, "failed", f"took {taken} of {job.steps} steps, so it did not resume", numbers)
    if not resumed and taken != job.steps:
        return _result(job, "failed", f"took {taken} steps instead of {job.steps}", numbers)
    if outcome is reference and not _learns(losses):
        return _result(job, "failed", f"the reference does not train: {losses}", numbers)
    holds = numbers["loss_difference"] <= tolerance.loss and numbers["norm_difference"] <= tolerance.norm
    kind = "relative" if tolerance.relative else "absolute"
    summary = (
        f"losses {losses[0]:.4f} to {losses[-1]:.4f}"
        if outcome is reference
        else f"losses differ by {numbers['loss_difference']:.1e} (allowed {tolerance.loss:.0e}, {kind}), "
        f"gradient norms by {numbers['norm_difference']:.1e} (allowed {tolerance.norm:.0e})"
    )
    return _result(job, "holds" if holds else "failed", summary + f", {taken} steps", numbers)


def _learns(losses: Sequence[float]) -> bool:
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def _difference(found: Sequence[float], expected: Sequence[float], tolerance: Tolerance) -> float:
    """The largest of all steps found; not a number is infinitely far from all others."""
    pairs = zip(found, expected, strict=False)
    differences = [abs(a - b) / (abs(b) if tolerance.relative else 1.0) for a, b in pairs]
    return max((math.inf if math.isnan(x) else x for x in differences), default=math.inf)


def _texts(job: Generation, outcome: Finished, reference: Finished) -> Result:
    expected = reference.ranks[0]["tokens"]
    speed = f"{outcome.ranks[0]['tokens_per_s']:,.0f} tokens/s"
    numbers = {"tokens_per_s": outcome.ranks[0]["tokens_per_s"], "wall_s": outcome.wall_s}
    wrong = [rank for rank, told in enumerate(outcome.ranks) if told["tokens"] != expected]
    if wrong:
        texts = {"expected": expected, "tokens": outcome.ranks[wrong[0]]["tokens"]}
        return _result(job, "failed", f"other tokens than one process on ranks {wrong}", numbers | texts)
    if outcome is reference and len({tuple(text) for text in expected}) < len(expected):
        return _result(job, "failed", "all texts are the same, so nothing would be compared", numbers)
    count = sum(map(len, expected))
    return _result(job, "holds", f"{count} greedy tokens of {len(expected)} prompts, {speed}", numbers)


def show(results: Sequence[Result]) -> None:
    """A table of all results."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("job", "status", "what", title="Several ranks", title_justify="left")
    for part, title in PARTS.items():
        rows = [result for result in results if result.part == part]
        if rows:
            table.add_section()
            table.add_row(f"[bold]{part}: {title}[/bold]")
        for row in rows:
            style = STYLES.get(row.status, "")
            table.add_row(row.job, f"[{style}]{row.status}[/{style}]" if style else row.status, Text(row.summary))
    Console(width=150, highlight=False).print(table)
