"""The forward pass of Transformer layers while decoding, over the weights of megatron-core's modules.

Decoding is another computation than training: batches of single tokens, a cache, no autograd, no dropout, nothing split
along the sequence, nothing recomputed. So it does not run the training modules with switches thrown, it reads their
weights. A training module needs no change before and no repair after, and what is left of a layer is a few kernels in a
row, which a CPU starts quickly and a CUDA graph records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.backends import peer_sum
from lightning_megatron.backends.core import MLP, CrossAttention, SelfAttention, TransformerLayer
from lightning_megatron.errors import ModuleError
from lightning_megatron.generation.protocol import Step
from lightning_megatron.models.norms import ExtensionNorm

_SLICES = 4
_NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm, ExtensionNorm)


class KVCache:
    """Keys and values of the layers of one chunk, each ``[layers, rows, query_groups, slots, head_size]``."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = torch.arange(shape[1], device=device)[:, None]

    def extend(self, layer: int, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Write ``[rows, groups, sequence, head_size]`` at the step's positions; the keys and values to attend to."""
        rows, length = key.size(0), key.size(2)
        keys, values = self.keys[layer, :rows], self.values[layer, :rows]
        if step.offset is not None:
            keys[:, :, step.offset : step.offset + length] = key
            values[:, :, step.offset : step.offset + length] = value
        else:
            keys[self._rows[:rows, 0], :, step.positions[:, 0]] = key[:, :, 0]
            values[self._rows[:rows, 0], :, step.positions[:, 0]] = value[:, :, 0]
        return keys[:, :, : step.keys], values[:, :, : step.keys]

    def select(self, rows: Tensor, used: int) -> None:
        """Row ``i`` becomes a copy of row ``rows[i]``, in place, since CUDA graphs hold the addresses."""
        for tensor in (self.keys, self.values):
            tensor[:, : rows.size(0), :, :used] = tensor[:, rows, :, :used]


class Rotary:
    """Rotary position embedding (arXiv:2104.09864) of heads, from a table of angles ``[positions, rotated_width]``."""

    def __init__(self, angles: Tensor, dtype: torch.dtype) -> None:
        self._cos, self._sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self._width = angles.size(-1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for ``[rows, sequence]``, which every layer shares."""
        return self._cos[positions][:, :, None], self._sin[positions][:, :, None]

    def __call__(self, heads: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate ``[rows, sequence, heads, head_size]``; what is wider than the table passes."""
        cos, sin = table
        turned, passed = heads[..., : self._width], heads[..., self._width :]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, passed), dim=-1) if passed.size(-1) else turned


class DecodingLayer:
    """One layer of a chunk.

    Args:
        layer: megatron-core's, whose weights are read at each call, so that training between calls is seen.
        index: of the layer in its chunk.
        tp: the tensor-parallel group.

    Raises:
        ModuleError: a layer of other parts than this computes.
    """

    def __init__(self, layer: Any, index: int, tp: dist.ProcessGroup, rotary: Rotary | None) -> None:
        _check_anatomy(layer)
        config, attention = layer.config, layer.self_attention
        self._index, self._tp, self._rotary = index, tp, rotary
        self._norms = (layer.input_layernorm, layer.pre_mlp_layernorm)
        self._qkv, self._projection = attention.linear_qkv, attention.linear_proj
        self._fc1, self._fc2 = layer.mlp.linear_fc1, layer.mlp.linear_fc2
        self._activation: Callable[[Tensor], Tensor] = config.activation_func
        self._gated = config.gated_linear_unit
        self._head_size = attention.hidden_size_per_attention_head
        self._scale = attention.core_attention.softmax_scale
        # Heads of one query group, counted over all ranks. With fewer groups than ranks, several ranks share a group.
        self._heads_per_group = config.num_attention_heads // config.num_query_groups
        self._ranks_per_group = max(1, tp.size() // config.num_query_groups)
        self.groups = max(1, config.num_query_groups // tp.size())
        self._cross = CrossDecoding(layer, tp) if isinstance(layer.cross_attention, CrossAttention) else None
        self.head_size = self._head_size

    def __call__(
        self, hidden: Tensor, cache: KVCache, step: Step, table: tuple[Tensor, Tensor] | None, bias: Tensor | None
    ) -> Tensor:
        """One residual block after the other on ``[rows, sequence, hidden]``.

        Args:
            table: of :meth:`Rotary.at`.
            bias: of the scores by position, ``[rows or 1, heads, sequence, keys]``.
        """
        hidden = hidden + self._attend(self._norms[0](hidden), cache, step, table, bias)
        if self._cross is not None:
            hidden = hidden + self._cross(hidden)
        return hidden + self._mlp(self._norms[1](hidden))

    # ------------------------------------------------------------------ attention

    def _attend(
        self, hidden: Tensor, cache: KVCache, step: Step, table: tuple[Tensor, Tensor] | None, bias: Tensor | None
    ) -> Tensor:
        query, key, value = self._query_key_value(hidden)
        if self._rotary is not None and table is not None:
            query, key = self._rotary(query, table), self._rotary(key, table)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if step.encoding:
            out = self._attend_both_ways(query, key, value, step.visible, bias)
            return row_parallel(self._projection, out, self._tp)
        past_keys, past_values = cache.extend(self._index, key, value, step)
        if step.is_prompt:
            out = self._attend_prompt(query, key, value, bias)
        else:
            out = self._attend_token(query, past_keys, past_values, step.visible, bias)
        return row_parallel(self._projection, out, self._tp)

    def _query_key_value(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[rows, sequence, heads or groups, head_size]`` of this rank. Weights lie group by group: q.. k v."""
        mixed = column_parallel(self._qkv, hidden)
        if self._ranks_per_group > 1:
            mixed = gather_columns(mixed, self._tp)
            group = self._tp.rank() // self._ranks_per_group
            mixed = mixed.unflatten(-1, (-1, self._heads_per_group + 2, self._head_size))[:, :, group : group + 1]
        else:
            mixed = mixed.unflatten(-1, (self.groups, self._heads_per_group + 2, self._head_size))
        query, key, value = mixed.split((self._heads_per_group, 1, 1), dim=3)
        if self._ranks_per_group > 1:
            mine = self._heads_per_group // self._ranks_per_group
            query = query.narrow(3, self._tp.rank() % self._ranks_per_group * mine, mine)
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)

    def _attend_prompt(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            future = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
            bias = bias.masked_fill(future, float("-inf"))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            is_causal=bias is None,
            scale=self._scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out.transpose(1, 2).flatten(2)

    def _attend_both_ways(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        mask = visible if bias is None or visible is None else bias.masked_fill(~visible, float("-inf"))
        mask = bias if mask is None else mask
        grouped = query.size(1) != key.size(1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self._scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def _attend_token(
        self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        # Heads of a group take the place of a sequence of queries, so grouped queries need no copies of keys.
        rows, heads = query.shape[:2]
        query = query.view(rows, keys.size(1), -1, self._head_size)
        mask = visible
        if bias is not None:
            mask = bias.view(bias.size(0), keys.size(1), -1, bias.size(-1)).expand(rows, -1, -1, -1)
            if visible is not None:
                additive = visible.is_floating_point()
                mask = mask + visible if additive else mask.masked_fill(~visible, float("-inf"))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scale)
        return out.reshape(rows, 1, heads * self._head_size)

    # ------------------------------------------------------------------------ MLP

    def _mlp(self, hidden: Tensor) -> Tensor:
        inner = column_parallel(self._fc1, hidden)
        if self._gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self._activation(gate) * up
        else:
            inner = self._activation(inner)
        return row_parallel(self._fc2, inner, self._tp)

    def look_at(self, encoded: Tensor, visible: Tensor | None) -> None:
        """Keep the keys and values of what the encoder gave, ``[prompts, sequence, hidden]``, for cross attention."""
        assert self._cross is not None
        self._cross.look_at(encoded, visible)

    def forget(self) -> None:
        """Drop them."""
        if self._cross is not None:
            self._cross.forget()


class CrossDecoding:
    """Attention of a decoder's layer to what the encoder gave.

    Rows of one prompt look at the same keys, so they take the place of a sequence of queries, and keys are not copied.
    """

    def __init__(self, layer: Any, tp: dist.ProcessGroup) -> None:
        attention = layer.cross_attention
        self._norm, self._query, self._key_value = (
            layer.pre_cross_attn_layernorm,
            attention.linear_q,
            attention.linear_kv,
        )
        self._projection, self._tp = attention.linear_proj, tp
        self._head_size, self._scale = attention.hidden_size_per_attention_head, attention.core_attention.softmax_scale
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._visible: Tensor | None = None

    def look_at(self, encoded: Tensor, visible: Tensor | None) -> None:
        """Keys and values ``[prompts, heads, sequence, head_size]``, head by head in the weights."""
        mixed = project(encoded, self._key_value.weight, self._key_value.bias)
        mixed = mixed.unflatten(-1, (-1, 2, self._head_size)).transpose(1, 2)
        self._keys, self._values = (part.contiguous() for part in mixed.unbind(3))
        self._visible = visible

    def forget(self) -> None:
        self._keys = self._values = self._visible = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[rows, sequence, hidden]`` to the same, where rows of one prompt are side by side."""
        assert self._keys is not None
        assert self._values is not None
        query = project(self._norm(hidden), self._query.weight, self._query.bias)
        query = query.unflatten(-1, (-1, self._head_size)).view(
            self._keys.size(0), -1, self._keys.size(1), self._head_size
        )
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), self._keys, self._values, attn_mask=self._visible, scale=self._scale
        )
        out = out.transpose(1, 2).reshape(hidden.size(0), hidden.size(1), -1)
        return row_parallel(self._projection, out, self._tp)


class DistanceBias:
    """Biases of scores by key position minus query position, from one row for each head of this rank.

    Args:
        by_distance: ``[heads, 2 * length - 1]``, whose middle column is distance zero.
    """

    def __init__(self, by_distance: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self._table = by_distance.to(device=device, dtype=dtype)

    def at(self, step: Step) -> Tensor:
        """``[rows or 1, heads, sequence, keys]``; one row where all agree."""
        positions = step.positions if step.offset is None else step.positions[:1]
        keys = torch.arange(step.keys, device=positions.device)
        distance = keys - positions[:, :, None] + self._table.size(1) // 2
        return self._table[:, distance].transpose(0, 1)


def project(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by another kernel where that is faster.

    For one row on a CPU the time is that of reading the weights, which MKL's matrix product does at half the memory's
    speed; its batched one, over slices of the same weights, does better (benchmarks/generation.py).
    """
    width, out = weight.size(1), weight.size(0)
    if inputs.numel() != width or weight.device.type != "cpu" or out % _SLICES:
        return F.linear(inputs, weight, bias)
    slices = weight.view(_SLICES, out // _SLICES, width)
    # As the transpose of a row: with other strides, torch takes its own kernel, which is ten times slower.
    column = inputs.reshape(1, width).t().expand(_SLICES, width, 1)
    product = torch.bmm(slices, column).view(*inputs.shape[:-1], out)
    return product if bias is None else product + bias


def column_parallel(linear: Any, inputs: Tensor) -> Tensor:
    """A linear whose outputs are spread over ranks; with its adapter, if it has one."""
    out, adapter = project(inputs, linear.weight, linear.bias), getattr(linear, "adapter", None)
    return out if adapter is None else out + adapter.product(inputs)


def row_parallel(linear: Any, inputs: Tensor, tp: dist.ProcessGroup) -> Tensor:
    """A linear whose inputs are spread over the ranks of a group; with its adapter, if it has one."""
    if tp.size() == 1:
        return column_parallel(linear, inputs)
    adapter = getattr(linear, "adapter", None)
    out = peer_sum.product(inputs, linear.weight, tp) if adapter is None else None
    if out is None:
        out = project(inputs, linear.weight)
        if adapter is not None:
            out = out + adapter.product(inputs)
        out = peer_sum.all_reduce(out, tp)
    return out if linear.bias is None else out + linear.bias


def gather_columns(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the last dimension over the ranks of a group."""
    if group.size() == 1:
        return part
    size, rows = group.size(), part.size(0)
    parts = torch.empty((size * rows, *part.shape[1:]), dtype=part.dtype, device=part.device)
    dist.all_gather_into_tensor(parts, part.contiguous(), group=group)
    return parts.unflatten(0, (size, rows)).movedim(0, -2).flatten(-2)


def _check_anatomy(layer: Any) -> None:
    """Raise unless a layer is computed here as megatron-core would."""
    attention, mlp = getattr(layer, "self_attention", None), getattr(layer, "mlp", None)
    parts = {
        "a pre-norm TransformerLayer": isinstance(layer, TransformerLayer)
        and isinstance(layer.input_layernorm, _NORMS)
        and isinstance(layer.pre_mlp_layernorm, _NORMS),
        "SelfAttention without norms of queries and keys": isinstance(attention, SelfAttention)
        and attention.q_layernorm is None
        and attention.k_layernorm is None
        and not attention.config.attention_output_gate,
        "a dense MLP": isinstance(mlp, MLP),
    }
    for what, found in parts.items():
        if not found:
            raise ModuleError(
                f"Decoding computes layers of {what} here, but layer {getattr(layer, 'layer_number', '?')} is "
                f"{type(layer).__name__}({type(attention).__name__}, {type(mlp).__name__}). Override build_decoder in "
                "the module to return a Decoder of its own."
            )
