"""Communication per optimizer step and rank: bytes sent, and seconds on the cluster's links.

Collectives are rings: an all-reduce of ``n`` bytes over ``k`` ranks sends ``2 n (k-1)/k`` from every rank, a gather or
a scatter half of that (Thakur et al. 2005). Latency is counted per hop of a tree, which NCCL uses when it matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.hardware import Cluster
from lightning_megatron.planner.kernels import Kernels
from lightning_megatron.planner.parameters import layer_widths, stage_parameters
from lightning_megatron.planner.settings import Batch, Runtime


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that one rank sends, and the seconds it takes."""

    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Transfer) -> Transfer:
        return Transfer(self.bytes + other.bytes, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Transfer:
        return Transfer(self.bytes * times, self.seconds * times)


NOTHING = Transfer()


def all_reduce(cluster: Cluster, message: float, *, size: int, stride: int = 1) -> Transfer:
    """An all-reduce of ``message`` bytes over ``size`` ranks that lie ``stride`` apart."""
    return gather(cluster, message, size=size, stride=stride) * 2


def gather(cluster: Cluster, message: float, *, size: int, stride: int = 1) -> Transfer:
    """An all-gather to, or a reduce-scatter from, ``message`` bytes in all."""
    if size == 1:
        return NOTHING
    sent = message * (size - 1) / size
    hops = ceil(log2(size))
    return Transfer(sent, sent / cluster.ring_rate(stride, size) + hops * cluster.latency(stride, size))


@dataclass(frozen=True, slots=True)
class LayerCommunication:
    """What one layer sends for one micro-batch inside its model-parallel groups."""

    tensor_forward: Transfer
    tensor_backward: Transfer
    context_forward: Transfer
    context_backward: Transfer


def layer_communication(
    model: GPTConfig,
    layout: ParallelLayout,
    cluster: Cluster,
    batch: Batch,
    micro_batch_size: int,
    kernels: Kernels,
) -> LayerCommunication:
    """Tensor and context parallelism of one layer (arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2.2).

    Tensor parallelism all-reduces the hidden states twice in the forward and twice in the backward. Sequence
    parallelism replaces each by a reduce-scatter and an all-gather of the same volume; its backward gathers two inputs
    once more, which megatron-core hides behind the gradient of the input. The fused layers of two ranks keep what they
    gathered, and inside a node copy engines take the place of NCCL.
    """
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    tokens = micro_batch_size * batch.seq_length / cp
    hidden = tokens * model.hidden_size * batch.element_bytes
    reduces = all_reduce(cluster, hidden, size=tp) * 2
    fused = kernels.name == "fused"
    again = gather(cluster, hidden, size=tp) * 2 if layout.sequence_parallel and not (fused and tp == 2) else NOTHING
    seconds = reduces.seconds
    if fused and layout.sequence_parallel and 1 < tp <= cluster.gpus_per_node:
        seconds = kernels.sequence_parallel_exposed * reduces.bytes / cluster.intra_node.rate
    # Ring attention passes keys and values round: every rank sends cp - 1 times its own part.
    keys = 2 * tokens * layer_widths(model, tp).key * batch.element_bytes
    ring = gather(cluster, keys * cp, size=cp, stride=tp)
    return LayerCommunication(
        tensor_forward=Transfer(reduces.bytes, seconds),
        tensor_backward=Transfer(reduces.bytes + again.bytes, seconds),
        context_forward=ring,
        context_backward=ring * 2,  # keys and values again, and their gradients
    )


def pipeline_hop(
    model: GPTConfig, layout: ParallelLayout, cluster: Cluster, batch: Batch, micro_batch_size: int
) -> Transfer:
    """Hidden states of one micro-batch to the next stage; with sequence parallelism every rank sends its part."""
    pp = layout.pipeline_model_parallel_size
    if pp == 1:
        return NOTHING
    tokens = micro_batch_size * batch.seq_length / layout.context_parallel_size
    sent = tokens * model.hidden_size * batch.element_bytes
    sent /= layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    stride = cluster.num_gpus // pp  # pipeline ranks are the farthest apart
    return Transfer(sent, sent / cluster.hop_rate(stride, pp) + cluster.latency(stride, pp))


@dataclass(frozen=True, slots=True)
class DataParallelCommunication:
    """What one optimizer step sends between the replicas of a stage."""

    gradients: Transfer
    weights: Transfer
    """The distributed optimizer gathers the updated weights; without it there is nothing to gather."""
    tied_embedding: Transfer
    """First and last stage sum the gradients of their copies of a tied embedding."""


def data_parallel_communication(
    model: GPTConfig,
    layout: ParallelLayout,
    cluster: Cluster,
    batch: Batch,
    *,
    stage: int,
    data_parallel_size: int,
    use_distributed_optimizer: bool,
    runtime: Runtime,
) -> DataParallelCommunication:
    """Gradient reduction and weight gathering of one rank of ``stage``."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    size = data_parallel_size * layout.context_parallel_size  # gradients are summed over context-parallel ranks too
    parameters = stage_parameters(model, layout, stage)
    gradients = parameters * runtime.gradient_bytes(batch)
    weights = parameters * batch.element_bytes
    tied = NOTHING
    if pp > 1 and model.share_embeddings_and_output_weights and stage in (0, pp - 1):
        embedding = model.padded_vocab_size(tp) // tp * model.hidden_size * runtime.gradient_bytes(batch)
        stride = cluster.num_gpus // 2 if cluster.num_gpus > cluster.gpus_per_node else tp
        tied = all_reduce(cluster, embedding, size=2, stride=stride)
    if use_distributed_optimizer:
        return DataParallelCommunication(
            gradients=gather(cluster, gradients, size=size, stride=tp),
            weights=gather(cluster, weights, size=size, stride=tp),
            tied_embedding=tied,
        )
    return DataParallelCommunication(
        gradients=all_reduce(cluster, gradients, size=size, stride=tp), weights=NOTHING, tied_embedding=tied
    )
