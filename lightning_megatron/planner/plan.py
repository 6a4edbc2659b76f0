"""Search for the fastest layout that fits: ``plan(model, cluster, batch)``.

The search visits every combination of tensor, context, pipeline and virtual pipeline sizes and micro-batch that divides
the model, the cluster and the batch. What makes it quick: a layout whose weights alone do not fit is dropped before its
micro-batches are tried; larger micro-batches stop at the first that does not fit; recomputation, which only costs time,
is taken in its cheapest form that fits; and only the best few are simulated, the others are ranked by a closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from lightning_megatron.errors import LayoutError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.estimate import Estimate, Execution, estimate, execution_memory, step_time
from lightning_megatron.planner.hardware import GIB, Cluster
from lightning_megatron.planner.parameters import balanced_stages, layers_per_chunk
from lightning_megatron.planner.settings import Batch, Constraints, Recompute, Runtime

_MAX_MICRO_BATCH = 128
_SIMULATED_STEPS = 40_000  # passes that the simulator may run for one plan, about 0.2 seconds
_MIN_TOKENS_PER_CONTEXT_RANK = 2048  # below, attention no longer hides passing keys and values round


@dataclass(frozen=True)
class Plan:
    """Feasible executions of a model on a cluster, the fastest first."""

    model: GPTConfig
    cluster: Cluster
    batch: Batch
    runtime: Runtime
    constraints: Constraints
    estimates: tuple[Estimate, ...]
    """At least one; ranked by predicted step time."""
    num_considered: int
    """Executions that divide model, cluster and batch."""
    num_too_large: int
    """Those of them that need more memory than a GPU has."""
    assumptions: tuple[str, ...]

    @property
    def best(self) -> Estimate:
        """The fastest."""
        return self.estimates[0]


def plan(
    model: GPTConfig,
    cluster: Cluster,
    batch: Batch,
    *,
    constraints: Constraints = Constraints(),  # noqa: B008  (frozen)
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
    keep: int = 10,
) -> Plan:
    """The fastest layouts of ``model`` on ``cluster`` that fit in memory.

    Args:
        model: Sizes of the Transformer. Its recomputation fields are ignored: the plan chooses them.
        cluster: All of its GPUs are used.
        batch: What one optimizer step trains on.
        constraints: What is already decided.
        runtime: How the package executes the model.
        keep: How many executions to return.

    Raises:
        LayoutError: no layout divides model, cluster and batch, or none fits. The message says what would.
    """
    search = _Search(model, cluster, batch, constraints, runtime)
    search.run()
    if not search.found:
        raise LayoutError(search.explain_failure())
    budget = _SIMULATED_STEPS
    estimates: list[Estimate] = []
    for execution in search.fastest(keep):
        passes = _simulated_passes(execution)
        budget -= passes
        exact = budget >= 0 or not estimates
        estimates.append(estimate(model, cluster, batch, execution, runtime, exact=exact))
    estimates.sort(key=lambda candidate: candidate.time.total)
    return Plan(
        model=model,
        cluster=cluster,
        batch=batch,
        runtime=runtime,
        constraints=constraints,
        estimates=tuple(estimates),
        num_considered=search.num_considered,
        num_too_large=search.num_too_large,
        assumptions=(
            *estimates[0].assumptions,
            "Micro-batches are powers of two; stages are equal, or the first and last one layer shorter.",
        ),
    )


def _simulated_passes(execution: Execution) -> int:
    """Passes that simulating this execution takes; see ``simulated_seconds``."""
    pp, chunks = execution.layout.pipeline_model_parallel_size, execution.layout.num_chunks
    return 2 * pp * chunks * min(execution.num_microbatches, 7 * pp)


def divisors(number: int) -> list[int]:
    """All divisors, in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


class _Search:
    """One walk over the layouts, and what it met."""

    def __init__(
        self, model: GPTConfig, cluster: Cluster, batch: Batch, constraints: Constraints, runtime: Runtime
    ) -> None:
        self.model = model
        self.cluster = cluster
        self.batch = batch
        self.constraints = constraints
        self.runtime = runtime
        self.limit = cluster.accelerator.memory * runtime.memory_fraction
        self.found: list[tuple[float, int, Execution]] = []
        """(seconds, tie-breaker, execution): of equals the simpler layout, visited first, wins."""
        self.num_considered = 0
        self.num_too_large = 0
        self.smallest: tuple[float, Execution] | None = None
        self.data_parallel_sizes: set[int] = set()
        self._visits = count()

    def run(self) -> None:
        for layout in self._layouts():
            data = self.cluster.num_gpus // layout.model_parallel_size
            self.data_parallel_sizes.add(data)
            if self.batch.global_batch_size % data:
                continue
            for execution in self._executions(layout, data):
                self.num_considered += 1
                fitting = self._cheapest_that_fits(execution)
                if fitting is None:
                    self.num_too_large += 1
                    break  # larger micro-batches need more memory still
                time, _, _ = step_time(self.model, self.cluster, self.batch, fitting, self.runtime, exact=False)
                self.found.append((time.total, next(self._visits), fitting))

    def fastest(self, number: int) -> list[Execution]:
        """The best executions; of those that differ in context parallelism alone and gain nothing by it, the least."""
        distinct: dict[tuple[object, ...], Execution] = {}
        for seconds, _, execution in sorted(self.found):
            layout = execution.layout
            sizes = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.num_chunks
            distinct.setdefault((sizes, round(seconds, 6)), execution)
            if len(distinct) == number:
                break
        return list(distinct.values())

    # ---------------------------------------------------------------- layouts

    def _layouts(self) -> Iterator[ParallelLayout]:
        """Layouts that divide the model and the cluster, those that split less first."""
        cluster, constraints = self.cluster, self.constraints
        for tp in divisors(cluster.num_gpus):
            # Tensor parallelism that leaves the node waits for the network in every layer; only on request.
            wanted = constraints.tensor_model_parallel_size
            if not constraints.allows("tensor_model_parallel_size", tp) or (
                wanted is None and tp > cluster.gpus_per_node
            ):
                continue
            for cp in divisors(cluster.num_gpus // tp):
                if not self._context_size_is_sensible(cp):
                    continue
                for pp in divisors(cluster.num_gpus // tp // cp):
                    if pp > self.model.num_layers:
                        break
                    if constraints.allows("pipeline_model_parallel_size", pp):
                        yield from self._layouts_of(tp, cp, pp)

    def _context_size_is_sensible(self, cp: int) -> bool:
        if self.constraints.context_parallel_size is not None:
            return cp == self.constraints.context_parallel_size
        return cp == 1 or (
            self.batch.seq_length % (2 * cp) == 0 and self.batch.seq_length // cp >= _MIN_TOKENS_PER_CONTEXT_RANK
        )

    def _layouts_of(self, tp: int, cp: int, pp: int) -> Iterator[ParallelLayout]:
        layers = self.model.num_layers
        sequence_parallel = self.constraints.sequence_parallel
        if sequence_parallel is None:
            # It saves memory and element-wise work and sends no more, so it is only left out where it cannot be.
            sequence_parallel = tp > 1 and self.batch.seq_length % tp == 0
        for chunks in range(1, layers // pp + 1) if pp > 1 else (1,):
            if not self.constraints.allows("virtual_pipeline_model_parallel_size", chunks):
                continue
            stages = None
            if layers % (pp * chunks):
                stages = balanced_stages(layers, pp * chunks)
                if stages is None:
                    continue
            try:
                layout = ParallelLayout(
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
                    context_parallel_size=cp,
                    sequence_parallel=sequence_parallel,
                    pipeline_model_parallel_layout=stages,
                )
                self._check(layout)
            except LayoutError:
                continue
            yield layout

    def _check(self, layout: ParallelLayout) -> None:
        model = self.model
        layout.check_model(
            num_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            ffn_hidden_size=model.ffn_size,
        )
        layout.check_sequence(self.batch.seq_length)

    # ------------------------------------------------------------- executions

    def _executions(self, layout: ParallelLayout, data: int) -> Iterator[Execution]:
        per_replica = self.batch.global_batch_size // data
        wanted = self.constraints.micro_batch_size
        sizes = [wanted] if wanted else [2**power for power in range(_MAX_MICRO_BATCH.bit_length())]
        distributed = self.constraints.use_distributed_optimizer
        for size in sizes:
            if per_replica % size:
                continue
            microbatches = per_replica // size
            pp = layout.pipeline_model_parallel_size
            if layout.num_chunks > 1 and microbatches % pp:
                continue  # megatron-core interleaves whole rounds of micro-batches
            yield Execution(
                layout=layout,
                micro_batch_size=size,
                num_microbatches=microbatches,
                data_parallel_size=data,
                use_distributed_optimizer=(
                    data * layout.context_parallel_size > 1 if distributed is None else distributed
                ),
            )

    def _cheapest_that_fits(self, execution: Execution) -> Execution | None:
        """The execution with as little recomputation as fits, or ``None``."""
        if self.constraints.recompute is not None:
            execution = replace(execution, recompute=self.constraints.recompute)
            return execution if self._fits(execution) else None
        if self._fits(execution):
            return execution
        if self.runtime.attention != "flash":  # flash attention already recomputes what "selective" would
            selective = replace(execution, recompute=Recompute(granularity="selective"))
            if self._fits(selective):
                return selective
        whole = replace(execution, recompute=Recompute(granularity="full", method="uniform", num_layers=1))
        if not self._fits(whole):
            return None
        # Fewest whole layers per chunk whose recomputation makes it fit: memory falls with every one.
        low, high = 1, max(max(chunks) for chunks in layers_per_chunk(self.model.num_layers, execution.layout))
        while low < high:
            middle = (low + high) // 2
            if self._fits(_with_block(execution, middle)):
                high = middle
            else:
                low = middle + 1
        block = _with_block(execution, low)
        return block if self._fits(block) else whole

    def _fits(self, execution: Execution) -> bool:
        last = execution.layout.pipeline_model_parallel_size - 1
        # The first stage holds the embedding and most micro-batches, the last the logits; between them the second is
        # the fullest, which matters where the first is shorter.
        worst = 0.0
        last_resort = execution.recompute.method == "uniform" or self.constraints.recompute is not None
        for stage in {0, min(1, last), last}:
            worst = max(worst, execution_memory(self.model, self.batch, execution, self.runtime, stage).total)
            if worst > self.limit and not last_resort:
                return False  # a failure names the smallest of those that are left when nothing fits
        if self.smallest is None or worst < self.smallest[0]:
            self.smallest = worst, execution
        return worst <= self.limit

    # ---------------------------------------------------------------- failure

    def explain_failure(self) -> str:
        """Why nothing was found, and what would help."""
        gpus, batch = self.cluster.num_gpus, self.batch
        given = ", ".join(f"{name}={value}" for name, value in self.constraints.given().items())
        asked = f" with {given}" if given else ""
        if not self.data_parallel_sizes:
            return (
                f"No layout{asked} divides gpus={gpus}, num_layers={self.model.num_layers}, num_attention_heads="
                f"{self.model.num_attention_heads} and seq_length={batch.seq_length}. Free a size, or change gpus."
            )
        if self.smallest is None:
            micro = self.constraints.micro_batch_size or 1
            near = {
                nearest
                for data in self.data_parallel_sizes
                for nearest in _multiples_around(batch.global_batch_size, data * micro)
            }
            best = sorted(near, key=lambda size: abs(size - batch.global_batch_size))[:2]
            return (
                f"global_batch_size={batch.global_batch_size} does not divide over any layout{asked} of gpus={gpus}: "
                f"the data-parallel sizes are {', '.join(map(str, sorted(self.data_parallel_sizes)[:12]))}. "
                f"Nearest batch sizes that do: {', '.join(map(str, sorted(best)))}."
            )
        need, execution = self.smallest
        return (
            f"Nothing{asked} fits: the smallest of {self.num_considered} executions, {execution}, needs "
            f"{need / GIB:.1f} GiB per GPU, but {self.cluster.accelerator.name} has {self.limit / GIB:.1f} to fill. "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        """The smallest multiple of the cluster that would be enough."""
        for factor in (2, 4, 8, 16, 32, 64):
            gpus = self.cluster.num_gpus * factor
            larger = _Search(
                self.model,
                replace(self.cluster, num_gpus=gpus, gpus_per_node=max(self.cluster.gpus_per_node, min(8, gpus))),
                replace(self.batch, global_batch_size=self.batch.global_batch_size * factor),
                self.constraints,
                self.runtime,
            )
            larger.run()
            if larger.found:
                return f"gpus={gpus} would be enough, or a GPU with more memory."
        return "Use a GPU with more memory, shorter sequences, or free a size."


def _with_block(execution: Execution, num_layers: int) -> Execution:
    recompute = Recompute(granularity="full", method="block", num_layers=num_layers)
    return replace(execution, recompute=recompute)


def _multiples_around(number: int, step: int) -> tuple[int, ...]:
    below = number // step * step
    return tuple(size for size in (below, below + step) if size > 0)
