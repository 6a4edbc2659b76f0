"""Options by which the user trusts a tokenizer that is not a plain directory of this machine."""

from __future__ import annotations

import argparse


def add_trust(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--from-hub`` and ``--trust-remote-code``."""
    parser.add_argument(
        "--from-hub", action="store_true", help="fetch a tokenizer by name; else nothing is connected to"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the tokenizer's own code, if it has any; else an error"
    )
