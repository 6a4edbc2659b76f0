"""``lightning-megatron plan``: memory, time and the best layout before a launch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lightning_megatron.planner import GIB, Estimate, Plan, Recompute, StageMemory, StageTimes, estimate, plan, simulate
from lightning_megatron.planner.parameters import layers_per_chunk, model_parameters
from lightning_megatron.planner.request import Request, build_request, describe_choices, parse_arguments

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_EXAMPLE = "lightning-megatron plan model=gpt2_large gpus=64 gpu=h100 global_batch_size=512"
_MAX_STAGES_SHOWN = 8
_PLAIN_WIDTH = 130  # columns where there is no terminal, as in a log


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the command."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, time and the best layout before a launch",
        description="Predict memory per rank, step time, tokens/s and MFU of every layout that fits, and rank them.\n"
        "Nothing is launched and no GPU is needed.",
        epilog=f"example:\n  {_EXAMPLE}\n\n{describe_choices()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="what to plan; sizes given are kept")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to list (default 10)")
    parser.add_argument("--plot", metavar="FOLDER", help="write timeline.png and memory.png of the best layout")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, or 2 for arguments that do not fit, with the reason on standard error."""
    if not args.arguments:
        print(f"What should be planned? For example:\n  {_EXAMPLE}\n\n{describe_choices()}", file=sys.stderr)
        return 2
    try:
        if args.top < 1:
            raise ValueError(f"--top={args.top}, but must be at least 1.")
        request = build_request(parse_arguments(args.arguments))
        result = plan(
            request.model,
            request.cluster,
            request.batch,
            constraints=request.constraints,
            runtime=request.runtime,
            keep=args.top,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(request, result), indent=2))
    else:
        _print_plan(request, result)
    if args.plot:
        from lightning_megatron.planner.plots import save_figures

        for path in save_figures(result.best, request.cluster.accelerator.memory, args.plot):
            print(f"wrote {path}", file=sys.stderr)
    return 0


# ------------------------------------------------------------------------ JSON


def as_json(request: Request, result: Plan) -> dict[str, Any]:
    """The plan as plain values. Bytes and seconds are in those units."""
    return {
        "model": {"name": request.model_name, "parameters": model_parameters(request.model), **request.model.as_dict()},
        "cluster": asdict(request.cluster),
        "batch": asdict(request.batch),
        "considered": result.num_considered,
        "too_large": result.num_too_large,
        "layouts": [_estimate_as_json(candidate) for candidate in result.estimates],
        "assumptions": list(result.assumptions),
    }


def _estimate_as_json(candidate: Estimate) -> dict[str, Any]:
    return {
        "layout": str(candidate.layout),
        "parallel": candidate.strategy_arguments(),
        "model": candidate.model_arguments(),
        "data_parallel_size": candidate.execution.data_parallel_size,
        "num_microbatches": candidate.execution.num_microbatches,
        "parameters_per_rank": [stage.parameters for stage in candidate.memory],
        "memory": [{**stage.parts(), "total": stage.total} for stage in candidate.memory],
        "seconds": {**candidate.time.parts(), "total": candidate.time.total},
        "bytes_sent_per_rank": asdict(candidate.traffic),
        "bubble_fraction": candidate.bubble_fraction,
        "tokens_per_second": candidate.tokens_per_second,
        "mfu": candidate.mfu,
        "hfu": candidate.hfu,
    }


# ---------------------------------------------------------------------- tables


def _print_plan(request: Request, result: Plan) -> None:
    from rich.console import Console

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
    console.print(_ranking(result))
    console.print(_memory_table(request, best))
    console.print(_choices_table(result))
    console.print(_time_table(best))
    if best.layout.pipeline_model_parallel_size > 1:
        console.print(_schedules(best))
    if best.host_bound:
        console.print(
            "[yellow]The host is slower than the GPU here: larger micro-batches, fewer stages or CUDA graphs "
            "(host_ms_per_layer=0) help.[/yellow]"
        )
    console.print(f"\nTo train so:\n  {_overrides(best)}\n", soft_wrap=True)
    _print_assumptions(console, result.assumptions)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _ranking(result: Plan) -> Table:
    table = _table(
        "Layouts, fastest first",
        *("layout", "recompute", "DP", "micro-batch", "GiB/GPU", "bubble", "step", "tokens/s", "MFU", "HFU"),
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


def _memory_table(request: Request, best: Estimate) -> Table:
    parts = [part for part in best.memory[0].parts() if any(stage.parts()[part] for stage in best.memory)]
    table = _table(f"Memory per rank of {best.layout}, GiB", "stage", "layers", "parameters", *parts, "total")
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


def _choices_table(result: Plan) -> Table:
    """The best layout with each kind of recomputation, with and without the distributed optimizer."""
    table = _table("The same layout otherwise", "recompute", "distributed optimizer", "GiB/GPU", "step", left=1)
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


def _time_table(best: Estimate) -> Table:
    table = _table("Where a step goes", "part", "time", "share", "sent per rank")
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
    """Bubbles of the schedules over the same stages; what interleaving gains, and what ZB-H1 would."""
    whole = [
        StageTimes(
            forward=(sum(stage.forward),), backward=(sum(stage.backward),), weight_fraction=stage.weight_fraction
        )
        for stage in best.stages
    ]
    shown = min(best.execution.num_microbatches, 4 * len(whole))
    bubbles = [
        f"1F1B {simulate('1f1b', whole, shown, best.hop_seconds).bubble_fraction:.1%}",
        f"ZB-H1 {simulate('zb_h1', whole, shown, best.hop_seconds).bubble_fraction:.1%} (not in megatron-core)",
    ]
    if best.layout.num_chunks > 1:
        bubbles.insert(1, f"interleaved {best.timeline(shown).bubble_fraction:.1%}")
    return f"Bubbles over {shown} micro-batches: {', '.join(bubbles)}."


def _overrides(best: Estimate) -> str:
    arguments = [f"parallel.{name}={_plain(value)}" for name, value in best.strategy_arguments().items()]
    arguments += [f"model.{name}={value}" for name, value in best.model_arguments().items() if value is not None]
    return " ".join(arguments)


def _plain(value: object) -> str:
    # A stage layout holds characters that both Hydra and the shell read otherwise.
    if isinstance(value, str):
        return f"'\"{value}\"'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_assumptions(console: Console, assumptions: tuple[str, ...]) -> None:
    console.print("Assumed:")
    for assumption in assumptions:
        console.print(f"  - {assumption}", soft_wrap=True)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
