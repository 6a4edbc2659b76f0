"""Precision: the types of weights, gradients and master weights. Casting and loss scaling are megatron-core's work."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal, override

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType

PrecisionName = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


@dataclass(frozen=True, slots=True)
class LossScaling:
    """Dynamic loss scaling of fp16 (arXiv:1710.03740), with Megatron's defaults."""

    initial: float = 2.0**32
    minimum: float = 1.0
    window: int = 1000
    """Steps without an overflow after which the scale doubles."""
    hysteresis: int = 2
    """Overflows in a row after which the scale halves."""
    constant: float | None = None
    """A fixed scale instead of a dynamic one."""


@dataclass(frozen=True, slots=True)
class DtypePolicy:
    """What a precision means to megatron-core's model, gradient buffers and optimizer."""

    params: torch.dtype
    master_weights: bool
    """Keep fp32 copies of half-precision weights in the optimizer."""
    grad_reduce_in_fp32: bool

    @property
    def half(self) -> bool:
        """Whether weights are bf16 or fp16."""
        return self.params != torch.float32

    @classmethod
    def of(cls, precision: PrecisionName) -> DtypePolicy:
        """The policy of one of Lightning's names.

        Raises:
            ValueError: a precision that megatron-core has no policy for.
        """
        policies = {
            "32-true": cls(torch.float32, master_weights=False, grad_reduce_in_fp32=True),
            "bf16-mixed": cls(torch.bfloat16, master_weights=True, grad_reduce_in_fp32=True),
            "bf16-true": cls(torch.bfloat16, master_weights=False, grad_reduce_in_fp32=False),
            "16-mixed": cls(torch.float16, master_weights=True, grad_reduce_in_fp32=True),
        }
        if precision not in policies:
            near = difflib.get_close_matches(str(precision), PRECISIONS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"precision={precision!r} is none of {', '.join(map(repr, PRECISIONS))}.{hint}")
        return policies[precision]


class MegatronPrecision(Precision):
    """Precision of a Megatron model. ``Trainer(precision="bf16-mixed")`` becomes this by itself.

    =============  ==========  ==============  ===================  =========================================
    precision      weights     master weights  gradient reduction   notes
    =============  ==========  ==============  ===================  =========================================
    ``32-true``    fp32                        fp32
    ``bf16-mixed`` bf16        fp32            fp32
    ``bf16-true``  bf16        none            bf16                 the distributed optimizer, which shards
                                                                    them, still keeps fp32 master weights
    ``16-mixed``   fp16        fp32            fp32                 dynamic loss scaling; on a CPU give it as
                                                                    ``Trainer(plugins=[MegatronPrecision(
                                                                    "16-mixed")])``, since Lightning turns the
                                                                    plain name into bf16 there
    =============  ==========  ==============  ===================  =========================================

    Raises:
        ValueError: a precision that is none of these.
    """

    def __init__(self, precision: PrecisionName = "32-true", loss_scaling: LossScaling | None = None) -> None:
        self.policy = DtypePolicy.of(precision)
        self.precision = precision
        self.loss_scaling = loss_scaling or LossScaling()

    @classmethod
    def from_lightning(cls, plugin: Precision) -> MegatronPrecision:
        """The Megatron precision that a plugin of Lightning's stands for."""
        return plugin if isinstance(plugin, cls) else cls(plugin.precision)  # type: ignore[arg-type]

    @override
    def backward(self, tensor: torch.Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the schedule of ``training_step`` has run every backward already."""

    @override
    def clip_gradients(
        self,
        optimizer: Any,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Hand ``Trainer(gradient_clip_val=...)`` to megatron-core, which clips by the norm over all ranks.

        Raises:
            ValueError: clipping by value, which no Megatron optimizer does.
        """
        if clip_val <= 0:
            return
        if gradient_clip_algorithm != GradClipAlgorithmType.NORM:
            raise ValueError(
                "Trainer(gradient_clip_algorithm='value') is not supported by Megatron's optimizers, which clip by the "
                "global norm. Remove it, or set it to 'norm'."
            )
        while not hasattr(optimizer, "clip_grad"):  # Lightning's wrapper hides the optimizer it wraps
            optimizer = optimizer.optimizer
        optimizer.clip_grad = float(clip_val)
