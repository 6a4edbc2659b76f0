"""Text from a checkpoint, at any layout.

python recipes/generate.py run/checkpoints/last.ckpt --tokenizer run/tokenizer --prompt "The module" --layout tp2_pp2
"""

import argparse
import sys

from lightning_megatron.cli.generate import add_arguments, run


def main() -> int:
    """Parse the arguments, and generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
