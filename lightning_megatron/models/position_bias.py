"""Positions as biases of attention scores: ALiBi, and T5's buckets. Memory linear in the sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends.core import (
    CoreModule,
    ProcessGroupCollection,
    TransformerConfig,
    divide,
    make_sharded_tensors_for_checkpoint,
)
from lightning_megatron.models.shared_bias import SharedBias

# A bias that depends on the distance between key and query alone is kept as one row per head,
# `[heads, 2 * length - 1]`, whose middle column is distance zero; attention looks distances up in it.


_LENGTHS_KEPT = 4


def distances(length: int, device: torch.device) -> Tensor:
    """Key position minus query position of each column of a bias by distance, ``[2 * length - 1]``."""
    return torch.arange(1 - length, length, device=device)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head, by Press et al. 2021 (arXiv:2108.12409).

    A geometric sequence that starts at its own ratio ``2 ** (-8 / num_heads)``, for a power of two. For another number,
    the sequence of the next lower power of two, then every second slope of the next higher one, as the authors' code
    and the Bloom and MPT models of Hugging Face have it.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    finer = [2 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * power, 2)]
    return slopes + finer[: num_heads - power]


def alibi_bias(slopes: Tensor, length: int) -> Tensor:
    """``[heads, 2 * length - 1]``: each score loses the head's slope times the distance."""
    return -slopes[:, None] * distances(length, slopes.device).abs()


def relative_buckets(length: int, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance, ``[2 * length - 1]`` (T5, Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Half of a direction's buckets are one distance each, the other half grow logarithmically up to ``max_distance``,
    from which on all distances share the last one. Without ``bidirectional``, keys after the query share bucket 0.
    """
    distance = distances(length, torch.device("cpu"))
    side = num_buckets // 2 if bidirectional else num_buckets
    offset = torch.where(distance > 0, side, 0) if bidirectional else torch.zeros_like(distance)
    back = distance.abs() if bidirectional else (-distance).clamp(min=0)
    exact = side // 2
    growth = torch.log(back.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (side - exact)).long()).clamp(max=side - 1)
    return offset + torch.where(back < exact, back, far)


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (rows,) = ctx.saved_tensors
        return gradient, torch.zeros_like(rows)


class RelativePositionBias(CoreModule):
    """T5's learned bias of attention scores by bucket of distance, for the heads of this tensor-parallel rank.

    Every pipeline stage holds the same table, since every layer adds the bias. The marks on the weight let
    megatron-core sum its gradient over stages (``has_cond_embedder``), count it once in the gradient's norm
    (``shared``), and give it a bucket of its own in the distributed optimizer, so that all stages shard it alike
    (``shared_embedding``).

    Args:
        bidirectional: whether keys after a query have buckets, as in an encoder.
        canonical: whether this is the first chunk of the pipeline, whose copy counts.
        std: standard deviation of the initial weights.
        seed: of the initial weights.
    """

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        bidirectional: bool,
        num_buckets: int,
        max_distance: int,
        canonical: bool,
        std: float,
        seed: int,
    ) -> None:
        super().__init__(config)
        self.bidirectional, self.num_buckets, self.max_distance = bidirectional, num_buckets, max_distance
        heads, rank = divide(config.num_attention_heads, groups.tp.size()), groups.tp.rank()
        # On the CPU, whatever the default device is, so that the seed gives the same table everywhere.
        whole = torch.empty(num_buckets, config.num_attention_heads, dtype=config.params_dtype, device="cpu")
        torch.nn.init.normal_(whole, std=std, generator=torch.Generator("cpu").manual_seed(seed))
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device(torch.cuda.current_device())
        self.weight = torch.nn.Parameter(whole[:, rank * heads : (rank + 1) * heads].clone().to(device))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 1  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]
        if config.pipeline_model_parallel_size > 1:
            self.weight.pipeline_parallel = True  # type: ignore[attr-defined]
            self.weight.shared_embedding = True  # type: ignore[attr-defined]
            self.weight.shared = not canonical  # type: ignore[attr-defined]
        self._buckets: Tensor | None = None
        self._shared: dict[tuple[int, torch.dtype, torch.device], SharedBias] = {}
        self._groups, self._canonical = groups, canonical

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One table, cut by heads; of the copies that stages hold, the first stage's is written."""
        groups = self._groups
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 1},
            sharded_offsets,
            tp_group=groups.tp,
            dp_cp_group=(metadata or {}).get("dp_cp_group", groups.dp_cp),
        )
        for shard in state.values():
            shard.replica_id = (0 if self._canonical else 1, *shard.replica_id[1:])
        return state

    def shared(self, length: int, dtype: torch.dtype) -> SharedBias:
        """The bias of the weight as it is now, which layers add without asking autograd for its gradient."""
        key = length, dtype, self.weight.device
        # Those of a few lengths stay where they are, since recorded layers know the addresses.
        bias = self._shared.pop(key, None) or SharedBias(self.weight.size(1), *key)
        self._shared[key] = bias
        while len(self._shared) > _LENGTHS_KEPT:
            del self._shared[next(iter(self._shared))]
        with torch.no_grad():
            bias.fill(self(length))  # a call, whose hooks wait for weights that are still being gathered
        return bias

    def without_layers(self, states: Tensor) -> Tensor:
        """``states`` unchanged, of a chunk with no layer that adds this bias; the table's gradient becomes zero.

        megatron-core's DDP waits for the gradient of every parameter of a bucket, and finishes a gather of parameters
        when their module is called.
        """
        return _ZeroGradient.apply(states, self(1))

    def weight_gradient(self, rows: Tensor) -> Tensor:
        """The gradient of the weight from one of ``[heads, 2 * length - 1]`` biases."""
        buckets = self._buckets_of((rows.size(1) + 1) // 2)
        summed = rows.new_zeros(self.num_buckets, len(rows)).index_add_(0, buckets, rows.t())
        return summed.to(self.weight.dtype)

    def forward(self, length: int) -> Tensor:
        """``[heads, 2 * length - 1]`` for sequences of up to ``length`` tokens."""
        return self.rows(length)

    def rows(self, length: int) -> Tensor:
        """See :meth:`forward`."""
        return F.embedding(self._buckets_of(length), self.weight).t().contiguous()

    def _buckets_of(self, length: int) -> Tensor:
        if self._buckets is None or self._buckets.size(0) != 2 * length - 1:
            buckets = relative_buckets(
                length,
                bidirectional=self.bidirectional,
                num_buckets=self.num_buckets,
                max_distance=self.max_distance,
            )
            self._buckets = buckets.to(self.weight.device)
        return self._buckets
