# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803  (Triton: constants in capitals, and everything is positional)
"""The Triton kernel behind :class:`~lightning_megatron.backends.fused_adam.FusedAdam`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # torch's CPU wheels bring no triton; neither do those for macOS and Windows
    AVAILABLE = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs its kernels in Python on CPU tensors: how the tests check values without a GPU."""

BLOCK = 4096
"""Elements a program updates: long enough that its two table look-ups cost nothing."""
_MODEL_DTYPES = {None: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Tables:
    """Addresses of all tensors of a launch, and which program works where."""

    addresses: Tensor
    """int64 ``[parameters, 5]``: master, gradient, first moment, second moment, 16-bit weight (0 for none)."""
    sizes: Tensor
    """int64 ``[parameters]``: elements."""
    parameter: Tensor
    """int32 ``[programs]``: the parameter a program works on."""
    start: Tensor
    """int64 ``[programs]``: its first element there."""
    model_dtype: torch.dtype | None
    aligned: bool
    """Every address is divisible by 16 bytes, so that a thread may load four floats at once."""

    @classmethod
    def build(cls, tensors: list[list[Tensor]], model_dtype: torch.dtype | None, aligned: bool) -> Tables:
        """From, per parameter: master, gradient, first moment, second moment, and the 16-bit weight if there is one."""
        device = tensors[0][0].device
        addresses = torch.tensor([([t.data_ptr() for t in row] + [0])[:5] for row in tensors], dtype=torch.int64)
        sizes = torch.tensor([row[0].numel() for row in tensors], dtype=torch.int64)
        programs = (sizes + BLOCK - 1) // BLOCK
        parameter = torch.repeat_interleave(torch.arange(len(tensors), dtype=torch.int32), programs)
        first = torch.cumsum(programs, 0) - programs
        start = (torch.arange(len(parameter)) - first[parameter.long()]) * BLOCK
        return cls(
            addresses=addresses.to(device),
            sizes=sizes.to(device),
            parameter=parameter.to(device),
            start=start.to(device),
            model_dtype=model_dtype,
            aligned=aligned,
        )


def launch(
    tables: Tables,
    *,
    coefficient: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
) -> None:
    """Update all parameters of the tables; ``coefficient`` (shape ``[1]``) scales the gradients."""
    beta1, beta2 = betas
    _adam[(len(tables.parameter),)](
        tables.addresses,
        tables.sizes,
        tables.parameter,
        tables.start,
        coefficient if coefficient is not None else tables.sizes,
        beta1,
        beta2,
        eps,
        # In double precision here: 1 - beta2 ** step loses half its digits in float32 at the first steps.
        lr / (1.0 - beta1**step),
        (1.0 - beta2**step) ** -0.5,
        1.0 - lr * weight_decay if decoupled else weight_decay,
        HAS_COEFFICIENT=coefficient is not None,
        DECOUPLED=decoupled,
        MODEL=_MODEL_DTYPES[tables.model_dtype],
        ALIGNED=tables.aligned,
        BLOCK=BLOCK,
        num_warps=8,
    )


if AVAILABLE:

    @triton.jit
    def _update(
        master, grad, avg, avg_sq, model, offsets, mask, coefficient, beta1, beta2, eps, step_size, correction, decay,
        DECOUPLED: tl.constexpr, MODEL: tl.constexpr,
    ):  # fmt: skip
        p = tl.load(master + offsets, mask=mask)
        g = tl.load(grad + offsets, mask=mask) * coefficient
        m = tl.load(avg + offsets, mask=mask)
        v = tl.load(avg_sq + offsets, mask=mask)
        if DECOUPLED:
            p = p * decay
        else:
            g = g + decay * p
        m = m + (1.0 - beta1) * (g - m)
        v = v * beta2 + (1.0 - beta2) * g * g
        p = p - step_size * m / (tl.sqrt(v) * correction + eps)
        tl.store(master + offsets, p, mask=mask)
        tl.store(avg + offsets, m, mask=mask)
        tl.store(avg_sq + offsets, v, mask=mask)
        if MODEL != 0:
            tl.store(model + offsets, p.to(model.dtype.element_ty), mask=mask)

    @triton.jit
    def _pointer(table, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
        pointer = tl.load(table + column).to(tl.pointer_type(TYPE))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        return pointer

    @triton.jit
    def _adam(
        addresses, sizes, parameters, starts, coefficients, beta1, beta2, eps, step_size, correction, decay,
        HAS_COEFFICIENT: tl.constexpr, DECOUPLED: tl.constexpr, MODEL: tl.constexpr, ALIGNED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        parameter = tl.load(parameters + program)
        start = tl.multiple_of(tl.load(starts + program), 16)  # a multiple of BLOCK
        size = tl.load(sizes + parameter)
        table = addresses + parameter * 5
        master = _pointer(table, 0, tl.float32, ALIGNED)
        grad = _pointer(table, 1, tl.float32, ALIGNED)
        avg = _pointer(table, 2, tl.float32, ALIGNED)
        avg_sq = _pointer(table, 3, tl.float32, ALIGNED)
        model = _pointer(table, 4, tl.float16 if MODEL == 2 else tl.bfloat16, ALIGNED)
        coefficient = 1.0
        if HAS_COEFFICIENT:
            coefficient = tl.load(coefficients)
        offsets = start + tl.arange(0, BLOCK)
        # Two branches, because a mask against a run-time size would forbid loads of 16 bytes.
        if start + BLOCK <= size:
            _update(master, grad, avg, avg_sq, model, offsets, None, coefficient, beta1, beta2, eps, step_size,
                    correction, decay, DECOUPLED, MODEL)  # fmt: skip
        else:
            _update(master, grad, avg, avg_sq, model, offsets, offsets < size, coefficient, beta1, beta2, eps,
                    step_size, correction, decay, DECOUPLED, MODEL)  # fmt: skip
