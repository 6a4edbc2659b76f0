"""What one layout costs: memory of every stage, seconds of a step, bytes sent, tokens per second, MFU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.assumptions import assumptions
from lightning_megatron.planner.communication import (
    data_parallel_communication,
    layer_communication,
    pipeline_hop,
)
from lightning_megatron.planner.cost import StageCost, optimizer_seconds, stage_cost
from lightning_megatron.planner.flops import hardware_flops_per_token, model_flops_per_token, utilization
from lightning_megatron.planner.hardware import Cluster
from lightning_megatron.planner.memory import StageMemory, stage_memory
from lightning_megatron.planner.parameters import layers_per_chunk
from lightning_megatron.planner.pipeline import (
    StageTimes,
    Timeline,
    predicted_seconds,
    schedule_name,
    simulate,
    simulated_seconds,
)
from lightning_megatron.planner.settings import NO_RECOMPUTE, Batch, Recompute, Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One way to run a model on a cluster: a layout, and what goes with it."""

    layout: ParallelLayout
    micro_batch_size: int
    num_microbatches: int
    data_parallel_size: int
    use_distributed_optimizer: bool
    recompute: Recompute = NO_RECOMPUTE

    @classmethod
    def of(
        cls,
        layout: ParallelLayout,
        batch: Batch,
        num_gpus: int,
        *,
        micro_batch_size: int,
        use_distributed_optimizer: bool | None = None,
        recompute: Recompute = NO_RECOMPUTE,
    ) -> Execution:
        """Fill in what follows from the batch and the number of GPUs.

        Raises:
            LayoutError: the batch or the GPUs cannot be divided this way.
        """
        data = layout.data_parallel_size(num_gpus)
        return cls(
            layout=layout,
            micro_batch_size=micro_batch_size,
            num_microbatches=layout.check_global_batch(batch.global_batch_size, micro_batch_size, num_gpus),
            data_parallel_size=data,
            use_distributed_optimizer=(
                data * layout.context_parallel_size > 1
                if use_distributed_optimizer is None
                else use_distributed_optimizer
            ),
            recompute=recompute,
        )

    @property
    def optimizer_shards(self) -> int:
        """Ranks over which the optimizer states are spread."""
        return self.data_parallel_size * self.layout.context_parallel_size if self.use_distributed_optimizer else 1

    def __str__(self) -> str:
        parts = [f"{self.layout}", f"dp{self.data_parallel_size}", f"mbs{self.micro_batch_size}"]
        return " ".join(parts) + (f", recompute {self.recompute}" if self.recompute != NO_RECOMPUTE else "")


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step, as the busiest pipeline stage spends them; the parts add up to ``total``."""

    compute: float
    tensor_parallel: float
    context_parallel: float
    bubble: float
    """Waiting for other stages: filling, draining, hops between stages, and stages that are uneven."""
    data_parallel: float
    """Gradient reduction and weight gathering that no computation hides, and the tied embedding's sum."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds per optimizer step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {
            "compute": self.compute,
            "tensor parallel": self.tensor_parallel,
            "context parallel": self.context_parallel,
            "pipeline bubble": self.bubble,
            "data parallel": self.data_parallel,
            "optimizer": self.optimizer,
        }


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank of the first stage sends per optimizer step, by kind of parallelism."""

    tensor: float
    context: float
    pipeline: float
    data: float


@dataclass(frozen=True)
class Estimate:
    """What one execution costs."""

    execution: Execution
    memory: tuple[StageMemory, ...]
    """Of a rank of each pipeline stage."""
    time: StepTime
    traffic: Traffic
    stages: tuple[StageTimes, ...]
    """Seconds of one micro-batch on each stage."""
    hop_seconds: float
    tokens_per_second: float
    """Over the whole cluster."""
    mfu: float
    hfu: float
    host_bound: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    assumptions: tuple[str, ...]

    @property
    def layout(self) -> ParallelLayout:
        """The layout of the execution."""
        return self.execution.layout

    @property
    def peak_memory(self) -> float:
        """Bytes that the fullest rank needs."""
        return max(stage.total for stage in self.memory)

    @property
    def bubble_fraction(self) -> float:
        """Waiting over working in the pipeline, as in the papers' ``(p-1)/m``."""
        return self.time.bubble / (self.time.compute + self.time.tensor_parallel + self.time.context_parallel)

    def timeline(self, num_microbatches: int | None = None) -> Timeline:
        """The simulated schedule, by default of at most four micro-batches a stage, for drawing."""
        pp = self.layout.pipeline_model_parallel_size
        shown = num_microbatches or min(self.execution.num_microbatches, 4 * pp)
        return simulate(schedule_name(self.layout.num_chunks), self.stages, shown, self.hop_seconds)

    def strategy_arguments(self) -> dict[str, Any]:
        """Arguments of ``MegatronStrategy`` that run this, without those at their defaults."""
        defaults = ParallelLayout().as_dict()
        given = {name: value for name, value in self.layout.as_dict().items() if value != defaults[name]}
        return given | {
            "micro_batch_size": self.execution.micro_batch_size,
            "use_distributed_optimizer": self.execution.use_distributed_optimizer,
            "overlap_grad_reduce": self.overlap_grad_reduce,
            "overlap_param_gather": self.overlap_param_gather,
        }

    def model_arguments(self) -> dict[str, Any]:
        """Fields of the model configuration that run this."""
        recompute = self.execution.recompute
        return {
            "recompute_granularity": recompute.granularity,
            "recompute_method": recompute.method,
            "recompute_num_layers": recompute.num_layers,
        }


def stage_costs(
    model: GPTConfig, cluster: Cluster, batch: Batch, execution: Execution, runtime: Runtime
) -> list[StageCost]:
    """Seconds of one micro-batch on each stage; equal stages are computed once."""
    layout = execution.layout
    last = layout.pipeline_model_parallel_size - 1
    known: dict[tuple[tuple[int, ...], bool], StageCost] = {}
    costs = []
    for stage, chunks in enumerate(layers_per_chunk(model.num_layers, layout)):
        key = chunks, stage == last
        if key not in known:
            known[key] = stage_cost(
                model,
                layout,
                cluster,
                batch,
                stage=stage,
                micro_batch_size=execution.micro_batch_size,
                recompute=execution.recompute,
                runtime=runtime,
            )
        costs.append(known[key])
    return costs


def step_time(
    model: GPTConfig,
    cluster: Cluster,
    batch: Batch,
    execution: Execution,
    runtime: Runtime,
    *,
    exact: bool,
) -> tuple[StepTime, list[StageCost], float]:
    """Seconds of a step, the stages' costs, and the seconds of a hop between stages.

    ``exact`` simulates the pipeline; otherwise the closed form stands in.
    """
    layout, m = execution.layout, execution.num_microbatches
    costs = stage_costs(model, cluster, batch, execution, runtime)
    hop = pipeline_hop(model, layout, cluster, batch, execution.micro_batch_size).seconds
    times = [cost.times for cost in costs]
    pipeline = simulated_seconds(times, m, hop)[0] if exact else predicted_seconds(times, m, hop)
    busiest = max(costs, key=lambda cost: cost.times.total)
    busy = busiest.times.total * m
    talk = data_parallel_communication(
        model,
        layout,
        cluster,
        batch,
        stage=0,
        data_parallel_size=execution.data_parallel_size,
        use_distributed_optimizer=execution.use_distributed_optimizer,
        runtime=runtime,
    )
    # Stage 0 ends last: only its own last backward hides its reduction, but for the bucket that is complete last.
    hidden_backward = sum(times[0].backward) if runtime.overlap_grad_reduce else 0.0
    hidden_forward = sum(times[0].forward) if runtime.overlap_param_gather else 0.0
    reduce, gathered = talk.gradients.seconds, talk.weights.seconds
    least = runtime.kernels.data_parallel_exposed
    tensor, context = busiest.tensor_parallel * m, busiest.context_parallel * m
    time = StepTime(
        compute=busy - tensor - context,
        tensor_parallel=tensor,
        context_parallel=context,
        bubble=pipeline - busy,
        data_parallel=max(reduce - hidden_backward, least * reduce)
        + max(gathered - hidden_forward, least * gathered)
        + talk.tied_embedding.seconds,
        optimizer=max(
            optimizer_seconds(
                model,
                layout,
                cluster,
                batch,
                stage=stage,
                shards=execution.optimizer_shards,
                runtime=runtime,
            )
            for stage in {0, layout.pipeline_model_parallel_size - 1}
        ),
    )
    return time, costs, hop


def estimate(
    model: GPTConfig,
    cluster: Cluster,
    batch: Batch,
    execution: Execution,
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    *,
    exact: bool = True,
) -> Estimate:
    """Everything about one execution.

    Args:
        model: Sizes of the Transformer.
        cluster: Where it runs.
        batch: What one optimizer step trains on.
        execution: How it is spread.
        runtime: How the package executes it.
        exact: Simulate the pipeline schedule; ``False`` uses its closed form, for very long pipelines.
    """
    layout = execution.layout
    time, costs, hop = step_time(model, cluster, batch, execution, runtime, exact=exact)
    tokens_per_second = batch.tokens / time.total
    chunks = layers_per_chunk(model.num_layers, layout)
    peak = cluster.accelerator.flops_fp32 if batch.precision == "32-true" else cluster.accelerator.flops
    hardware = hardware_flops_per_token(
        model, batch.seq_length, execution.recompute, tuple(layers for stage in chunks for layers in stage)
    )
    replicated = execution.data_parallel_size * layout.context_parallel_size > 1
    overlap = replicated and runtime.overlap_grad_reduce
    return Estimate(
        execution=execution,
        memory=tuple(
            execution_memory(model, batch, execution, runtime, stage)
            for stage in range(layout.pipeline_model_parallel_size)
        ),
        time=time,
        traffic=_traffic(model, cluster, batch, execution, runtime),
        stages=tuple(cost.times for cost in costs),
        hop_seconds=hop,
        tokens_per_second=tokens_per_second,
        mfu=utilization(model_flops_per_token(model, batch.seq_length), tokens_per_second, cluster.num_gpus, peak),
        hfu=utilization(hardware, tokens_per_second, cluster.num_gpus, peak),
        host_bound=any(cost.host_bound for cost in costs),
        overlap_grad_reduce=overlap,
        # megatron-core gathers weights behind the forward only with its distributed optimizer and the former overlap.
        overlap_param_gather=overlap and execution.use_distributed_optimizer and runtime.overlap_param_gather,
        assumptions=assumptions(cluster, batch, runtime),
    )


def execution_memory(model: GPTConfig, batch: Batch, execution: Execution, runtime: Runtime, stage: int) -> StageMemory:
    """Memory of a rank of ``stage``."""
    return stage_memory(
        model,
        execution.layout,
        batch,
        stage=stage,
        micro_batch_size=execution.micro_batch_size,
        num_microbatches=execution.num_microbatches,
        data_parallel_size=execution.data_parallel_size,
        use_distributed_optimizer=execution.use_distributed_optimizer,
        recompute=execution.recompute,
        runtime=runtime,
    )


def _traffic(model: GPTConfig, cluster: Cluster, batch: Batch, execution: Execution, runtime: Runtime) -> Traffic:
    layout, m = execution.layout, execution.num_microbatches
    layer = layer_communication(model, layout, cluster, batch, execution.micro_batch_size, runtime.kernels)
    chunks = layers_per_chunk(model.num_layers, layout)[0]
    layers = sum(chunks)
    repeated = sum(execution.recompute.recomputed_layers(size) for size in chunks)
    data = data_parallel_communication(
        model,
        layout,
        cluster,
        batch,
        stage=0,
        data_parallel_size=execution.data_parallel_size,
        use_distributed_optimizer=execution.use_distributed_optimizer,
        runtime=runtime,
    )
    # The first stage sends every chunk's output on, and the input gradients of all chunks but its first back.
    hops = (2 * layout.num_chunks - 1) * m
    return Traffic(
        tensor=m * ((layers + repeated) * layer.tensor_forward.bytes + layers * layer.tensor_backward.bytes),
        context=m * ((layers + repeated) * layer.context_forward.bytes + layers * layer.context_backward.bytes),
        pipeline=hops * pipeline_hop(model, layout, cluster, batch, execution.micro_batch_size).bytes,
        data=data.gradients.bytes + data.weights.bytes + data.tied_embedding.bytes,
    )
