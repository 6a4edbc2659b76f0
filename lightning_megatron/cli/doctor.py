"""``lightning-megatron doctor CKPT``: verifies a checkpoint, lists what it holds, names what is damaged."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = subparsers.add_parser("doctor", help="verify checkpoints", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CKPT", help="checkpoint directories")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify each checkpoint. Returns 1 if any is damaged."""
    healthy = [_examine(path) for path in args.checkpoints]
    return 0 if all(healthy) else 1


def _examine(path: Path) -> bool:
    from lightning_megatron.checkpoint.integrity import contents, verify

    damage = verify(path)
    if damage:
        print(f"{path}: DAMAGED", file=sys.stderr)
        for line in damage:
            print(f"  {line}", file=sys.stderr)
        return False
    found = contents(path)
    metadata = found.metadata
    layout = ", ".join(f"{name}={value}" for name, value in metadata.layout.items() if value not in (None, False, 1))
    print(f"{path}: whole, {found.size / 2**20:.1f} MiB in {len(metadata.files)} files, all checksums match")
    print(f"  model      {metadata.model.get('module', '?')}, {found.parameters:,} elements in {found.weights} tensors")
    if metadata.tokenizer:
        print(f"  tokenizer  {metadata.tokenizer['class']} of {metadata.tokenizer['vocab_size']:,} tokens, "
              f"{metadata.tokenizer['source'] or 'made in memory'}")  # fmt: skip
    print(f"  optimizer  {', '.join(found.optimizer) or 'none: weights only'}")
    print(f"  written on {metadata.world_size} ranks{', ' + layout if layout else ''}")
    print(f"  random     states of {found.random_states} ranks")
    print(f"  versions   {', '.join(f'{name} {number}' for name, number in metadata.versions.items())}")
    return True
