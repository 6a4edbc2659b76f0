"""The benchmark of several ranks: what it plans, how it judges, and a whole run with gloo."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.multi_gpu import Budget, parse
from benchmarks.multi_gpu_events import Setting
from benchmarks.multi_gpu_jobs import ORDER, PARTS, plan
from benchmarks.multi_gpu_kinds import Generation, Job, Layout, Speed, Training
from benchmarks.multi_gpu_launch import Failed, Finished, Killed, NotRun, Outcome, run_jobs
from benchmarks.multi_gpu_profile import Overlap, Span, overlaps, summary
from benchmarks.multi_gpu_report import Judge

ROOT = Path(__file__).parents[2]
ONE, TWO = Layout(gpus=1), Layout(gpus=2, sizes="tp2")


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_plan(gpus: int, tiny: bool) -> None:
    what = plan(list(PARTS), gpus, tiny=tiny)
    assert [job.part for job in what.jobs] == sorted((job.part for job in what.jobs), key=ORDER.index)
    keys = [job.key for job in what.jobs]
    everything = [*keys, *(one.job.key for one in what.skipped)]
    assert len(set(everything)) == len(everything)
    assert all(job.layout.gpus <= gpus for job in what.jobs)
    for index, job in enumerate(what.jobs):  # what it is compared with comes before it
        before = keys[:index]
        for reference in (getattr(job, "reference", None), getattr(job, "baseline", None)):
            assert reference is None or f"{job.part}: {reference}" in before
        if isinstance(job, Training) and job.load:
            assert any(isinstance(other, Training) and other.save == job.load for other in what.jobs[:index])
    for one in what.skipped:
        assert one.reason == f"needs {one.job.layout.gpus} ranks, there are {gpus}" or "skipped" in one.reason
    assert bool(what.skipped) == (gpus < 8)


def test_plan_has_what_was_asked_for() -> None:
    speed = {job.name: job for job in plan(["b"], 4, tiny=False).jobs if isinstance(job, Speed)}
    guide = next(job for job in speed.values() if job.published)
    assert (guide.model, guide.layout.sizes, guide.micro_batch_size * guide.num_micro_batches) == (
        "gpt2-large",
        "tp2_pp2",
        48,
    )
    goals = {(job.model, str(job.layout)): job.goal for job in speed.values() if job.goal}
    for model in ("gpt2-large", "llama-1b", "llama-7b-slice"):
        assert goals[model, "dp2 distributed overlapped"] == 0.9
        assert goals[model, "tp2_sp"] == goals[model, "pp2"] == 0.85
    assert {str(job.layout) for job in speed.values()} >= {"pp2_vpp2", "tp2_pp2_sp", "dp4 distributed overlapped"}
    assert not any(job.goal for job in plan(["b"], 4, tiny=True).jobs if isinstance(job, Speed))


def test_budget_passes_on_what_is_left() -> None:
    now = 100.0
    budget = Budget(100.0, ["a", "e"], clock=lambda: now)
    first = budget.deadline("a")
    assert 100.0 < first < 200.0
    now = 101.0  # it took a second
    assert budget.deadline("e") == pytest.approx(200.0)
    late = Budget(100.0, ["a", "e"], clock=lambda: now)
    late.deadline("a")
    now = 300.0
    assert late.deadline("e") == 300.0


def test_command_line() -> None:
    options = parse(["--device", "cpu", "--parts", "e", "a"])
    assert (options.gpus, options.tiny, options.parts, options.minutes) == (2, True, ("a", "e"), 9.5)
    with pytest.raises(SystemExit):
        parse(["--device", "cpu", "--gpus", "0"])


def test_no_time_is_told_and_starts_nothing(tmp_path: Path) -> None:
    jobs = plan(["d"], 2, tiny=True).jobs
    told: list[tuple[Job, Outcome]] = []
    setting = Setting(device="cpu", tiny=True, directory=tmp_path)
    run_jobs(jobs, setting, time.monotonic() - 1, lambda job, outcome: told.append((job, outcome)))
    assert told == [(job, NotRun("out of time")) for job in jobs]
    assert list(tmp_path.iterdir()) == []


def _steps(*losses: float) -> Finished:
    return Finished([{"losses": list(losses), "norms": [1.0] * len(losses)}] * 2, 1.0)


def test_judge_of_equality() -> None:
    judge = Judge()
    one = Training(part="a", name="one", layout=ONE, steps=3)
    two = Training(part="a", name="two", layout=TWO, steps=3, reference="one")
    assert judge.result(one, _steps(3.0, 2.0, 1.0)).status == "holds"
    assert judge.result(two, _steps(3.0, 2.0, 1.000009)).status == "holds"
    for wrong in (_steps(3.0, 2.0, 1.00002), _steps(3.0, math.nan, 1.0), _steps(3.0, 2.0), Failed("died")):
        assert judge.result(two, wrong).breaks
    resumed = Training(part="a", name="resumed", layout=TWO, steps=3, reference="one", load="saved")
    assert judge.result(resumed, _steps(2.0, 1.0)).status == "holds"
    assert judge.result(resumed, _steps(3.0, 2.0, 1.0)).breaks  # from the beginning
    saved = Training(part="a", name="saved", layout=TWO, steps=2, reference="one", save="saved")
    assert judge.result(saved, _steps(3.0, 2.0)).status == "holds"
    assert judge.result(one, _steps(1.0, 2.0, 3.0)).breaks  # learns nothing
    killed = Training(part="a", name="killed", layout=TWO, steps=3, kill_at=1)
    assert judge.result(killed, _steps(3.0, 2.0, 1.0)).breaks  # nobody was
    assert judge.result(killed, Killed(1.0, (1,), ("RuntimeError",))).status == "holds"
    assert not judge.result(two, NotRun("out of time")).breaks


def test_judge_of_speed_and_texts() -> None:
    judge = Judge()
    one = Speed(part="b", name="one", layout=ONE, model="m", micro_batch_size=1)
    two = Speed(part="b", name="two", layout=TWO, model="m", micro_batch_size=1, baseline="one", goal=0.9)
    told = {"ms": 1.0, "tokens_per_s_per_gpu": 100.0}
    slower = told | {"tokens_per_s_per_gpu": 89.0}
    assert "no efficiency" in judge.result(two, Finished([told], 1.0)).summary
    judge.result(one, Finished([told], 1.0))
    assert judge.result(two, Finished([told, told], 1.0)).status == "measured"
    found = judge.result(two, Finished([slower, slower], 1.0))
    assert (found.status, found.breaks, found.numbers["efficiency"]) == ("below goal", False, pytest.approx(0.89))
    text, other = ({"tokens": [[1, number], [3, 4]], "tokens_per_s": 1.0} for number in (2, 5))
    alone = Generation(part="d", name="one", layout=ONE)
    both = Generation(part="d", name="two", layout=TWO, reference="one")
    assert judge.result(alone, Finished([text], 1.0)).status == "holds"
    assert judge.result(both, Finished([text, text], 1.0)).status == "holds"
    assert judge.result(both, Finished([text, other], 1.0)).breaks


def test_overlap() -> None:
    spans = [
        Span("gemm", 0, 10),
        Span("gelu", 8, 20),  # on another stream
        Span("ncclDevKernel_ReduceScatter_Sum_f32", 15, 25),
        Span("Memcpy HtoD", 20, 30),  # no kernel
        Span("ncclDevKernel_AllGather_RING", 40, 50),
        Span("norm", 42, 44),
        Span("norm", 46, 60),
    ]
    assert overlaps(spans) == {
        "reduce-scatter": Overlap(10, 5),
        "all-gather": Overlap(10, 6),
        "all": Overlap(20, 11),
    }
    told = summary(spans, steps=2)
    assert told["busy"] == round(50 / 60, 4)
    assert told["overlap"]["all"]["hidden"] == 0.55


@pytest.mark.slow
def test_failures_and_hangs_do_not_stop_the_rest(tmp_path: Path) -> None:
    jobs = (
        Training(part="c", name="missing", layout=TWO, steps=2, load="nothing", save="never"),
        Training(part="c", name="dependent", layout=TWO, steps=2, load="never"),
        Generation(part="d", name="slow", layout=ONE, limit=0.001),
        Generation(part="d", name="fine", layout=TWO),
    )
    told: dict[str, Outcome] = {}
    setting = Setting(device="cpu", tiny=True, directory=tmp_path)
    run_jobs(jobs, setting, time.monotonic() + 240, lambda job, outcome: told.update({job.name: outcome}))
    failed, hung = told["missing"], told["slow"]
    assert isinstance(failed, Failed)
    assert "CheckpointError" in failed.reason
    assert told["dependent"] == NotRun("needs 'missing', which failed")
    assert isinstance(hung, Failed)
    assert hung.reason == "hung: no result in 0.001 s"
    assert "most recent call first" in hung.detail  # where it was
    assert isinstance(told["fine"], Finished)
    assert len(told["fine"].ranks) == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("ranks", "parts"), [(2, "abcde"), (4, "cde")])
def test_whole_run(ranks: int, parts: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.multi_gpu", "--device", "cpu", "--gpus", str(ranks)]
    # Ten times what it takes on an idle machine, whose neighbours must not decide what is run.
    command += ["--minutes", "22", "--results", str(results), "--parts", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    _, *lines = map(json.loads, results.read_text().splitlines())
    what = plan(parts, ranks, tiny=True)
    assert Counter(line["part"] for line in lines if line["status"] == "skipped") == Counter(
        one.job.part for one in what.skipped
    )
    run = {f"{line['part']}: {line['job']}": line for line in lines if line["status"] != "skipped"}
    assert set(run) == {job.key for job in what.jobs}
    assert {line["status"] for line in run.values()} == ({"holds", "measured"} if "b" in parts else {"holds"})
    for line in run.values():
        if line["part"] == "b":
            assert line["numbers"]["tokens_per_s_per_gpu"] > 0
    assert "a killed rank" in done.stdout  # the table
