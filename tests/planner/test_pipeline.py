"""The schedule simulator against closed forms, and its invariants."""

from itertools import pairwise

import pytest

from lightning_megatron.errors import LayoutError
from lightning_megatron.planner.pipeline import (
    StageTimes,
    Timeline,
    chunks_in_flight,
    predicted_seconds,
    simulate,
    simulated_seconds,
    stage_order,
)


def even(pp: int, chunks: int = 1, forward: float = 1.0, backward: float = 2.0) -> list[StageTimes]:
    return [StageTimes(forward=(forward / chunks,) * chunks, backward=(backward / chunks,) * chunks)] * pp


@pytest.mark.parametrize(("pp", "m"), [(1, 4), (2, 4), (4, 4), (4, 64), (8, 8), (8, 96), (64, 64)])
def test_bubble_of_1f1b(pp: int, m: int) -> None:
    """(p-1)/m of the ideal time (arXiv:2104.04473, section 2.2.1)."""
    timeline = simulate("1f1b", even(pp), m)
    assert timeline.bubble_fraction == pytest.approx((pp - 1) / m)
    assert timeline.seconds == pytest.approx(3 * (m + pp - 1))


@pytest.mark.parametrize(("pp", "v", "m"), [(2, 2, 4), (4, 2, 8), (4, 4, 16), (8, 3, 8), (8, 3, 64), (16, 2, 32)])
def test_bubble_of_the_interleaved_schedule(pp: int, v: int, m: int) -> None:
    """(p-1)/(v m) of the ideal time (arXiv:2104.04473, section 2.2.2)."""
    timeline = simulate("interleaved", even(pp, v), m)
    assert timeline.bubble_fraction == pytest.approx((pp - 1) / (v * m))


@pytest.mark.parametrize(("pp", "m"), [(4, 8), (4, 12), (8, 32)])
def test_bubble_of_zb_h1(pp: int, m: int) -> None:
    """(p-1)(t_F + t_B - t_W), a third of 1F1B's when all three are equal (arXiv:2401.10241, table 1)."""
    timeline = simulate("zb_h1", even(pp), m)
    assert timeline.seconds - 3 * m == pytest.approx(pp - 1)
    assert [timeline.peak_chunks(stage) for stage in range(pp)] == [pp] * pp  # no more than 1F1B's first stage


@pytest.mark.parametrize(("pp", "v", "m"), [(4, 1, 2), (4, 1, 16), (4, 2, 8), (4, 4, 4), (8, 3, 16)])
def test_activations_in_flight_are_the_closed_form(pp: int, v: int, m: int) -> None:
    timeline = simulate("interleaved" if v > 1 else "1f1b", even(pp, v), m)
    for stage in range(pp):
        assert timeline.peak_chunks(stage) == chunks_in_flight(pp, v, m, stage)


def check_causality(timeline: Timeline, hop: float) -> None:
    pp = len(timeline.stages)
    ends = {
        (task.kind, task.chunk * pp + stage, task.microbatch): task.end
        for stage, tasks in enumerate(timeline.stages)
        for task in tasks
    }
    last = max(virtual for _, virtual, _ in ends)
    for stage, tasks in enumerate(timeline.stages):
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(tasks))
        for task in tasks:
            virtual = task.chunk * pp + stage
            if task.kind == "F" and virtual > 0:
                assert task.start >= ends["F", virtual - 1, task.microbatch] + hop - 1e-9
            if task.kind == "B":
                source = ("B", virtual + 1, task.microbatch) if virtual < last else ("F", virtual, task.microbatch)
                assert task.start >= ends[source] + (hop if virtual < last else 0) - 1e-9


@pytest.mark.parametrize(
    ("name", "v", "m"), [("1f1b", 1, 7), ("interleaved", 2, 8), ("interleaved", 3, 10), ("zb_h1", 1, 9)]
)
def test_every_pass_waits_for_its_input(name: str, v: int, m: int) -> None:
    times = [StageTimes(forward=(1.0 + 0.3 * stage,) * v, backward=(2.0 - 0.1 * stage,) * v) for stage in range(4)]
    timeline = simulate(name, times, m, hop_seconds=0.25)  # type: ignore[arg-type]
    check_causality(timeline, 0.25)
    kinds = 3 if name == "zb_h1" else 2
    assert all(len(tasks) == len(set(tasks)) == kinds * v * m for tasks in timeline.stages)


def test_uneven_stages_wait_for_the_slowest() -> None:
    times = even(3)
    times[1] = StageTimes(forward=(2.0,), backward=(4.0,))
    timeline = simulate("1f1b", times, 32)
    # By hand: the slow stage starts after a forward of 1, waits 1 for the first backward behind its second forward, is
    # busy from then on, and the first stage ends with a backward of 2.
    assert timeline.seconds == pytest.approx(1 + 1 + 32 * 6 + 2)
    assert timeline.busy[1] == pytest.approx(192)
    assert timeline.idle_fraction(0) == pytest.approx(1 - 96 / 196)
    assert predicted_seconds(times, 32) == pytest.approx(timeline.seconds, rel=0.02)


@pytest.mark.parametrize(("pp", "v", "m"), [(2, 1, 8), (4, 1, 16), (8, 2, 32)])
def test_closed_form_is_near_the_simulation_with_hops(pp: int, v: int, m: int) -> None:
    times, hop = even(pp, v), 0.05
    exact = simulate("interleaved" if v > 1 else "1f1b", times, m, hop).seconds
    assert predicted_seconds(times, m, hop) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("pp", "v", "m"), [(4, 1, 100), (4, 2, 100), (4, 2, 103), (8, 3, 200)])
def test_long_schedules_are_continued_exactly(pp: int, v: int, m: int) -> None:
    times = even(pp, v)
    times[-1] = StageTimes(forward=(1.2 / v,) * v, backward=(2.3 / v,) * v)
    seconds, timeline = simulated_seconds(times, m, 0.1)
    assert timeline.num_microbatches < m
    assert seconds == pytest.approx(simulate("interleaved" if v > 1 else "1f1b", times, m, 0.1).seconds)


def test_order_of_megatron_core() -> None:
    order = stage_order("interleaved", 2, 2, 4, 0)
    assert " ".join(f"{kind}{chunk}.{microbatch}" for kind, chunk, microbatch in order) == (
        "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3"
    )


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"schedule=1f1 is not known\. Did you mean 1f1b"):
        simulate("1f1", even(2), 4)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="at least as many micro-batches as stages, but 4 < 8"):
        simulate("interleaved", even(8, 2), 4)
    with pytest.raises(LayoutError, match="one chunk per stage, but there are 2"):
        simulate("1f1b", even(2, 2), 4)
    with pytest.raises(ValueError, match="num_microbatches=0"):
        simulate("1f1b", even(2), 0)
