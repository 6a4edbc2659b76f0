"""What the kernels of the fused layers are told about a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
