"""A fit on two ranks under any launcher: ``python -m tests.distributed.launched HOW VICTIM DIRECTORY``."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import lightning_megatron as lm
from tests.checkpoint.runs import make_module
from tests.distributed.test_kills import COLLECTIVE_TIMEOUT, Event
from tests.helpers import SharedLoader, quiet_trainer


def main(how: str, victim: str, directory: str) -> None:
    """Fit until something happens to the victim."""
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT if how == "stop" else 300.0)
    strategy = lm.MegatronStrategy(pipeline_model_parallel_size=2, micro_batch_size=2, timeout=timeout)
    trainer = quiet_trainer(strategy, 2, max_steps=40, callbacks=[Event(how, int(victim), Path(directory))])
    module = make_module()
    trainer.fit(module, SharedLoader(module, length=400))


if __name__ == "__main__":
    main(*sys.argv[1:])
