"""Which parameters train in a batch, as their ``requires_grad`` says, which users may change during a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_megatron.backends.core import ProcessGroupCollection
from lightning_megatron.errors import ModuleError

_SHOWN = 5


class TrainedParameters:
    """The parameters of this rank's chunks, of which those that trained when the fit began have gradient buffers.

    Args:
        chunks: unwrapped, once megatron-core's DistributedDataParallel has made the buffers.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        named = [pair for chunk in chunks for pair in chunk.named_parameters()]
        self.buffered = [parameter for _, parameter in named if hasattr(parameter, "main_grad")]
        self._others = [(name, parameter) for name, parameter in named if not hasattr(parameter, "main_grad")]
        self._all_train = True
        self._frozen: tuple[Tensor, ...] = ()

    def frozen(self) -> tuple[Tensor, ...]:
        """Parameters with a buffer that do not train now. The same tuple as before, if they are the same parameters."""
        if all(parameter.requires_grad for parameter in self.buffered):
            self._frozen = self._frozen and ()
            return self._frozen
        frozen = tuple(parameter for parameter in self.buffered if not parameter.requires_grad)
        if [*map(id, frozen)] != [*map(id, self._frozen)]:
            self._frozen = frozen
        return self._frozen

    def unfrozen(self) -> list[str]:
        """Names of parameters that were frozen when the fit began, and are to train now, which have no buffers."""
        return [name for name, parameter in self._others if parameter.requires_grad]


def unfrozen_error(names: Sequence[str]) -> ModuleError:
    """That ``names`` cannot train."""
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return ModuleError(
        f"{shown} had requires_grad=False when the fit began, so the optimizer has no gradient buffers for them, and "
        "they cannot begin to train in this fit. Leave them trainable in configure_model (with LoRA, which freezes all "
        "but its adapters, set requires_grad_(True) there after super().configure_model()) and freeze them in "
        "on_fit_start, from where on requires_grad may change at any batch; or unfreeze them before another fit."
    )


def follow_tied_weight(chunks: Sequence[Any], groups: ProcessGroupCollection) -> None:
    """Freeze or unfreeze the last pipeline stage's copy of a tied embedding as the first stage's is.

    Without a pipeline they are one parameter, and code that freezes it by its name finds only the first stage's.
    """
    embd = groups.embd
    if groups.pp.size() == 1 or embd is None or dist.get_rank() not in dist.get_process_group_ranks(embd):
        return
    first = groups.pp.rank() == 0
    chunk = chunks[0] if first else chunks[-1]
    if not getattr(chunk, "share_embeddings_and_output_weights", False):
        return
    weight = chunk.shared_embedding_or_output_weight()
    flag = weight.new_full((1,), float(weight.requires_grad), requires_grad=False)
    dist.broadcast(flag, group_src=0, group=embd)
    weight.requires_grad_(bool(flag))
