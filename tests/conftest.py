"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The pool of gloo processes; started by the first test that needs it."""
    import lightning_megatron.models.gpt_module
    import lightning_megatron.strategy  # noqa: F401  (imported before the fork, so that each rank need not)

    pool = RankPool()
    yield pool
    pool.stop()
