"""The layout that ``MegatronStrategy("auto")`` takes: the planner's fastest that fits the devices of the run.

Standard library only, beside the planner's own: what a device is called and how much memory it has is told by the
strategy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_megatron.errors import LayoutError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig, TransformerModelConfig
from lightning_megatron.planner.equivalent import dense_equivalent
from lightning_megatron.planner.estimate import Estimate, Execution, execution_memory
from lightning_megatron.planner.hardware import (
    ACCELERATORS,
    GIB,
    LINKS,
    Accelerator,
    Cluster,
    Link,
    accelerator_of_device,
)
from lightning_megatron.planner.plan import Plan, plan
from lightning_megatron.planner.settings import Batch, Constraints, Precision, Recompute, Runtime

_KEPT = 20
_DEFAULT_BATCH = 512  # sequences, as `lightning-megatron plan` assumes
_CPU_FLOPS = 50e9
"""Of one process, which shares its machine with the others. Only ratios of layouts depend on it."""
_LOOPBACK = Link(name="loopback", bandwidth=2e9, latency=100e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What the processes of a run have."""

    name: str
    """As CUDA calls the device, or ``"cpu"``."""
    memory: float
    """Bytes of one device; on a CPU, of one process's share."""
    count: int
    per_node: int

    def cluster(self) -> tuple[Cluster, str]:
        """The planner's cluster, and a note if a device had to be guessed."""
        if self.name == "cpu":
            cpu = Accelerator(
                name="cpu",
                memory=self.memory,
                flops=_CPU_FLOPS,
                flops_fp32=_CPU_FLOPS,
                memory_bandwidth=5e9,
                intra_node="pcie3",
                inter_node="ethernet_10g",
                attention_efficiency=0.3,
            )
            return self._cluster(cpu, _LOOPBACK, LINKS["ethernet_10g"]), ""
        try:
            accelerator, note = accelerator_of_device(self.name, self.memory), ""
        except ValueError:
            accelerator = replace(ACCELERATORS["a100"], name=self.name, memory=self.memory)
            note = f"{self.name} is unknown and taken for an a100 with its own memory"
        return self._cluster(accelerator, LINKS[accelerator.intra_node], LINKS[accelerator.inter_node]), note

    def _cluster(self, accelerator: Accelerator, inside: Link, between: Link) -> Cluster:
        return Cluster(
            accelerator=accelerator,
            num_gpus=self.count,
            gpus_per_node=self.per_node,
            intra_node=inside,
            inter_node=between,
            nics_per_node=self.per_node,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run trains, as far as it is known before its data is set up."""

    model: TransformerModelConfig
    precision: Precision
    global_batch_size: int | None = None
    """``None`` where the data module does not tell."""
    seq_length: int | None = None
    context_parallel: bool = False
    """Whether the module can split sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen, and one line that says why."""

    layout: ParallelLayout
    micro_batch_size: int
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    reason: str


def choose(work: Work, devices: Devices, given: Constraints) -> Choice:
    """The fastest layout that fits, keeping what is ``given``.

    The model's own recomputation is kept, since it is the module's.

    Raises:
        LayoutError: nothing divides model, batch and devices, or nothing fits; the message says what would.
    """
    model = dense_equivalent(work.model)
    cluster, note = devices.cluster()
    batch = Batch(
        global_batch_size=work.global_batch_size or -(-_DEFAULT_BATCH // devices.count) * devices.count,
        seq_length=work.seq_length or work.model.max_position_embeddings,
        precision=work.precision,
    )
    plain_stages = not isinstance(work.model, GPTConfig) or work.global_batch_size is None
    recompute = Recompute(
        granularity=model.recompute_granularity, method=model.recompute_method, num_layers=model.recompute_num_layers
    )
    constraints = replace(
        given,
        recompute=recompute,
        context_parallel_size=given.context_parallel_size or (None if work.context_parallel else 1),
        # Interleaving needs whole rounds of micro-batches, which a batch of unknown size may not have.
        virtual_pipeline_model_parallel_size=given.virtual_pipeline_model_parallel_size
        or (1 if plain_stages else None),
    )
    runtime = _runtime(devices)
    try:
        found = plan(model, cluster, batch, constraints=constraints, runtime=runtime, keep=_KEPT)
    except LayoutError as error:
        raise LayoutError(f"{error}{_with_recomputation(model, cluster, batch, constraints, runtime)}") from None
    best = next((one for one in found.estimates if not plain_stages or _is_even(one)), None)
    if best is None:
        raise LayoutError(
            f"No layout gives each pipeline stage the same number of the {model.num_layers} layers. Give the sizes."
        )
    return Choice(
        layout=best.layout,
        micro_batch_size=best.execution.micro_batch_size,
        use_distributed_optimizer=best.execution.use_distributed_optimizer,
        overlap_grad_reduce=best.overlap_grad_reduce,
        overlap_param_gather=best.overlap_param_gather,
        reason=_reason(work, found, best, note),
    )


def _is_even(estimate: Estimate) -> bool:
    return estimate.layout.pipeline_model_parallel_layout is None


def _runtime(devices: Devices) -> Runtime:
    if devices.name != "cpu":
        return Runtime()
    return Runtime(
        layers="megatron_core",  # fused layers are made for CUDA
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        host_seconds_per_layer=0.0,
        host_seconds_optimizer_per_layer=0.0,
        communicator_bytes=0.0,
    )


def _with_recomputation(
    model: GPTConfig, cluster: Cluster, batch: Batch, constraints: Constraints, runtime: Runtime
) -> str:
    """What would fit if the model recomputed activations."""
    try:
        best = plan(model, cluster, batch, constraints=replace(constraints, recompute=None), runtime=runtime).best
    except LayoutError:
        return ""
    fields = ", ".join(f"{name}={value!r}" for name, value in best.model_arguments().items() if value is not None)
    return f" Without more of them, {best.layout} fits with the model's {fields}."


def _reason(work: Work, found: Plan, best: Estimate, note: str) -> str:
    cluster, batch, execution = found.cluster, found.batch, best.execution
    accelerator = cluster.accelerator
    parts = [
        f"{best.layout} x dp{execution.data_parallel_size} on {cluster.num_gpus} x {accelerator.name}",
        f"micro-batch {execution.micro_batch_size}",
    ]
    predicted = f"{best.peak_memory / GIB:.1f} of {accelerator.memory / GIB:.1f} GiB"
    if accelerator.name != "cpu":
        predicted += (
            f", {best.time.total * 1e3:,.0f} ms a step, {best.tokens_per_second:,.0f} tokens/s, MFU {best.mfu:.0%}"
        )
    text = f"{', '.join(parts)}; predicted: {predicted}. It is the fastest of {found.num_considered} ways"
    text += f", {found.num_too_large} of which do not fit" if found.num_too_large else ", all of which fit"
    alone = _memory_alone(found)
    if alone > accelerator.memory * found.runtime.memory_fraction:
        text += f" (data parallelism alone needs {alone / GIB:.1f} GiB)"
    others = [one for one in found.estimates if one.layout != best.layout]
    if others:
        text += f"; next {others[0].layout}, {others[0].time.total / best.time.total - 1:+.0%} time"
    text += f". Batch: {batch.global_batch_size} x {batch.seq_length} tokens"
    text += "." if work.global_batch_size else ", assumed, since no data module tells it."
    return text + (f" ({note}.)" if note else "")


def _memory_alone(found: Plan) -> float:
    """Bytes that a device would need without any model parallelism, at micro-batches of one."""
    batch, count = found.batch, found.cluster.num_gpus
    execution = Execution(
        layout=ParallelLayout(),
        micro_batch_size=1,
        num_microbatches=max(1, batch.global_batch_size // count),
        data_parallel_size=count,
        use_distributed_optimizer=count > 1,
        recompute=found.constraints.recompute or Recompute(),
    )
    return execution_memory(found.model, batch, execution, found.runtime, 0).total
