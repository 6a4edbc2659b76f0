"""Memory per rank, by part.

Activations follow Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(arXiv:2205.05198), item by item, so that grouped-query attention, gated MLPs, missing dropout and flash attention
change the items they touch and nothing else. All numbers are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.assumptions import MEMORY
from lightning_megatron.planner.kernels import LayerKernels
from lightning_megatron.planner.parameters import layer_widths, layers_per_chunk, stage_parameters
from lightning_megatron.planner.pipeline import chunks_in_flight
from lightning_megatron.planner.settings import NO_RECOMPUTE, AttentionKernel, Batch, Recompute, Runtime

_COMMUNICATORS = 3
"""Groups used in any layout, even of one rank: all ranks, those of the gradients, and those of the model."""


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes that one layer keeps of one micro-batch for its backward, on one rank."""

    input: float
    """The layer's input: all that full recomputation keeps."""
    linear: float
    """Everything else but attention's core."""
    attention_core: float
    """Scores, probabilities and their dropout: what selective recomputation drops."""
    gathered: float = 0.0
    """Outputs of the fused layers' norms under tensor parallelism, which full recomputation keeps too."""

    @property
    def stored(self) -> float:
        """Without recomputation."""
        return self.input + self.linear + self.attention_core + self.gathered


@lru_cache(maxsize=8192)
def layer_activations(
    model: GPTConfig,
    layout: ParallelLayout,
    *,
    micro_batch_size: int,
    seq_length: int,
    attention: AttentionKernel = "flash",
    element_bytes: int = 2,
    layers: LayerKernels = "megatron_core",
) -> LayerActivations:
    """Activations of one layer (arXiv:2205.05198, sections 4.1 to 4.3).

    With ``attention="fused_softmax"``, 16 bits and dropout this is the paper's ``s b h (34 + 5 a s/h)``, with tensor
    parallelism ``s b h (10 + 24/t + 5 a s/(h t))``, and with sequence parallelism all of it over ``t``. The fused
    layers keep ``28 s b h`` of GPT-2.
    """
    tp = layout.tensor_model_parallel_size
    w = layer_widths(model, tp)
    tokens = micro_batch_size * seq_length / layout.context_parallel_size
    sharded = tp if layout.sequence_parallel else 1
    e = element_bytes
    h = w.hidden
    # Query, key, value and attention's output; the MLP's inner activations before and after its nonlinearity.
    split = tokens * e * (2 * w.query + 2 * w.key + w.ffn_up + w.ffn)
    if layers == "fused":
        # The second norm's input; dropout draws its mask again. Two ranks keep what they gathered, more gather again.
        norm_outputs = 0.0 if tp == 1 else 2 * tokens * e * h / (sharded if tp > 2 else 1)
        cp = layout.context_parallel_size
        whole_sequence = 2 * tokens * cp * e * w.key if cp > 1 else 0.0  # keys and values of all context ranks
        return LayerActivations(
            input=tokens * e * h / sharded,
            linear=tokens * e * h / sharded + split + whole_sequence,
            attention_core=tokens * w.heads * 4,
            gathered=norm_outputs,
        )
    mask = 1 if model.hidden_dropout > 0 else 0  # dropout keeps one byte per element
    # Inputs of the two norms and of the two column-parallel matrices, and the two dropout masks: replicated over the
    # tensor-parallel ranks unless sequence parallelism splits them.
    layer_input = tokens * e * h / sharded
    replicated = tokens * (3 * e + 2 * mask) * h / sharded
    return LayerActivations(
        input=layer_input,
        linear=replicated + split,
        attention_core=tokens
        * w.heads
        * _core_bytes_per_token_and_head(model, attention, seq_length / layout.context_parallel_size, e),
    )


def _core_bytes_per_token_and_head(model: GPTConfig, attention: AttentionKernel, keys: float, e: int) -> float:
    if attention == "flash":
        # The kernel keeps its output in its own layout, of which the projection's input is a transposed copy, and the
        # log-sum-exp.
        return e * model.head_size + 4
    dropped = e + 1 if model.attention_dropout > 0 else 0  # dropout's output, and its mask
    softmax = e if attention == "fused_softmax" or e == 4 else 4 + e * (dropped == 0)
    # In 32 bits torch's softmax keeps its own output; the 16-bit copy is kept too where it, not dropout's output, is
    # what the product with the values reads.
    return (softmax + dropped) * keys


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Peak memory of one rank of one pipeline stage, in bytes by part."""

    stage: int
    parameters: int
    """Parameters on the rank (a count, not bytes)."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept by the layers for their backward, over all micro-batches in flight, with embedding and final norm."""
    logits: float
    """Logits, their softmax and their gradient for one micro-batch, on the last stage."""
    optimizer_step: float
    """Temporaries of the optimizer step; activations are gone by then, so only the larger of the two counts."""
    overhead: float
    """CUDA context, NCCL buffers, and what the caching allocator loses."""

    @property
    def static(self) -> float:
        """Weights, gradients and optimizer states."""
        return self.weights + self.gradients + self.optimizer

    @property
    def allocated(self) -> float:
        """What ``torch.cuda.max_memory_allocated()`` should say."""
        return self.static + max(self.activations + self.logits, self.optimizer_step)

    @property
    def total(self) -> float:
        """What the device must have."""
        return self.allocated + self.overhead

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What these numbers take for granted."""
        return MEMORY

    def parts(self) -> dict[str, float]:
        """Bytes by part, in the order of a stacked bar; they add up to ``total``."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
            "optimizer step": max(0.0, self.optimizer_step - self.activations - self.logits),
            "overhead": self.overhead,
        }


def optimizer_bytes_per_parameter(batch: Batch, *, distributed: bool) -> int:
    """Adam's states: two moments in 32 bits and, where the weights are not, a 32-bit master copy.

    ``bf16-true`` keeps the two moments in bf16 beside the weights, without a master copy; megatron-core's distributed
    optimizer keeps master copies all the same.
    """
    if batch.precision == "32-true":
        return 8
    return 4 if batch.precision == "bf16-true" and not distributed else 12


def stage_memory(
    model: GPTConfig,
    layout: ParallelLayout,
    batch: Batch,
    *,
    stage: int,
    micro_batch_size: int,
    num_microbatches: int,
    data_parallel_size: int,
    use_distributed_optimizer: bool = True,
    recompute: Recompute = NO_RECOMPUTE,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
) -> StageMemory:
    """Peak memory of the ranks of pipeline stage ``stage``.

    With the distributed optimizer the states are spread over the data- and context-parallel ranks (ZeRO stage 1,
    arXiv:1910.02054): with 32-bit gradients ``6 + 12/d`` bytes per parameter instead of 18.
    """
    parameters = stage_parameters(model, layout, stage)
    shards = data_parallel_size * layout.context_parallel_size if use_distributed_optimizer else 1
    gradient = runtime.gradient_bytes(batch)
    # With 16-bit gradients and a master copy the optimizer makes 32-bit copies of the gradients that it reads.
    states = optimizer_bytes_per_parameter(batch, distributed=use_distributed_optimizer)
    copies = 4 if gradient == 2 and states == 12 else 0
    activations = _stage_activations(
        model,
        layout,
        batch,
        stage=stage,
        micro_batch_size=micro_batch_size,
        num_microbatches=num_microbatches,
        recompute=recompute,
        runtime=runtime,
    )
    last = layout.pipeline_model_parallel_size - 1
    logits = 0.0
    if stage == last:
        logits = logits_bytes(model, layout, batch, micro_batch_size, layers=runtime.kernels.name)
    groups = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size)
    communicators = _COMMUNICATORS + sum(size > 1 for size in groups)
    memory = StageMemory(
        stage=stage,
        parameters=parameters,
        weights=parameters * batch.element_bytes,
        gradients=parameters * gradient,
        optimizer=parameters * states / shards,
        activations=activations,
        logits=logits,
        optimizer_step=parameters * copies / shards,
        overhead=0.0,
    )
    overhead = (
        runtime.context_bytes + runtime.communicator_bytes * communicators + runtime.fragmentation * memory.allocated
    )
    return replace(memory, overhead=overhead)


def logits_bytes(
    model: GPTConfig,
    layout: ParallelLayout,
    batch: Batch,
    micro_batch_size: int,
    *,
    layers: LayerKernels = "megatron_core",
) -> float:
    """Bytes of logits at the peak, when their gradient is made.

    The fused loss writes the gradient in their place. In that of megatron-core the projection's logits stay alive,
    the 32-bit softmax is kept for the backward (and becomes the gradient in place), and the gradient is cast for the
    projection: 8 bytes per logit in 16 bits.
    """
    tp = layout.tensor_model_parallel_size
    tokens = micro_batch_size * batch.seq_length / layout.context_parallel_size
    each = batch.element_bytes if layers == "fused" else 2 * batch.element_bytes + 4
    return tokens * model.padded_vocab_size(tp) / tp * each


def _stage_activations(
    model: GPTConfig,
    layout: ParallelLayout,
    batch: Batch,
    *,
    stage: int,
    micro_batch_size: int,
    num_microbatches: int,
    recompute: Recompute,
    runtime: Runtime,
) -> float:
    pp = layout.pipeline_model_parallel_size
    layer = layer_activations(
        model,
        layout,
        micro_batch_size=micro_batch_size,
        seq_length=batch.seq_length,
        attention=runtime.attention,
        element_bytes=batch.element_bytes,
        layers=runtime.kernels.name,
    )
    chunks = layers_per_chunk(model.num_layers, layout)[stage]
    in_flight = chunks_in_flight(pp, layout.num_chunks, num_microbatches, stage)
    # Chunks of one stage are equally long but in an explicit layout; the longest is the safe one there.
    kept, working = chunk_activations(layer, max(chunks), recompute)
    total = in_flight * kept + working
    tp = layout.tensor_model_parallel_size
    tokens = micro_batch_size * batch.seq_length / layout.context_parallel_size
    row = tokens * model.hidden_size / (tp if layout.sequence_parallel else 1)
    if stage == 0 and model.hidden_dropout > 0:
        total += row * ceil(in_flight / layout.num_chunks)  # the embedding's dropout mask
    if stage == pp - 1:
        total += 2 * row * batch.element_bytes  # inputs of the final norm and of the output projection
    return total


def chunk_activations(layer: LayerActivations, layers: int, recompute: Recompute = NO_RECOMPUTE) -> tuple[float, float]:
    """Bytes kept per chunk and micro-batch in flight, and bytes that exist once while a backward recomputes.

    Full recomputation keeps inputs: of every group of ``num_layers`` layers (``uniform``, the group being recomputed
    whole), or of the first ``num_layers`` layers, the others keeping everything (``block``).
    """
    if layers == 0:
        return 0.0, 0.0
    if recompute.granularity is None:
        return layers * layer.stored, 0.0
    if recompute.granularity == "selective":
        return layers * (layer.stored - layer.attention_core), layer.attention_core
    count = min(recompute.num_layers or 1, layers)
    if recompute.method == "uniform":
        kept = ceil(layers / count) * layer.input + layers * layer.gathered
        return kept, count * (layer.stored - layer.gathered)
    return count * (layer.input + layer.gathered) + (layers - count) * layer.stored, layer.stored - layer.gathered
