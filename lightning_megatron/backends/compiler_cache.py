"""Leave no empty cache directory of torch's compiler behind.

megatron-core decorates functions with ``torch.compile`` when it is imported, for which torch makes the directory of
compiled kernels below ``TMPDIR``, in runs that compile nothing too. torch makes it again when it compiles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def left_to_compilation() -> Iterator[None]:
    """Remove the cache directory that the block has made, if it is empty and no choice of the user."""
    chosen = _VARIABLE in os.environ
    yield
    if chosen:
        return
    made = os.environ.pop(_VARIABLE, None)  # torch sets it when it makes the directory, and would not look again
    if made is not None:
        with suppress(OSError):  # not empty: other processes compile
            os.rmdir(made)
