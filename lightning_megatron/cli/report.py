"""``lightning-megatron report RUN``: one self-contained HTML page of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_EXAMPLE = "lightning-megatron report runs/pretrain"


def add_parser(subparsers: Any) -> None:
    """Add ``report`` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page of a run",
        description="Curves, configuration, layout and checkpoints of a run as one HTML page that needs no other file. "
        "Reads what CSVLogger or TensorBoardLogger wrote, of all starts of the run.",
        epilog=f"example:\n  {_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="directory of the run (run_dir), or of its logs")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: RUN/report.html")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page; 1 if there is nothing to report."""
    from lightning_megatron.errors import DataError
    from lightning_megatron.reporting.page import render
    from lightning_megatron.reporting.run import read_run

    try:
        found = read_run(args.directory)
        output = args.output or args.directory / "report.html"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(render(found), encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {output}: {found.steps:,} steps, {len(found.series)} series, {len(found.checkpoints)} checkpoints.")
    return 0
