"""What the planner takes for granted, in sentences, so that nobody takes its numbers for more than they are."""

from __future__ import annotations

from lightning_megatron.planner.hardware import GIB, Cluster
from lightning_megatron.planner.kernels import LayerKernels
from lightning_megatron.planner.settings import Batch, Runtime

MEMORY = (
    "Activations are those of arXiv:2205.05198, item by item. Fused layers compute the outputs of norms again; with "
    "tensor parallelism they keep them. Flash attention of megatron-core's layers stores its output once more.",
    "Logits take 2 bytes each in fused layers, 8 in others: the logits, their 32-bit softmax and the gradient.",
    "The peak is the larger of the last backward with everything in flight and of the optimizer step.",
)
PIPELINE = (
    "A stage runs one pass at a time; a hop delays the next stage, and costs the sender nothing.",
    "Every micro-batch takes the same time.",
)
_LAYERS: dict[LayerKernels, str] = {
    "fused": "Layers are this package's, in CUDA graphs; their times are fitted to one H100 and one and two H200.",
    "megatron_core": "Layers are megatron-core's, run eagerly, and nothing hides their tensor-parallel communication.",
}


def assumptions(cluster: Cluster, batch: Batch, runtime: Runtime) -> tuple[str, ...]:
    """What every estimate on this cluster takes for granted, one sentence each."""
    gpu, kernels = cluster.accelerator, runtime.kernels
    hidden = [
        name
        for name, on in (
            ("Gradient reduction", runtime.overlap_grad_reduce),
            ("weight gathering", runtime.overlap_param_gather),
        )
        if on
    ]
    return (
        f"{gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s dense in 16 bits, {gpu.memory_bandwidth / 1e12:.2f} TB/s, "
        f"{gpu.memory / GIB:.1f} GiB, of which a plan may fill {runtime.memory_fraction:.0%}.",
        f"Links: {cluster.intra_node.name} at {cluster.intra_node.rate / 1e9:.0f} GB/s inside a node of "
        f"{cluster.gpus_per_node}, {cluster.nics_per_node} x {cluster.inter_node.name} at "
        f"{cluster.inter_node.rate / 1e9:.0f} GB/s between nodes, without congestion.",
        "No stragglers, and no clocks that fall under load.",
        f"Matrix products reach {kernels.matmul_efficiency:.1%} of the peak and other kernels "
        f"{runtime.bandwidth_efficiency:.0%} of the bandwidth; attention is {runtime.attention}.",
        _LAYERS[kernels.name],
        f"The host needs {kernels.host_seconds_per_layer * 1e3:.1f} ms per layer and micro-batch to launch kernels.",
        f"Gradients are {runtime.gradient_bytes(batch)} bytes each. {' and '.join(hidden) or 'No communication'} "
        f"overlap with computation, and cost {kernels.data_parallel_exposed:.0%} of their time all the same.",
        f"{runtime.context_bytes / GIB:.2f} GiB for the CUDA context, {runtime.communicator_bytes / GIB:.2f} GiB per "
        f"NCCL communicator, {runtime.fragmentation:.0%} fragmentation.",
    )
