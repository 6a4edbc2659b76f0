"""Pictures: what is drawn, not how it looks."""

from pathlib import Path

import pytest

from lightning_megatron.planner import GIB, MODELS, Batch, Cluster, Constraints, StageTimes, plan, simulate
from lightning_megatron.planner.plots import memory_figure, save_figures, timeline_figure

RESULT = plan(
    MODELS["gpt2_large"],
    Cluster.of("h100", 8),
    Batch(global_batch_size=64, seq_length=1024),
    constraints=Constraints(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=3),
    keep=1,
)


def test_timeline_draws_every_pass() -> None:
    timeline = simulate("zb_h1", [StageTimes(forward=(1.0,), backward=(2.0,))] * 3, 5)
    (axes,) = timeline_figure(timeline).axes
    bars = [path for collection in axes.collections for path in collection.get_paths()]
    assert len(bars) == 3 * 5 * 3
    assert len(axes.texts) == len(bars)
    assert axes.get_legend_handles_labels()[1] == ["forward", "backward", "weight gradients"]
    assert "zb_h1: 3 stages, 5 micro-batches" in axes.get_title()


def test_memory_bars_add_up_to_the_total() -> None:
    (axes,) = memory_figure(RESULT.best, capacity=80 * GIB).axes
    tops = [0.0] * 4
    for bar in axes.patches:
        stage = round(bar.get_x() + bar.get_width() / 2)
        tops[stage] = max(tops[stage], bar.get_y() + bar.get_height())
    assert tops == pytest.approx([stage.total / GIB for stage in RESULT.best.memory])
    assert axes.lines[0].get_ydata()[0] == 80


def test_saved_files_are_pictures(tmp_path: Path) -> None:
    for path in save_figures(RESULT.best, 80 * GIB, tmp_path / "new"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width = int.from_bytes(data[16:20])
        assert width > 500
