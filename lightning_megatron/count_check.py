"""Whether a loss has counted what its module said before the backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_megatron.errors import ModuleError

_TOLERANCE = 1e-3  # relative: counts may be sums of weights in a low precision


class CountCheck:
    """Compares the counts of ``loss_counts`` with those of ``Loss``, window by window, on the last pipeline stage.

    A GPU's numbers are looked at when they have arrived, a step or two later, so that the host does not wait.
    """

    def __init__(self, context_parallel: dist.ProcessGroup) -> None:
        self._group = context_parallel
        self._told: Mapping[str, Tensor] = {}
        self._counted: dict[str, Tensor] = {}
        self._pending: deque[tuple[list[str], Tensor, torch.cuda.Event | None]] = deque()

    def begin(self, told: Mapping[str, Tensor] | None) -> None:
        """A window begins, with the counts of this replica in all of its batches.

        Raises:
            ModuleError: the counts of an earlier window were not those of its loss.
        """
        self._told, self._counted = told or {}, {}
        self._look()

    def add(self, counts: Mapping[str, Tensor]) -> None:
        """A micro-batch of a context-parallel rank has these counts."""
        for name in self._told.keys() & counts.keys():
            before = self._counted.get(name)
            self._counted[name] = counts[name] if before is None else before + counts[name]

    def end(self) -> None:
        """The window ends.

        Raises:
            ModuleError: its counts, on a CPU, were not those of its loss.
        """
        names = sorted(self._counted)
        if not names:
            return
        counted = torch.stack([self._counted[name] for name in names])
        if self._group.size() > 1:
            dist.all_reduce(counted, group=self._group)
        pairs = torch.stack([counted, torch.stack([self._told[name].double().reshape(()) for name in names])])
        if not pairs.is_cuda:
            self._pending.append((names, pairs, None))
            self._look()
            return
        host = torch.empty(pairs.shape, dtype=pairs.dtype, pin_memory=True)
        host.copy_(pairs, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((names, host, event))

    def finish(self) -> None:
        """Wait for numbers that have not arrived, at the end of a fit.

        Raises:
            ModuleError: as :meth:`begin`.
        """
        for _, _, event in self._pending:
            if event is not None:
                event.synchronize()
        self._look()

    def _look(self) -> None:
        while self._pending and (self._pending[0][2] is None or self._pending[0][2].query()):
            names, pairs, _ = self._pending.popleft()
            for name, counted, told in zip(names, *pairs.tolist(), strict=True):
                if abs(counted - told) > _TOLERANCE * max(abs(told), 1.0):
                    raise ModuleError(
                        f"loss() counted {counted:g} for the term {name!r} in an accumulation window, but "
                        f"loss_counts() had told {told:g}, by which its gradient was divided. Override loss_counts to "
                        "count what loss() counts, from the batch as prepare_batch leaves it. If training_step "
                        "returned None for a batch, loss_counts must tell 0 for each term of that batch."
                    )
