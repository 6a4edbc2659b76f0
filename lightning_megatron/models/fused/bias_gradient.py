# ruff: noqa: N803  (Triton: constants in capitals, and everything is positional)
# mypy: disable-error-code="no-untyped-def"
"""The gradient of a bias of attention scores, summed over the samples while it is computed. Triton, CUDA.

The scores' gradient is ``P * (dO V^T - rowsum(dO * O))`` with ``P = exp(Q K^T * scale + bias - log_sum)``
(arXiv:2205.14135, appendix B). A program holds one tile of it and walks over the samples, so nothing of all pairs and
samples is written.
"""

from __future__ import annotations

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # without CUDA nothing here is called
    triton = None

_QUERIES, _KEYS = 128, 64

if triton is not None:

    @triton.jit
    def _add_bias_gradient(
        total, scores, q, k, v, out, dout, log_sum, hidden,
        scores_head, scores_row,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        o_batch, o_head, o_row, d_batch, d_head, d_row,
        batch, heads, length, width, scale,
        CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        first_query = tl.program_id(0) * QUERIES
        first_key = tl.program_id(1) * KEYS
        head = tl.program_id(2)
        if CAUSAL and first_key > first_query + QUERIES - 1:
            return
        row = first_query + tl.arange(0, QUERIES)
        column = first_key + tl.arange(0, KEYS)
        channel = tl.arange(0, WIDTH)
        row_here, column_here, channel_here = row < length, column < length, channel < width
        queries = row_here[:, None] & channel_here[None, :]
        keys = channel_here[:, None] & column_here[None, :]
        inside = row_here[:, None] & column_here[None, :]
        if CAUSAL:
            inside = inside & (column[None, :] <= row[:, None])
        bias = tl.load(
            scores + head * scores_head + row[:, None] * scores_row + column[None, :], mask=inside, other=0.0
        )
        bias = bias.to(tl.float32)
        result = tl.zeros([QUERIES, KEYS], tl.float32)
        for sample in range(0, batch):
            at = tl.cast(sample, tl.int64)
            query = tl.load(
                q + at * q_batch + head * q_head + row[:, None] * q_row + channel[None, :], mask=queries, other=0.0
            )
            key = tl.load(
                k + at * k_batch + head * k_head + column[None, :] * k_row + channel[:, None], mask=keys, other=0.0
            )
            value = tl.load(
                v + at * v_batch + head * v_head + column[None, :] * v_row + channel[:, None], mask=keys, other=0.0
            )
            gradient = tl.load(
                dout + at * d_batch + head * d_head + row[:, None] * d_row + channel[None, :], mask=queries, other=0.0
            )
            output = tl.load(
                out + at * o_batch + head * o_head + row[:, None] * o_row + channel[None, :], mask=queries, other=0.0
            )
            normal = tl.load(log_sum + (at * heads + head) * length + row, mask=row_here, other=0.0)
            dots = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
            seen = inside
            if HIDDEN:
                seen = seen & (tl.load(hidden + at * length + column, mask=column_here, other=1) == 0)[None, :]
            logits = tl.dot(query, key) * scale + bias - normal[:, None]
            weights = tl.where(seen, tl.exp(logits), 0.0)
            result += weights * (tl.dot(gradient, value) - dots[:, None])
        where = total + (head * length + row[:, None]) * (2 * length - 1) + column[None, :] - row[:, None] + length - 1
        tl.store(where, tl.load(where, mask=inside, other=0.0) + result, mask=inside)


def add(
    total: Tensor,
    scores: Tensor,
    attention: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    log_sum: Tensor,
    hidden: Tensor | None,
    scale: float,
    causal: bool,
) -> None:
    """Add the gradient of the bias to ``total``.

    Args:
        total: ``[heads, length, 2 * length - 1]``, float32; of query ``q`` and key ``k`` in column
            ``k - q + length - 1``
        scores: the bias, ``[1, heads, length, length]``
        attention: queries, keys, values, outputs and the outputs' gradients, ``[batch, heads, length, width]`` each,
            with channels side by side
        log_sum: logarithm of the sum of exponentials of each query's scores, ``[batch, heads, length, 1]``, float32
        hidden: ``[batch, 1, 1, length]``, ``True`` where a key is hidden
    """
    batch, heads, length, width = attention[0].shape
    grid = (triton.cdiv(length, _QUERIES), triton.cdiv(length, _KEYS), heads)
    _add_bias_gradient[grid](
        total, scores, *attention, log_sum, log_sum if hidden is None else hidden.contiguous(),
        scores.stride(1), scores.stride(2), *(stride for t in attention for stride in t.stride()[:3]),
        batch, heads, length, width, scale,
        CAUSAL=causal, HIDDEN=hidden is not None, QUERIES=_QUERIES, KEYS=_KEYS, WIDTH=triton.next_power_of_2(width),
        num_warps=8, num_stages=2,
    )  # fmt: skip
