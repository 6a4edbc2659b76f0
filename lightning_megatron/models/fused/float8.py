"""FP8 matrix products of one layer: the scales of its tensors, its weights in FP8, and the products themselves.

A product reads ``[rows, inner]`` and ``[columns, inner]``, both with the inner dimension contiguous, so every operand
of two products is held twice: ``x`` by rows for the forward and by columns for the weight gradient, ``dy`` likewise,
and a weight by rows for the forward and by columns for the input gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_megatron.models.fused import float8_ops, ops
from lightning_megatron.models.fused.linear import WeightGradients, handed_over, main_grad_of
from lightning_megatron.models.fused.types import Cast, Quantized
from lightning_megatron.precision import Float8

if ops.HAVE_TRITON:
    from lightning_megatron.models.fused import triton_float8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_PAD = 4
"""Floats from one scale to the next: 16 bytes, the alignment that cuBLAS and Triton like."""
MULTIPLE = 16
"""What the inner dimension of a product and the width of its result must be a multiple of."""


class Slot(IntEnum):
    """The tensors of a layer that are cast in each micro-batch: activations, then gradients."""

    ATTENTION_INPUT = 0
    ATTENTION = 1
    MLP_INPUT = 2
    ACTIVE = 3
    QKV_GRADIENT = 4
    PROJECTION_GRADIENT = 5
    INNER_GRADIENT = 6
    MLP_GRADIENT = 7


_ACTIVATIONS = 4


class Weight(IntEnum):
    """The weights of a layer."""

    QKV = 0
    PROJECTION = 1
    FC1 = 2
    FC2 = 3


class LayerFloat8:
    """What one layer keeps from micro-batch to micro-batch, all of it at fixed addresses, for CUDA graphs.

    Nothing here is saved: weights are cast from their 16-bit values in each step, and the first micro-batch measures
    its tensors before it casts them.

    Args:
        options: of the precision.
        weights: in the order of :class:`Weight`.

    Raises:
        ValueError: a weight whose sizes have no FP8 product.
    """

    kept: ClassVar[list[Tensor]] = []
    """Where a weight gradient waits while a captured product overwrites it; shared by all layers, whose products run
    one after another. Smaller ones stay, since graphs may know them."""

    def __init__(self, options: Float8, weights: Sequence[Parameter]) -> None:
        self.options = options
        self._weights = list(weights)
        for name, weight in zip(Weight, weights, strict=True):
            if any(size % MULTIPLE for size in weight.shape):
                raise ValueError(
                    f"fp8 needs weights whose sizes on each tensor-parallel rank are multiples of {MULTIPLE}, but "
                    f"{name.name.lower()} has {tuple(weight.shape)}. Change hidden_size, ffn_hidden_size or "
                    "tensor_model_parallel_size, or leave out MegatronPrecision(fp8=...)."
                )
        self._device: torch.device | None = None
        self._measured_once = False
        self._accumulates = False

    @property
    def gradients(self) -> torch.dtype:
        """The type of gradients of activations."""
        return E5M2 if self.options.gradients == "e5m2" else E4M3

    def _allocate(self, device: torch.device) -> None:
        """Late, since a layer may be moved before it first runs."""
        self._device = device
        self._amax = torch.zeros(len(Slot), _PAD, device=device)
        self._history = torch.zeros(self.options.history, len(Slot), device=device)
        self._position = torch.zeros((), dtype=torch.int32, device=device)
        self.accumulate = torch.zeros((), dtype=torch.int32, device=device)
        self._weight_scales = torch.ones(3, len(Weight), _PAD, device=device)
        self._quantized = [
            Quantized(
                torch.empty(weight.shape, dtype=E4M3, device=device),
                torch.empty(weight.t().shape, dtype=E4M3, device=device),
                None,
                self._weight_scales[1, index, 0],
            )
            for index, weight in enumerate(self._weights)
        ]
        size = max(weight.numel() for weight in self._weights)
        if device.type == "cuda" and self.options.weight_gradients:
            held = [t.numel() for t in self.kept if t.device == device]
            if size > max(held, default=0):
                self.kept.append(torch.empty(size, device=device))
        self._measured_once = self._accumulates = False

    def check_tokens(self, tokens: int) -> None:
        """Refuse micro-batches over which weight gradients cannot sum.

        Raises:
            ValueError: a number of tokens that is not a multiple of 16.
        """
        if tokens % MULTIPLE and self.options.weight_gradients and torch.is_grad_enabled():
            raise ValueError(
                f"fp8 weight gradients need micro-batches of a multiple of {MULTIPLE} tokens, but got {tokens}. Change "
                "micro_batch_size or the sequence's length, or use Float8(weight_gradients=False)."
            )

    def refresh(self, training: bool) -> None:
        """Cast the weights, unless this is a later micro-batch of a step, in which they are still what they were.

        megatron-core's DDP clears ``grad_added_to_main_grad`` when a step begins, and a layer's backward sets it.
        """
        device = self._weights[0].device
        if self._device != device:
            self._allocate(device)
        elif training and all(_has_gradient(weight) for weight in self._weights):
            return
        with torch.no_grad():
            for index, weight in enumerate(self._weights):
                scale, inverse, amax = self._weight_scales[:, index, 0]
                cast = Cast(E4M3, scale, inverse, amax, dynamic=True, beside="columns")
                float8_ops.quantize(weight, cast, self._quantized[index])

    def begin(self, training: bool) -> LayerCall:
        """Scales for one forward and its backward. Evaluation measures its own, and leaves the history alone."""
        dynamic = not (training and self._measured_once)
        beside: Literal["columns", "values"] | None = None
        if torch.is_grad_enabled():
            beside = "columns" if self.options.weight_gradients else "values"
        if training:
            amax = self._amax
            scales = float8_ops.next_scales(amax, self._history, self._position, _ACTIVATIONS, self.gradients)
        else:
            amax = torch.zeros_like(self._amax)
            scales = torch.ones(2, *amax.shape, device=amax.device)
        return LayerCall(self, scales, amax, dynamic, beside)

    def backward_done(self) -> None:
        """All magnitudes of one micro-batch are known."""
        self._measured_once = True

    @property
    def is_first(self) -> bool:
        """Whether no backward is done yet."""
        return not self._measured_once

    def weight(self, index: Weight) -> Quantized:
        """A weight as :meth:`refresh` has last cast it."""
        return self._quantized[index]

    def kept_for(self, gradient: Tensor) -> Tensor:
        """Room for a weight's gradient."""
        return next(t for t in self.kept if t.device == gradient.device and t.numel() >= gradient.numel())

    def note_accumulation(self) -> None:
        """Tell captured products whether there are gradients to add to; outside of graphs they see for themselves."""
        accumulates = any(_has_gradient(weight) for weight in self._weights)
        if accumulates != self._accumulates:
            self.accumulate.fill_(int(accumulates))
            self._accumulates = accumulates


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One forward of a layer and its backward, which share scales, however many micro-batches are between them."""

    layer: LayerFloat8
    scales: Tensor
    """Scales and inverses, ``[2, slots, pad]``."""
    amax: Tensor
    """``[slots, pad]``"""
    dynamic: bool
    beside: Literal["columns", "values"] | None
    """What weight gradients read, see :class:`~lightning_megatron.models.fused.types.Cast`."""

    def cast(self, slot: Slot) -> Cast:
        """How kernels write this tensor."""
        dtype = E4M3 if slot < _ACTIVATIONS else self.layer.gradients
        return Cast(
            dtype,
            self.scales[0, slot, 0],
            self.scales[1, slot, 0],
            self.amax[slot, 0],
            self.dynamic,
            self.beside,
        )

    @property
    def keeps_columns(self) -> bool:
        """Whether weight gradients are FP8, from operands by columns."""
        return self.beside == "columns"

    def linear(self, x: Quantized, index: Weight, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: ``[tokens, in]`` to 16-bit ``[tokens, out]``."""
        weight = self.layer.weight(index)
        return _product(x.rows, weight.rows, x.inverse, weight.inverse, torch.bfloat16, fast=True, bias=bias)

    def input_gradient(self, dy: Quantized, index: Weight) -> Tensor:
        """``dy @ weight``: ``[tokens, out]`` to 16-bit ``[tokens, in]``."""
        weight = self.layer.weight(index)
        assert weight.columns is not None
        return _product(dy.rows, weight.columns, dy.inverse, weight.inverse, torch.bfloat16, fast=self._fast)

    def weight_gradient(self, dy: Quantized, x: Tensor, slot: Slot, weight: Tensor) -> Tensor | None:
        """``dy.T @ x`` into ``main_grad``, beside the chain of input gradients where that is possible.

        Args:
            dy: of the layer's output.
            x: the input: FP8 by columns ``[in, tokens]``, or 16-bit values ``[tokens, in]``.
            slot: which tensor ``x`` is.
            weight: ``[out, in]``
        """
        weights = WeightGradients()
        if x.dtype != E4M3:
            assert dy.values is not None
            return weights.add(dy.values, x, weight)
        if not weight.requires_grad:
            return None
        assert dy.columns is not None
        product = partial(self._weight_product, dy_inverse=dy.inverse, x_inverse=self.scales[1, slot, 0])
        return weights.add(dy.columns, x, weight, product)

    def join(self) -> None:
        """The last product of a micro-batch's backward has been added."""
        WeightGradients().join()
        self.layer.backward_done()

    @property
    def _fast(self) -> bool:
        return self.layer.options.fast_accumulation == "all"

    def _weight_product(
        self, dy: Tensor, x: Tensor, weight: Tensor, *, dy_inverse: Tensor, x_inverse: Tensor
    ) -> Tensor | None:
        """An FP8 product cannot add to its result, so it overwrites the first gradient of a step, which is zero."""
        main_grad = main_grad_of(weight)
        product = partial(_product, dy, x, dy_inverse, x_inverse, fast=self._fast)
        if main_grad is None:
            return product(weight.dtype)
        direct = main_grad.dtype == torch.float32
        captured = dy.is_cuda and torch.cuda.is_current_stream_capturing()
        if direct and (captured or (dy.is_cuda and self.layer.is_first and not _has_gradient(weight))):
            # One graph for all micro-batches of a step: the device decides. The first micro-batch, which has nothing
            # to add, compiles the kernels, since a capture cannot.
            kept = self.layer.kept_for(main_grad)
            triton_float8.set_aside(main_grad, kept, self.layer.accumulate)
            product(torch.float32, out=main_grad)
            triton_float8.add_back(main_grad, kept, self.layer.accumulate)
        elif direct and not _has_gradient(weight):
            product(torch.float32, out=main_grad)
        else:
            main_grad.add_(product(main_grad.dtype))
        return handed_over(weight)


def _has_gradient(weight: Tensor) -> bool:
    return bool(getattr(weight, "grad_added_to_main_grad", False))


def _product(
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    dtype: torch.dtype,
    *,
    fast: bool,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``(a * a_inverse) @ (b * b_inverse).T + bias`` of FP8 ``[rows, inner]`` and ``[columns, inner]``."""
    arguments: dict[str, Any] = {
        "scale_a": a_inverse,
        "scale_b": b_inverse,
        "bias": bias,
        "out_dtype": dtype,
        "use_fast_accum": fast,
    }
    if out is None:
        return torch._scaled_mm(a, b.t(), **arguments)
    return torch._scaled_mm(a, b.t(), **arguments, out=out)
