"""``python -m lightning_megatron`` is ``lightning-megatron``."""

import sys

from lightning_megatron.cli.main import main

sys.exit(main())
