"""Parameters per rank, counted exactly as megatron-core allocates them.

Column-parallel weights and biases, row-parallel weights and the padded vocabulary are split over the tensor-parallel
ranks; norms, row-parallel biases and position embeddings are on every one. With tied embeddings a last stage that is
not also the first holds a copy of the embedding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from lightning_megatron.errors import LayoutError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig


@dataclass(frozen=True, slots=True)
class LayerWidths:
    """Widths of one Transformer layer on one tensor-parallel rank, in elements per token."""

    hidden: int
    query: int
    """Of all query heads of the rank."""
    key: int
    """Of all key heads of the rank; values have the same."""
    ffn: int
    """Of the input of the second MLP matrix."""
    ffn_up: int
    """Of the output of the first: twice ``ffn`` in a gated MLP."""
    heads: int


@lru_cache(maxsize=1024)
def layer_widths(model: GPTConfig, tp: int = 1) -> LayerWidths:
    """Widths of a layer of ``model`` at tensor-parallel size ``tp``."""
    # Fewer groups than ranks: megatron-core gives every rank one group, so some hold the same one.
    groups = max(1, (model.num_query_groups or model.num_attention_heads) // tp)
    heads = model.num_attention_heads // tp
    ffn = model.ffn_size // tp
    return LayerWidths(
        hidden=model.hidden_size,
        query=heads * model.head_size,
        key=groups * model.head_size,
        ffn=ffn,
        ffn_up=ffn * (2 if model.gated_linear_unit else 1),
        heads=heads,
    )


@lru_cache(maxsize=1024)
def layer_parameters(model: GPTConfig, tp: int = 1) -> int:
    """Parameters of one layer on one tensor-parallel rank; ``12 h^2 + 13 h`` for GPT-2 at ``tp=1``."""
    w = layer_widths(model, tp)
    qkv_bias = model.add_bias_linear if model.add_qkv_bias is None else model.add_qkv_bias
    qkv = (w.query + 2 * w.key) * (w.hidden + qkv_bias)
    projection = w.query * w.hidden + w.hidden * model.add_bias_linear
    up = w.ffn_up * (w.hidden + model.add_bias_linear)
    down = w.ffn * w.hidden + w.hidden * model.add_bias_linear
    return qkv + projection + up + down + 2 * norm_parameters(model)


def norm_parameters(model: GPTConfig) -> int:
    """Parameters of one normalization: a scale, and for LayerNorm a shift."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


@lru_cache(maxsize=1024)
def embedding_parameters(model: GPTConfig, tp: int = 1) -> int:
    """Token (padded, split) and position (replicated) embeddings on one tensor-parallel rank."""
    positions = model.max_position_embeddings if model.position_embedding_type == "learned_absolute" else 0
    return (model.padded_vocab_size(tp) // tp + positions) * model.hidden_size


def output_parameters(model: GPTConfig, tp: int, *, first_stage: bool) -> int:
    """Parameters of final norm and output projection; a tied projection costs nothing beside its embedding."""
    free = model.share_embeddings_and_output_weights and first_stage
    return norm_parameters(model) + (0 if free else model.padded_vocab_size(tp) // tp * model.hidden_size)


def stage_parameters(model: GPTConfig, layout: ParallelLayout, stage: int) -> int:
    """Parameters on each rank of pipeline stage ``stage``, as Accelerate and Megatron-LM print them at start.

    GPT-2 large at TP=2 x PP=2 has 210,753,280 on stage 0 and 209,445,120 on stage 1.
    """
    tp, last = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size - 1
    count = sum(layers_per_chunk(model.num_layers, layout)[stage]) * layer_parameters(model, tp)
    if stage == 0:
        count += embedding_parameters(model, tp)
    if stage == last:
        count += output_parameters(model, tp, first_stage=stage == 0)
    return count


def model_parameters(model: GPTConfig, *, padded: bool = False) -> int:
    """Parameters of the whole model, by default without the rows that only pad the vocabulary.

    For GPT-2's architecture this is ``12 l h^2 (1 + 13/(12 h) + (V + s)/(12 l h))`` (arXiv:2104.04473, equation 2)
    plus the ``2 h`` of the final LayerNorm, which the paper leaves out.
    """
    vocab = model if padded else model.replace(make_vocab_size_divisible_by=1)
    return stage_parameters(vocab, ParallelLayout(), 0)


@lru_cache(maxsize=4096)
def layers_per_chunk(num_layers: int, layout: ParallelLayout) -> tuple[tuple[int, ...], ...]:
    """Transformer layers of each chunk of each stage: ``result[stage][chunk]``.

    Raises:
        LayoutError: the layers cannot be spread this way.
    """
    pp, chunks = layout.pipeline_model_parallel_size, layout.num_chunks
    if layout.pipeline_model_parallel_layout is not None:
        counts = _parse_stages(layout.pipeline_model_parallel_layout)
        if len(counts) != pp * chunks or sum(counts) != num_layers:
            raise LayoutError(
                f"pipeline_model_parallel_layout={layout.pipeline_model_parallel_layout!r} has {len(counts)} stages "
                f"and {sum(counts)} layers, but the model has {num_layers} layers for {pp} x {chunks} stages."
            )
        # Virtual stages go round the ranks: virtual stage i is chunk i // pp of rank i % pp.
        return tuple(tuple(counts[chunk * pp + stage] for chunk in range(chunks)) for stage in range(pp))
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    middle = pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if rest < 0 or (rest % middle if middle else rest):
        raise LayoutError(
            f"num_layers={num_layers} do not spread evenly over pipeline_model_parallel_size={pp} stages "
            f"(first {first}, last {last}). Set num_layers_in_first_pipeline_stage and "
            "num_layers_in_last_pipeline_stage."
        )
    even = rest // middle if middle else 0
    sizes = [even] * pp
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    for size in sizes:
        if size % chunks:
            raise LayoutError(
                f"A stage of {size} layers is not divisible by virtual_pipeline_model_parallel_size={chunks}."
            )
    return tuple((size // chunks,) * chunks for size in sizes)


def _parse_stages(text: str) -> list[int]:
    """Layers of each virtual stage in megatron-core's notation: ``t`` is a layer and ``|`` the next stage."""
    expanded = text.replace(",", "").replace(" ", "")
    repeated = re.compile(r"(?:\(([^()]*)\)|([A-Za-z|]))\*(\d+)")
    while match := repeated.search(expanded):
        expanded = expanded[: match.start()] + (match[1] or match[2]) * int(match[3]) + expanded[match.end() :]
    return [stage.count("t") for stage in expanded.split("|")]


def balanced_stages(num_layers: int, num_stages: int) -> str | None:
    """A stage layout that counts embedding and loss as a layer each, in megatron-core's notation.

    126 layers over 32 virtual stages give ``"Et*3|(t*4|)*30t*3L"``. ``None`` if that does not come out even either, or
    leaves the first and last stage without a layer.
    """
    size, rest = divmod(num_layers + 2, num_stages)
    if rest or size < 2 or num_stages < 2:
        return None
    middle = f"(t*{size}|)*{num_stages - 2}" if num_stages > 2 else ""
    return f"Et*{size - 1}|{middle}t*{size - 1}L"
