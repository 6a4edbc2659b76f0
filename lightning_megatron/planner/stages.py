"""How layers are spread over pipeline stages whose last one also computes the loss.

The output projection and the loss of a large vocabulary take as long as several layers (2.9 for GPT-2 large), for which
all other stages wait if each has as many layers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.flops import layer_forward_flops
from lightning_megatron.planner.parameters import layers_per_chunk
from lightning_megatron.planner.pipeline import StageTimes, schedule_name, simulate

_MICROBATCHES_PER_STAGE = 4
"""Of a step, as far as its length is not known yet. More of them weigh the slowest stage more."""
_LEAST_GAIN = 0.01


def output_in_layers(model: GPTConfig) -> float:
    """Time of the output projection, as a number of layers."""
    output = 2 * model.hidden_size * model.padded_vocab_size(1)
    return output / layer_forward_flops(model, model.max_position_embeddings)


def by_cost(model: GPTConfig, layout: ParallelLayout) -> ParallelLayout:
    """The layout with layers spread such that a step takes the least time.

    What the layout says about stages is kept, and so is an even spread that no other beats by more than a percent.
    """
    given = (
        layout.num_layers_in_first_pipeline_stage,
        layout.num_layers_in_last_pipeline_stage,
        layout.pipeline_model_parallel_layout,
    )
    stages = layout.pipeline_model_parallel_size
    if stages == 1 or any(one is not None for one in given) or model.num_layers % (stages * layout.num_chunks):
        return layout
    counts = _spread(model.num_layers, stages, layout.num_chunks, round(output_in_layers(model), 2))
    even = layers_per_chunk(model.num_layers, layout)
    if counts == even:
        return layout
    return replace(layout, pipeline_model_parallel_layout=_notation(counts))


@lru_cache(maxsize=256)
def _spread(num_layers: int, stages: int, chunks: int, output: float) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk of each stage."""
    each = num_layers // (stages * chunks)
    even = tuple((each,) * chunks for _ in range(stages))
    best, least = even, _step(even, output) * (1 - _LEAST_GAIN)
    # What the last stage gives away goes to the others in turn, and is taken from its last chunks first.
    for moved in range(1, min(num_layers // stages, int(output) + 1 + stages)):
        counts = [list(stage) for stage in even]
        for index in range(moved):
            counts[-1][chunks - 1 - index % chunks] -= 1
            counts[index % (stages - 1)][index // (stages - 1) % chunks] += 1
        if min(counts[-1]) < 1:
            break
        found = tuple(map(tuple, counts))
        seconds = _step(found, output)
        if seconds < least:
            best, least = found, seconds
    return best


def _step(counts: tuple[tuple[int, ...], ...], output: float) -> float:
    """Length of a step, in forwards of a layer; a backward takes twice as long."""
    times = []
    for stage, layers in enumerate(counts):
        forward = [float(count) for count in layers]
        if stage == len(counts) - 1:
            forward[-1] += output
        times.append(StageTimes(forward=tuple(forward), backward=tuple(2 * one for one in forward)))
    return simulate(schedule_name(len(counts[0])), times, _MICROBATCHES_PER_STAGE * len(counts)).seconds


def _notation(counts: tuple[tuple[int, ...], ...]) -> str:
    """megatron-core's notation: chunks in the order of the model."""
    order = [f"t*{counts[stage][chunk]}" for chunk in range(len(counts[0])) for stage in range(len(counts))]
    return f"E{'|'.join(order)}L"
