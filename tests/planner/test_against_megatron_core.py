"""The planner's arithmetic against the functions of megatron-core that it stands for."""

import pytest

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.planner.parameters import balanced_stages, layers_per_chunk
from lightning_megatron.planner.pipeline import stage_order

schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")


@pytest.mark.parametrize(("pp", "v", "m"), [(2, 2, 4), (4, 3, 16), (4, 2, 10), (3, 2, 8)])
def test_forwards_go_round_as_in_its_schedule_table(pp: int, v: int, m: int) -> None:
    table = schedules.get_schedule_table(m, v, pp)
    order = stage_order("interleaved", pp, v, m, stage=1)
    assert [(step.microbatch, step.chunk) for step in order if step.kind == "F"] == table
    assert [(step.microbatch, v - 1 - step.chunk) for step in order if step.kind == "B"] == table


@pytest.mark.parametrize(("layers", "pp", "v"), [(126, 16, 2), (126, 16, 4), (30, 4, 1), (22, 4, 3), (6, 2, 1)])
def test_stage_layouts_are_read_as_it_reads_them(layers: int, pp: int, v: int) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    text = balanced_stages(layers, pp * v)
    parsed = PipelineParallelLayerLayout(text, pp)
    parsed.validate_layer_layout(layers, 0)
    theirs = tuple(
        tuple(sum(layer.name == "decoder" for layer in parsed.layout[stage][chunk]) for chunk in range(v))
        for stage in range(pp)
    )
    layout = ParallelLayout(
        pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=v, pipeline_model_parallel_layout=text
    )
    assert layers_per_chunk(layers, layout) == theirs
