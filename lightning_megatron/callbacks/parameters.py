"""How many parameters each rank holds, printed when a fit starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, override

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_megatron.backends.core import is_counted_here
from lightning_megatron.models.parameters import parameter_report
from lightning_megatron.strategy import MegatronStrategy


@dataclass(frozen=True, slots=True)
class _Share:
    """What one rank tells."""

    place: tuple[int, int] | None
    """Pipeline and tensor rank; ``None`` outside the first replica."""
    line: str
    counted: int


class ParametersByRank(Callback):
    """Prints a line for each rank of the first replica, as Megatron-LM does, and the parameters of the whole model::

    > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 210753280
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        """What was printed."""
        self.total = 0
        """Parameters of the model, each counted once."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        groups = strategy.build_context.groups
        counted = [parameter for parameter in pl_module.parameters() if is_counted_here(parameter, groups)]
        # Experts that are spread over data-parallel ranks have replicas of their own.
        dense = sum(weight.numel() for weight in counted if getattr(weight, "allreduce", True))
        experts = sum(weight.numel() for weight in counted) - dense
        first = groups.dp_cp.rank() == 0
        mine = _Share(
            place=(groups.pp.rank(), groups.tp.rank()) if first else None,
            line=parameter_report(pl_module.chunks, groups.tp.rank(), groups.pp.rank()),
            counted=(dense if first else 0) + (experts if groups.expt_dp.rank() == 0 else 0),
        )
        shares: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(shares, mine)
        shown = sorted((share for share in shares if share.place is not None), key=lambda share: share.place)
        self.lines = [share.line for share in shown]
        self.total = sum(share.counted for share in shares)
        rank_zero_info("\n".join([*self.lines, f" > number of parameters of the model: {self.total}"]))
