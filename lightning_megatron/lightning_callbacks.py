"""Callbacks of Lightning's that MegatronStrategy cannot serve."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning

from lightning_megatron.errors import ModuleError


def check_callbacks(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse callbacks that would not do here what they do elsewhere.

    Raises:
        ModuleError: a ``BaseFinetuning``, such as ``BackboneFinetuning``, which freezes before the model is built, and
            unfreezes by adding groups to the optimizer.
    """
    for callback in callbacks:
        if isinstance(callback, BaseFinetuning):
            raise ModuleError(
                f"{type(callback).__name__} is a BaseFinetuning, which adds parameters to the optimizer, and Megatron's"
                " takes none during a fit. Freeze with requires_grad_(False) in on_fit_start and unfreeze with "
                "requires_grad_(True) in on_train_epoch_start; the rate is that of all parameters."
            )
