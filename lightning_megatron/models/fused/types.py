"""What the kernels of the fused layers are told about a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ActivationName = Literal["gelu", "gelu_tanh", "silu", "relu"]


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm, or RMSNorm (``rms``)."""

    rms: bool
    eps: float


@dataclass(frozen=True, slots=True)
class Activation:
    """The MLP's nonlinearity; ``gated`` multiplies it by the second half of its input."""

    name: ActivationName
    gated: bool


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout whose mask is a function of a seed, so that the backward draws it again instead of storing it."""

    probability: float
    seed: Tensor | None = None
    """int64, shape ``[]``, on the device: drawn from the generator that megatron-core's RNG tracker has active."""
    stream: int = 0
    """Tells the dropouts of one layer apart, which share a seed."""


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How one rank's heads lie in the output of the query-key-value projection."""

    sequence: int
    batch: int
    groups: int
    queries_per_group: int
    width: int

    @property
    def leading(self) -> tuple[int, int]:
        """``(sequence, batch)``."""
        return self.sequence, self.batch

    @property
    def tokens(self) -> int:
        """Rows of the projection's output."""
        return self.sequence * self.batch


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding (arXiv:2104.09864): cosine and sine of the angle of each position and channel."""

    cos: Tensor
    """``[sequence, rotated width]``, float32."""
    sin: Tensor
    interleaved: bool
    """Pairs are neighbours, instead of halves apart."""

    @property
    def width(self) -> int:
        """Channels of a head that turn; those after them stay."""
        return self.cos.size(-1)

    @classmethod
    def of(cls, angles: Tensor, interleaved: bool) -> Rotary:
        """From megatron-core's ``rotary_pos_emb``, ``[sequence, 1, 1, rotated width]``."""
        flat = angles.detach().view(angles.size(0), -1).float()
        return cls(flat.cos(), flat.sin(), interleaved)


@dataclass(frozen=True, slots=True)
class Cast:
    """How a kernel writes one tensor in FP8: ``value * scale``, saturated at the format's largest number."""

    dtype: torch.dtype
    """``float8_e4m3fn`` or ``float8_e5m2``."""
    scale: Tensor
    """float32, shape ``[]``, as all three: a power of two, so that where it lies does not change how values round."""
    inverse: Tensor
    """``1 / scale``, by which matrix products multiply."""
    amax: Tensor
    """The largest magnitude yet; raised by the kernels, which do not wait for each other."""
    dynamic: bool
    """Measure the tensor before it is cast, and set the scale by that."""
    beside: Literal["columns", "values"] | None
    """What the weight gradient needs beside the rows: them transposed, or 16-bit values. ``None``: there is none."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor of rows in FP8."""

    rows: Tensor
    """``[tokens, width]``"""
    columns: Tensor | None
    """The same numbers, ``[width, tokens]``."""
    values: Tensor | None
    """Before the cast, ``[tokens, width]``."""
    inverse: Tensor
    """The tensor is ``rows * inverse``."""
