"""``lightning-megatron plan``: memory, time and the best layout before a launch."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from lightning_megatron.planner import Estimate, Plan, plan
from lightning_megatron.planner.parameters import model_parameters
from lightning_megatron.planner.request import Request, build_request, describe_choices, parse_arguments

_EXAMPLE = "lightning-megatron plan model=gpt2_large gpus=64 gpu=h100 global_batch_size=512"


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
        from lightning_megatron.cli.plan_tables import print_plan

        print_plan(request, result)
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
