"""Seconds of one layer, one stage and one optimizer step on one GPU: a roofline with every kernel's traffic added.

A matrix product takes its FLOPs at a fraction of the peak, every other kernel its bytes at a fraction of the bandwidth.
Of megatron-core's layers a product takes its bytes too: what tensor cores compute and what tiles load and store overlap
badly at the edges of a kernel, and adding both reproduces that narrow matrices run slower. What is fitted, and to which
measurements, is in :mod:`~lightning_megatron.planner.kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.communication import LayerCommunication, layer_communication
from lightning_megatron.planner.hardware import Accelerator, Cluster
from lightning_megatron.planner.memory import optimizer_bytes_per_parameter
from lightning_megatron.planner.parameters import layer_parameters, layer_widths, layers_per_chunk, stage_parameters
from lightning_megatron.planner.pipeline import StageTimes
from lightning_megatron.planner.settings import Batch, Recompute, Runtime


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds of one layer's kernels on one micro-batch, communication apart."""

    forward: float
    backward: float
    attention_core: float
    """The part of the forward that selective recomputation repeats."""
    weight_fraction: float
    """The part of the backward that computes weight gradients."""


class Roofline:
    """Kernel times on one accelerator in one precision."""

    def __init__(self, accelerator: Accelerator, batch: Batch, runtime: Runtime) -> None:
        self.element_bytes = batch.element_bytes
        peak = accelerator.flops_fp32 if batch.precision == "32-true" else accelerator.flops
        self._flops = peak * runtime.kernels.matmul_efficiency
        self._matmul_traffic = runtime.kernels.matmul_traffic
        self._attention_flops = peak * accelerator.attention_efficiency
        self._bandwidth = accelerator.memory_bandwidth * runtime.bandwidth_efficiency

    def matmul(self, m: float, n: float, k: float, count: float = 1) -> float:
        """``count`` products of ``[m, k]`` and ``[k, n]``."""
        moved = self.element_bytes * (m * k + k * n + m * n) if self._matmul_traffic else 0.0
        return count * (2 * m * n * k / self._flops + moved / self._bandwidth)

    def move(self, num_bytes: float) -> float:
        """A memory-bound kernel that reads and writes ``num_bytes``."""
        return num_bytes / self._bandwidth

    def attention(self, flops: float) -> float:
        """A flash-attention kernel of ``flops``."""
        return flops / self._attention_flops


@lru_cache(maxsize=8192)
def layer_seconds(
    model: GPTConfig,
    layout: ParallelLayout,
    accelerator: Accelerator,
    batch: Batch,
    *,
    micro_batch_size: int,
    runtime: Runtime,
) -> LayerSeconds:
    """Kernel time of one layer on one micro-batch."""
    roof = Roofline(accelerator, batch, runtime)
    tp = layout.tensor_model_parallel_size
    w = layer_widths(model, tp)
    tokens = micro_batch_size * batch.seq_length / layout.context_parallel_size
    products = (
        (w.query + 2 * w.key, w.hidden),
        (w.hidden, w.query),
        (w.ffn_up, w.hidden),
        (w.hidden, w.ffn),
    )
    matmuls = sum(roof.matmul(tokens, n, k) for n, k in products)
    weight_gradients = sum(roof.matmul(n, k, tokens) for n, k in products)
    input_gradients = sum(roof.matmul(tokens, k, n) for n, k in products)
    core_forward, core_backward = _attention_core(
        model, layout, batch, roof, micro_batch_size=micro_batch_size, runtime=runtime
    )
    elementwise = _fused_elementwise if runtime.kernels.name == "fused" else _elementwise
    moved_forward, moved_backward, accumulated = elementwise(model, layout, roof, runtime.gradient_bytes(batch))
    fixed = runtime.kernels.device_seconds_per_layer / 3
    accumulate = roof.move(accumulated)
    backward = weight_gradients + input_gradients + core_backward + roof.move(tokens * moved_backward) + accumulate
    return LayerSeconds(
        forward=matmuls + core_forward + roof.move(tokens * moved_forward) + fixed,
        backward=backward + 2 * fixed,
        attention_core=core_forward,
        weight_fraction=(weight_gradients + accumulate) / (backward + 2 * fixed),
    )


def _elementwise(
    model: GPTConfig, layout: ParallelLayout, roof: Roofline, gradient_bytes: int
) -> tuple[float, float, float]:
    """Bytes that megatron-core's kernels beside products move: per token forward and backward, and per micro-batch.

    Norms (read, write), bias + dropout + residual (two reads, a write), both twice and split by sequence parallelism;
    the nonlinearity reads its input and writes its output; rotary embeddings rewrite queries and keys. Every
    micro-batch's weight gradients are added to the accumulated ones: read one, read and write the other.
    """
    tp, e = layout.tensor_model_parallel_size, roof.element_bytes
    w = layer_widths(model, tp)
    sharded = tp if layout.sequence_parallel else 1
    rope = 4 * (w.query + w.key) if model.position_embedding_type == "rope" else 0
    forward = e * (10 * w.hidden / sharded + w.ffn_up + w.ffn + rope / 2)
    return forward, 2 * forward, layer_parameters(model, tp) * (e + 2 * gradient_bytes)


def _fused_elementwise(
    model: GPTConfig, layout: ParallelLayout, roof: Roofline, gradient_bytes: int
) -> tuple[float, float, float]:
    """The same of the fused layers, which have one kernel between two products.

    Forward: norm (read, write), heads with rotary embeddings (read, write), residual and norm (two reads, two writes),
    nonlinearity, residual (two reads, a write). Backward: the column sums of the output's gradient, the nonlinearity,
    heads, and twice a norm that reads three rows, and writes two. Weight gradients are accumulated inside the products.
    """
    tp, e = layout.tensor_model_parallel_size, roof.element_bytes
    w = layer_widths(model, tp)
    sharded = tp if layout.sequence_parallel else 1
    heads = 2 * (w.query + 2 * w.key)
    forward = e * (9 * w.hidden / sharded + heads + w.ffn_up + w.ffn)
    backward = e * (11 * w.hidden / sharded + heads + w.ffn + 2 * w.ffn_up)
    return forward, backward, 0.0


def _attention_core(
    model: GPTConfig,
    layout: ParallelLayout,
    batch: Batch,
    roof: Roofline,
    *,
    micro_batch_size: int,
    runtime: Runtime,
) -> tuple[float, float]:
    """Seconds of scores, softmax and values, forward and backward."""
    w = layer_widths(model, layout.tensor_model_parallel_size)
    queries = batch.seq_length / layout.context_parallel_size
    keys = batch.seq_length
    e = roof.element_bytes
    if runtime.attention == "flash":
        # Causal: half the square. The backward recomputes the scores: 5 products for the forward's 2.
        flops = 2 * micro_batch_size * queries * keys * w.query
        # A transposed copy of the output, which the fused layers do without.
        copied = 0.0 if runtime.kernels.name == "fused" else 2 * e * micro_batch_size * queries * w.query
        copy = roof.move(copied)
        return roof.attention(flops) + copy, roof.attention(2.5 * flops) + copy
    batches = micro_batch_size * w.heads
    products = roof.matmul(queries, keys, model.head_size, batches) + roof.matmul(
        queries, model.head_size, keys, batches
    )
    # The fused kernel reads scores and writes probabilities; torch's masks, casts and normalizes in 32 bits, apart.
    passes = 2 * e if runtime.attention == "fused_softmax" else 24
    passes += 2 * e + 1 if model.attention_dropout > 0 else 0
    softmax = roof.move(batches * queries * keys * passes)
    return products + softmax, 2 * (products + softmax)


@dataclass(frozen=True, slots=True)
class StageCost:
    """Seconds of one micro-batch on one stage, over all its chunks."""

    times: StageTimes
    tensor_parallel: float
    """Part of ``times`` that is tensor-parallel communication."""
    context_parallel: float
    """Part of ``times`` that is context-parallel communication not hidden by attention."""
    host_bound: bool
    """The host's launches take longer than the kernels, so that they set the time."""


def stage_cost(
    model: GPTConfig,
    layout: ParallelLayout,
    cluster: Cluster,
    batch: Batch,
    *,
    stage: int,
    micro_batch_size: int,
    recompute: Recompute,
    runtime: Runtime,
) -> StageCost:
    """Forward and backward of one micro-batch through every chunk of ``stage``, communication included."""
    layer = layer_seconds(model, layout, cluster.accelerator, batch, micro_batch_size=micro_batch_size, runtime=runtime)
    kernels = runtime.kernels
    talk = layer_communication(model, layout, cluster, batch, micro_batch_size, kernels)
    context = _exposed_context(layer, talk, hidden=kernels.context_parallel_hidden)
    forward_layer = layer.forward + talk.tensor_forward.seconds + context[0]
    backward_layer = layer.backward + talk.tensor_backward.seconds + context[1]
    if recompute.granularity == "selective":
        backward_layer += layer.attention_core
    last = layout.pipeline_model_parallel_size - 1
    output = _output_seconds(
        model, layout, cluster.accelerator, batch, micro_batch_size=micro_batch_size, runtime=runtime
    )
    chunks = layers_per_chunk(model.num_layers, layout)[stage]
    passing = kernels.seconds_per_pass if last else 0.0
    forward, backward = [], []
    communication = exposed = host_excess = 0.0
    for chunk, layers in enumerate(chunks):
        repeated = recompute.recomputed_layers(layers)
        on_gpu_forward = passing + layers * forward_layer
        on_gpu_backward = passing + layers * backward_layer + repeated * forward_layer
        if stage == last and chunk == len(chunks) - 1:
            on_gpu_forward += output[0]
            on_gpu_backward += output[1]
        # A forward launches a third of what forward and backward do; recomputing launches it again.
        host = kernels.host_seconds_per_layer / 3
        seconds = max(on_gpu_forward, layers * host), max(on_gpu_backward, (2 * layers + repeated) * host)
        host_excess += sum(seconds) - on_gpu_forward - on_gpu_backward
        forward.append(seconds[0])
        backward.append(seconds[1])
        communication += (layers + repeated) * talk.tensor_forward.seconds + layers * talk.tensor_backward.seconds
        exposed += (layers + repeated) * context[0] + layers * context[1]
    times = StageTimes(forward=tuple(forward), backward=tuple(backward), weight_fraction=layer.weight_fraction)
    return StageCost(times, communication, exposed, host_bound=host_excess > 0.05 * times.total)


def _exposed_context(layer: LayerSeconds, talk: LayerCommunication, *, hidden: bool) -> tuple[float, float]:
    """Ring attention overlaps passing keys and values with attention on those it has; only the excess shows."""
    if not hidden:
        return talk.context_forward.seconds, talk.context_backward.seconds
    return (
        max(0.0, talk.context_forward.seconds - layer.attention_core),
        max(0.0, talk.context_backward.seconds - 2.5 * layer.attention_core),
    )


@lru_cache(maxsize=8192)
def _output_seconds(
    model: GPTConfig,
    layout: ParallelLayout,
    accelerator: Accelerator,
    batch: Batch,
    *,
    micro_batch_size: int,
    runtime: Runtime,
) -> tuple[float, float]:
    """Output projection and vocabulary-parallel cross entropy, forward and backward."""
    roof = Roofline(accelerator, batch, runtime)
    tp = layout.tensor_model_parallel_size
    tokens = micro_batch_size * batch.seq_length / layout.context_parallel_size
    vocab = model.padded_vocab_size(tp) / tp
    hidden = model.hidden_size
    if runtime.kernels.name == "fused":
        # Once over the logits for maximum and sum, once more to write the gradient in their place.
        passes_forward, passes_backward = tokens * vocab * 3 * batch.element_bytes, tokens * vocab * 4
    else:
        # The loss casts to 32 bits and goes over the logits for maximum, exponential, sum and quotient; its backward
        # rescales the softmax in place and casts it.
        passes_forward, passes_backward = tokens * vocab * 28, tokens * vocab * 14
    forward = roof.matmul(tokens, vocab, hidden) + roof.move(passes_forward)
    backward = roof.matmul(vocab, hidden, tokens) + roof.matmul(tokens, hidden, vocab) + roof.move(passes_backward)
    return forward, backward


def optimizer_seconds(
    model: GPTConfig,
    layout: ParallelLayout,
    cluster: Cluster,
    batch: Batch,
    *,
    stage: int,
    shards: int,
    runtime: Runtime,
) -> float:
    """Seconds of Adam's update and of the gradient norm on one rank, whose states are one of ``shards`` parts.

    The update reads gradient, master and two moments and writes master, moments and the weight: 30 bytes per parameter
    with 32-bit gradients. Clipping reads the gradient for its norm, then reads and rescales it; the fused optimizer
    rescales as it updates. The next step begins with gradients set to zero.
    """
    kernels = runtime.kernels
    gradient = runtime.gradient_bytes(batch)
    # Read and written once each, the 32-bit weights among them; 16-bit weights are written on top.
    states = 2 * optimizer_bytes_per_parameter(batch, distributed=shards > 1)
    per_parameter = states + (2 if batch.precision == "32-true" else 1) * batch.element_bytes
    per_parameter += (2 if kernels.name == "fused" else 4) * gradient
    local = stage_parameters(model, layout, stage)
    zeroed = local * gradient if kernels.name == "fused" else 0
    bandwidth = cluster.accelerator.memory_bandwidth * runtime.bandwidth_efficiency
    moved = (local / shards * per_parameter + zeroed) / bandwidth
    layers = sum(layers_per_chunk(model.num_layers, layout)[stage])
    return max(moved, layers * kernels.host_seconds_optimizer_per_layer)
