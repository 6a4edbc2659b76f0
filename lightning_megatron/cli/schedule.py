"""``lightning-megatron schedule``: the learning rate of each step of a run, before it starts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_megatron.optim.config import OptimizerConfig
from lightning_megatron.planner.hardware import unknown
from lightning_megatron.planner.request import parse_value

_EXAMPLE = "lightning-megatron schedule max_steps=10000 optim.lr=3e-4 optim.lr_warmup_steps=500"
_KEYS = {"max_steps": "int"} | {
    field.name: "str" if str(field.type).startswith("Literal") else str(field.type) for field in fields(OptimizerConfig)
}


def add_parser(subparsers: Any) -> None:
    """Add ``schedule`` to the command line."""
    parser = subparsers.add_parser(
        "schedule",
        help="plot the learning rate of a run before it starts",
        description="Draw the learning rate over the optimizer steps of a run, from the fields of conf/optim, which\n"
        "have the values that `pretrain` has.",
        epilog=f"example:\n  {_EXAMPLE}\n\nkeys: {', '.join(_KEYS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="max_steps, and fields of OptimizerConfig")
    parser.add_argument("-o", "--output", type=Path, default=Path("schedule.svg"), help="default: schedule.svg")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the picture and print a few rates; 2 for arguments that do not fit."""
    from lightning_megatron.optim.preview import learning_rate, learning_rates
    from lightning_megatron.reporting.charts import line_chart

    if not args.arguments:
        print(f"Which schedule? For example:\n  {_EXAMPLE}\n\nkeys: {', '.join(_KEYS)}", file=sys.stderr)
        return 2
    try:
        if args.output.suffix != ".svg":
            raise ValueError(f"--output={args.output}, but the picture is an .svg file.")
        values = _parse(args.arguments)
        steps = values.pop("max_steps", None)
        if steps is None or steps < 1:
            raise ValueError("Give max_steps=N, the optimizer steps of the run, of at least 1.")
        config = OptimizerConfig(**(_defaults() | values))
        if config.lr_warmup_steps >= steps:
            raise ValueError(
                f"lr_warmup_steps={config.lr_warmup_steps} is not smaller than max_steps={steps}: the run would end "
                "before its rate is reached. Take a shorter warm-up."
            )
        picture = line_chart({"schedule": tuple(learning_rates(config, steps))}, "learning rate")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_bytes(picture)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for step in dict.fromkeys((0, config.lr_warmup_steps, steps // 4, steps // 2, 3 * steps // 4, steps)):
        print(f"step {step:>10,}  {learning_rate(config, step, steps):.3e}")
    print(f"Wrote {args.output}.")
    return 0


def _defaults() -> dict[str, Any]:
    """The optimizer that `pretrain` takes where nothing is said."""
    from omegaconf import OmegaConf

    from lightning_megatron.cli.configuration import conf_dir

    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "optim" / "adamw.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "_target_"}


def _parse(arguments: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is not key=value, such as max_steps=1000.")
        name = key.rpartition(".")[2]
        if name not in _KEYS:
            raise unknown("key", name, _KEYS)
        values[name] = parse_value(name, text, _KEYS[name])
    return values
