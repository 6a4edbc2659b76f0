"""``lightning-megatron``: one command, a subcommand for each job."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import lightning_megatron
from lightning_megatron.planner.hardware import unknown

# Each has add_parser(subparsers), which sets `run`. Imported for its own command only, so that `plan` never waits for
# what `generate` needs.
COMMANDS = {
    "preprocess": "text, JSONL, Parquet or Hugging Face datasets to indexed datasets; inspect, merge",
    "plan": "memory, time and layout of a run, before it starts",
    "config": "a configuration by questions, by flags, or from Accelerate's",
    "convert": "checkpoints of Hugging Face, Megatron-LM and this package into each other",
    "generate": "text from a checkpoint, over tensor and pipeline parallel ranks",
    "schedule": "the learning rate of a run, drawn before it starts",
    "report": "one HTML page of a run: curves, layout, checkpoints, configuration",
    "doctor": "environment, kernels and a self-test of this machine; or whether checkpoints are whole",
}
RECIPES = {
    "pretrain": "recipes/pretrain.py: train, validate or test from Hydra configurations",
    "finetune": "recipes/finetune.py: from a directory of Hugging Face to another, with or without LoRA",
    "demo": "recipes/demo.py: the whole way on a laptop",
}
CONFIGURED = ("pretrain", "finetune")
"""Recipes whose arguments are Hydra's."""


def recipe_path(name: str) -> Path:
    """The file of a recipe: inside an installed package, or beside it in a checkout."""
    package = Path(lightning_megatron.__file__).parent
    candidates = [directory / "recipes" / f"{name}.py" for directory in (package, package.parent)]
    return next(path for path in candidates if path.is_file())


def available() -> dict[str, str]:
    """Commands of this version by name, with what each does."""
    here = Path(__file__).parent
    return {name: text for name, text in COMMANDS.items() if (here / f"{name}.py").is_file()} | RECIPES


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read, such as `head`, has enough. The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in RECIPES:
        path = str(recipe_path(arguments[0]))
        sys.argv = [path, *arguments[1:]]  # launchers start further processes with it
        if arguments[0] in CONFIGURED:
            from lightning_megatron.cli.configuration import answer_early

            if answer_early(arguments[0], arguments[1:]):
                return 0
        runpy.run_path(path, run_name="__main__")
        return 0
    parser = argparse.ArgumentParser(prog="lightning-megatron", description=lightning_megatron.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=lightning_megatron.__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = arguments[0] if arguments else None
    for name, text in available().items():
        if name == chosen:
            importlib.import_module(f"lightning_megatron.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text, add_help=False)
    if not arguments:
        parser.print_help()
        return 2
    if chosen is not None and not chosen.startswith("-") and chosen not in available():
        print(f"error: {unknown('command', chosen, available())}", file=sys.stderr)
        return 2
    if chosen == "convert":  # Accelerate's and Megatron-LM's guides write --load_path
        arguments = [_with_dashes(argument) for argument in arguments]
    parsed, surplus = parser.parse_known_args(arguments)
    if surplus:
        _refuse(subparsers.choices[parsed.command], surplus)
    run = getattr(parsed, "run", None) or importlib.import_module(f"lightning_megatron.cli.{parsed.command}").run
    return int(run(parsed) or 0)


def _with_dashes(argument: str) -> str:
    """An option whose name is written with underscores, by its name with dashes."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _refuse(command: argparse.ArgumentParser, surplus: Sequence[str]) -> NoReturn:
    """End with the usage of the command, not of all of them, and the nearest option that it has."""
    options = [option for option in command.format_help().split() if option.startswith("--")]
    near = difflib.get_close_matches(surplus[0].partition("=")[0], [option.strip("[],") for option in options], n=1)
    command.error(f"unrecognized arguments: {' '.join(surplus)}" + (f". Did you mean {near[0]}?" if near else ""))


if __name__ == "__main__":
    sys.exit(main())
