"""What ``lightning-megatron plan`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lightning_megatron.models.config import BertConfig, T5Config
from lightning_megatron.planner import GIB, PRESETS, Estimate, Plan, Recompute, StageMemory, StageTimes, estimate
from lightning_megatron.planner.parameters import layers_per_chunk, model_parameters
from lightning_megatron.planner.pipeline import ScheduleName, simulated_seconds
from lightning_megatron.planner.request import Request

_MAX_STAGES_SHOWN = 8
_PLAIN_WIDTH = 130  # columns where there is no terminal, as in a log


def print_plan(request: Request, result: Plan) -> None:
    """Print tables of the layouts, and of memory and time of the best, then the command that trains so."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    cluster, batch, best = request.cluster, request.batch, result.best
    console.print(
        f"[bold]{request.model_name}[/bold]: {model_parameters(request.model):,} parameters on {cluster.num_gpus} x "
        f"{cluster.accelerator.name} ({cluster.num_nodes} nodes of {cluster.gpus_per_node}); global batch "
        f"{batch.global_batch_size} x {batch.seq_length} tokens, {batch.precision}"
    )
    console.print(
        f"{result.num_considered} ways considered, {result.num_too_large} too large for "
        f"{cluster.accelerator.memory / GIB:.1f} GiB. Best: [bold green]{best.execution}[/bold green], "
        f"{_seconds(best.time.total)} per step, {best.tokens_per_second:,.0f} tokens/s, MFU {best.mfu:.1%}\n"
    )
    for table in (_ranking(result), _memory_table(request, best), _choices_table(result), _time_table(best)):
        console.print(table.fitting(console))
    if best.layout.pipeline_model_parallel_size > 1:
        console.print(_schedules(best))
    if best.host_bound:
        console.print(
            "[yellow]The host is slower than the GPU here: larger micro-batches, fewer stages or CUDA graphs "
            "(host_ms_per_layer=0) help.[/yellow]"
        )
    console.print("\nTo train so:")
    console.print(f"  {training_command(request, best)}\n", soft_wrap=True)
    _print_assumptions(console, result.assumptions)


class _Table:
    """A table that leaves out whole columns where a terminal is narrow, rather than parts of numbers.

    Args:
        title: above it.
        columns: their names, in order.
        spare: those that may be missing, the first to go first.
        left: how many columns hold words, which are aligned to the left.
    """

    def __init__(self, title: str, *columns: str, spare: tuple[str, ...] = (), left: int = 1) -> None:
        self._title, self._columns, self._spare, self._left = title, columns, spare, left
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        self._rows.append(cells)

    def fitting(self, console: Console) -> Table:
        """With as many columns as the console has room for."""
        for count in range(len(self._spare) + 1):
            table = self._without(self._spare[:count])
            if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
                break
        return table

    def _without(self, missing: tuple[str, ...]) -> Table:
        table = Table(title=self._title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        kept = [number for number, column in enumerate(self._columns) if column not in missing]
        for number in kept:
            table.add_column(self._columns[number], justify="left" if number < self._left else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*(row[number] for number in kept))
        return table


def _ranking(result: Plan) -> _Table:
    table = _Table(
        "Layouts, fastest first",
        *("layout", "recompute", "DP", "micro-batch", "GiB/GPU", "bubble", "step", "tokens/s", "MFU", "HFU"),
        spare=("HFU", "bubble", "DP", "tokens/s", "recompute"),
        left=2,
    )
    for candidate in result.estimates:
        execution = candidate.execution
        table.add_row(
            str(candidate.layout),
            str(execution.recompute),
            str(execution.data_parallel_size),
            f"{execution.micro_batch_size} x {execution.num_microbatches}",
            f"{candidate.peak_memory / GIB:.1f}",
            f"{candidate.bubble_fraction:.1%}",
            _seconds(candidate.time.total),
            f"{candidate.tokens_per_second:,.0f}",
            f"{candidate.mfu:.1%}",
            f"{candidate.hfu:.1%}",
        )
    return table


def _memory_table(request: Request, best: Estimate) -> _Table:
    parts = [part for part in best.memory[0].parts() if any(stage.parts()[part] for stage in best.memory)]
    table = _Table(
        f"Memory per rank of {best.layout}, GiB",
        *("stage", "layers", "parameters", *parts, "total"),
        spare=("layers", "logits", "optimizer step", "parameters", "overhead", "optimizer", "gradients"),
    )
    layers = layers_per_chunk(request.model.num_layers, best.layout)
    for stage in _shown(best.memory):
        if stage is None:
            table.add_row("...", *[""] * (len(parts) + 3))
            continue
        table.add_row(
            str(stage.stage),
            str(sum(layers[stage.stage])),
            f"{stage.parameters:,}",
            *(f"{stage.parts()[part] / GIB:.2f}" for part in parts),
            f"{stage.total / GIB:.2f}",
        )
    return table


def _shown(stages: tuple[StageMemory, ...]) -> Iterable[StageMemory | None]:
    if len(stages) <= _MAX_STAGES_SHOWN:
        return stages
    return (*stages[: _MAX_STAGES_SHOWN - 2], None, stages[-1])


def _choices_table(result: Plan) -> _Table:
    """The best layout with each kind of recomputation, with and without the distributed optimizer."""
    table = _Table("The same layout otherwise", "recompute", "distributed optimizer", "GiB/GPU", "step", left=1)
    execution = result.best.execution
    kinds = (
        Recompute(),
        Recompute(granularity="selective"),
        Recompute(granularity="full", method="uniform", num_layers=1),
    )
    limit = result.cluster.accelerator.memory * result.runtime.memory_fraction
    for recompute in kinds:
        for distributed in (True, False) if execution.data_parallel_size > 1 else (False,):
            other = replace(execution, recompute=recompute, use_distributed_optimizer=distributed)
            costs = estimate(result.model, result.cluster, result.batch, other, result.runtime, exact=False)
            table.add_row(
                str(recompute),
                "yes" if distributed else "no",
                f"{costs.peak_memory / GIB:.1f}" + ("" if costs.peak_memory <= limit else " (does not fit)"),
                _seconds(costs.time.total),
            )
    return table


def _time_table(best: Estimate) -> _Table:
    table = _Table("Where a step goes", "part", "time", "share", "sent per rank")
    sent = {
        "tensor parallel": best.traffic.tensor,
        "context parallel": best.traffic.context,
        "pipeline bubble": best.traffic.pipeline,
        "data parallel": best.traffic.data,
    }
    for part, seconds in best.time.parts().items():
        size = sent.get(part, 0.0)
        if seconds or size:
            table.add_row(
                part, _seconds(seconds), f"{seconds / best.time.total:.1%}", f"{size / 1e9:.2f} GB" if size else ""
            )
    return table


def _schedules(best: Estimate) -> str:
    """What the schedule costs beside the others over the same stages, in the bubbles of the table of layouts."""
    whole = [
        StageTimes(
            forward=(sum(stage.forward),), backward=(sum(stage.backward),), weight_fraction=stage.weight_fraction
        )
        for stage in best.stages
    ]
    count = best.execution.num_microbatches

    def bubble(name: ScheduleName) -> float:
        busy = max(stage.total for stage in whole) * count
        return simulated_seconds(whole, count, best.hop_seconds, schedule=name)[0] / busy - 1

    others = [f"ZB-H1 {bubble('zb_h1'):.1%} (not in megatron-core)"]
    if best.layout.num_chunks > 1:
        others.insert(0, f"1F1B {bubble('1f1b'):.1%}")
    own = "interleaved" if best.layout.num_chunks > 1 else "1F1B"
    return f"Bubble of {count} micro-batches: {own} {best.bubble_fraction:.1%}; in its place {', '.join(others)}."


def training_command(request: Request, best: Estimate) -> str:
    """The whole command that trains the planned model in this layout, but for the path of its data."""
    cluster, batch = request.cluster, request.batch
    arguments = [f"model={request.model_name}"]
    unchanged, recompute = PRESETS[request.model_name], best.model_arguments()
    for name, value in request.trained.replace(**recompute).as_dict().items():
        if value != getattr(unchanged, name):
            arguments.append(f"model.{name}={_plain(value)}")
    arguments.append("data.data_path=PREFIX")
    objective = {BertConfig: "bert", T5Config: "t5"}.get(type(request.trained))
    if objective is not None:
        arguments += [f"data.objective={objective}", "data.tokenizer=TOKENIZER"]
    if batch.seq_length != request.trained.max_position_embeddings:
        arguments.append(f"data.seq_length={batch.seq_length}")
    arguments += [f"data.global_batch_size={batch.global_batch_size}", f"precision={batch.precision}"]
    arguments.append(f"trainer.devices={min(cluster.gpus_per_node, cluster.num_gpus)}")
    if cluster.num_nodes > 1:
        arguments.append(f"trainer.num_nodes={cluster.num_nodes}")
    arguments += [f"parallel.{name}={_plain(value)}" for name, value in best.strategy_arguments().items()]
    return f"lightning-megatron pretrain {' '.join(arguments)}"


def _plain(value: object) -> str:
    # A stage layout holds characters that both Hydra and the shell read otherwise.
    if isinstance(value, str) and not value.isidentifier():
        return f"'\"{value}\"'"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_assumptions(console: Console, assumptions: tuple[str, ...]) -> None:
    console.print("Assumed:")
    for assumption in assumptions:
        console.print(f"  - {assumption}", soft_wrap=True)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
