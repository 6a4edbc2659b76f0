"""Precision: the types of weights, gradients and master weights. Casting and loss scaling are megatron-core's work."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
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
class Float8:
    """Matrix products of Transformer layers in FP8 (arXiv:2209.05433), with one delayed scale for each tensor.

    Weights and activations are E4M3, gradients of activations E5M2 unless changed. Attention, norms, residuals, the
    embedding, the vocabulary's projection and decoding keep the precision they have without it. Scales follow the
    magnitudes of the last few micro-batches and are exact in the first one, so checkpoints need not hold them.
    """

    weight_gradients: bool = True
    """Compute weight gradients in FP8 too; ``False`` leaves them at 16 bits, which is slower and more precise."""
    gradients: Literal["e5m2", "e4m3"] = "e5m2"
    """The format of gradients of activations: wide range, or one more bit of precision."""
    history: int = 16
    """Forward passes whose largest magnitude decides a scale."""
    fast_accumulation: Literal["forward", "all"] = "forward"
    """Products that tensor cores sum with fewer bits: the forward's alone, or the gradients' as well."""

    def __post_init__(self) -> None:
        if self.gradients not in ("e5m2", "e4m3"):
            raise ValueError(f"Float8(gradients={self.gradients!r}) must be 'e5m2' or 'e4m3'.")
        if self.fast_accumulation not in ("forward", "all"):
            raise ValueError(f"Float8(fast_accumulation={self.fast_accumulation!r}) must be 'forward' or 'all'.")
        if self.history < 1:
            raise ValueError(f"Float8(history={self.history}) must be at least 1.")

    def check_device(self, device: torch.device) -> None:
        """Refuse devices on which these options do not work.

        Raises:
            ValueError: a GPU older than Ada and Hopper. A CPU computes the same values, for tests.
        """
        if device.type != "cuda":
            return
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ValueError(
                f"fp8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper), but "
                f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}. Leave out "
                "MegatronPrecision(fp8=...)."
            )


@dataclass(frozen=True, slots=True)
class DtypePolicy:
    """What a precision means to megatron-core's model, gradient buffers and optimizer."""

    params: torch.dtype
    master_weights: bool
    """Keep fp32 copies of half-precision weights in the optimizer."""
    grad_reduce_in_fp32: bool
    float8: Float8 | None = None
    """Matrix products of layers in FP8; the types above are of everything else."""

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

    Args:
        precision: a name of the table.
        loss_scaling: of ``16-mixed``.
        fp8: run the matrix products of layers in FP8, by :class:`Float8`'s defaults (``True``) or its options; needs
            ``bf16-mixed`` or ``bf16-true``.

    Raises:
        ValueError: a precision that is none of these, or one that ``fp8`` does not go with.
    """

    def __init__(
        self,
        precision: PrecisionName = "32-true",
        loss_scaling: LossScaling | None = None,
        fp8: bool | Float8 = False,
    ) -> None:
        self.policy = DtypePolicy.of(precision)
        if fp8:
            if self.policy.params != torch.bfloat16:
                raise ValueError(
                    f"MegatronPrecision({precision!r}, fp8={fp8}): fp8 needs 'bf16-mixed' or 'bf16-true', for what "
                    "stays in 16 bits. Change precision, or leave out fp8."
                )
            self.policy = replace(self.policy, float8=Float8() if fp8 is True else fp8)
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
