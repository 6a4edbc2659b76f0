"""What the Triton kernels compute, in plain torch: how the fused layers run on CPU, and what the kernels must equal.

Activations are rows of tokens: ``[tokens, hidden]`` with ``tokens = sequence * batch``, sequence outermost.
All arithmetic is in float32, as in the kernels; results are rounded once to the type of the input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_megatron.models.fused.types import Activation, Dropout, HeadLayout, Norm, Rotary


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) of each row.

    Args:
        out: where the output is written, if not into a new tensor.

    Returns:
        The output ``[tokens, hidden]``, and per row the mean (zeros for RMSNorm) and the reciprocal deviation, float32.
    """
    values = x.float()
    mean = torch.zeros(len(x), device=x.device) if norm.rms else values.mean(1)
    centred = values - mean[:, None]
    rstd = (centred.square().mean(1) + norm.eps).rsqrt()
    y = centred * rstd[:, None] * weight.float()
    if bias is not None:
        y = y + bias.float()
    return _written(y.to(x.dtype), out), mean, rstd


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _sum(x: Tensor, more: Tensor | None) -> Tensor:
    return x.float() if more is None else x.float() + more.float()


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None,
    norm: Norm,
    with_output: bool,
    *,
    more: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of ``norm_forward`` plus the gradient that reached ``x`` on the residual path.

    Args:
        more: another part of ``dy``, of another rank.
        out: where ``dx`` is written, if not into a new tensor.

    Returns:
        ``dx``; float32 column sums ``[3, partial, hidden]`` for the weight, the bias (of LayerNorm only), and of ``dx``
        itself (the gradient of a bias that was added to ``x`` before); and the output again if asked for.
    """
    normalised = (x.float() - mean[:, None]) * rstd[:, None]
    gradient = _sum(dy, more)
    scaled = gradient * weight.float()
    dx = scaled - normalised * (scaled * normalised).mean(1, keepdim=True)
    if not norm.rms:
        dx = dx - scaled.mean(1, keepdim=True)
    dx = dx * rstd[:, None]
    if dresidual is not None:
        dx = dx + dresidual.float()
    dx = _written(dx.to(x.dtype), out)
    sums = torch.stack([(gradient * normalised).sum(0), gradient.sum(0), dx.float().sum(0)])[:, None]
    if not with_output:
        return dx, sums, None
    y = normalised * weight.float()
    return dx, sums, (y if bias is None else y + bias.float()).to(x.dtype)


def keep_mask(shape: torch.Size, dropout: Dropout) -> Tensor:
    """Which elements dropout keeps, from its seed."""
    assert dropout.seed is not None
    generator = torch.Generator(device=dropout.seed.device).manual_seed(int(dropout.seed) + dropout.stream)
    return torch.rand(shape, generator=generator, device=dropout.seed.device) >= dropout.probability


def add_forward(
    residual: Tensor, x: Tensor, bias: Tensor | None, dropout: Dropout, *, more: Tensor | None = None
) -> Tensor:
    """``residual + dropout(x + more + bias)`` of ``[tokens, hidden]``, in the shape of ``residual``."""
    values = _sum(x, more) if bias is None else _sum(x, more) + bias.float()
    if dropout.probability:
        values = values * keep_mask(x.shape, dropout) / (1.0 - dropout.probability)
    return (residual.float() + values.view_as(residual)).to(residual.dtype)


def add_norm_forward(
    residual: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    dropout: Dropout,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    *,
    more: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``add_forward``, and what ``norm_forward`` returns for its result."""
    added = add_forward(residual, x, x_bias, dropout, more=more)
    return added, *norm_forward(added.view_as(x), weight, bias, norm, out=out)


def add_backward(dy: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """Gradient of ``x`` in ``add_forward``, and its float32 column sums ``[1, 1, hidden]``, the bias's gradient."""
    if dropout.probability:
        dy = (dy.float() * keep_mask(dy.shape, dropout) / (1.0 - dropout.probability)).to(dy.dtype)
    return dy, dy.float().sum(0)[None, None]


def _activate(x: Tensor, activation: Activation) -> Tensor:
    match activation.name:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "relu":
            return F.relu(x)
    raise ValueError(f"activation={activation.name!r} has no kernel.")


def _derivative(x: Tensor, activation: Activation) -> Tensor:
    match activation.name:
        case "gelu":
            return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        case "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            tanh = torch.tanh(inner)
            slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
            return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope
        case "silu":
            sigmoid = torch.sigmoid(x)
            return sigmoid * (1 + x * (1 - sigmoid))
        case "relu":
            return (x > 0).to(x.dtype)
    raise ValueError(f"activation={activation.name!r} has no kernel.")


def activation_forward(x: Tensor, activation: Activation) -> Tensor:
    """``f(x)``, or ``f(gate) * up`` of ``x = [gate, up]`` when gated (arXiv:2002.05202)."""
    values = x.float()
    if activation.gated:
        gate, up = values.chunk(2, dim=-1)
        return (_activate(gate, activation) * up).to(x.dtype)
    return _activate(values, activation).to(x.dtype)


def activation_backward(dy: Tensor, x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Gradient of ``x``, and its float32 column sums ``[1, 1, width of x]``, the gradient of the bias inside ``x``."""
    values, gradient = x.float(), dy.float()
    if activation.gated:
        gate, up = values.chunk(2, dim=-1)
        dx = torch.cat([gradient * up * _derivative(gate, activation), gradient * _activate(gate, activation)], dim=-1)
    else:
        dx = gradient * _derivative(values, activation)
    dx = dx.to(x.dtype)
    return dx, dx.float().sum(0)[None, None]


def _rotate(x: Tensor, rotary: Rotary, sign: float) -> Tensor:
    """``[sequence, batch, heads, width]``, turned; ``sign=-1`` turns back."""
    cos, sin = rotary.cos[:, None, None], sign * rotary.sin[:, None, None]
    turned, rest = x[..., : rotary.width].float(), x[..., rotary.width :]
    if rotary.interleaved:
        even, odd = turned[..., ::2], turned[..., 1::2]
        partner = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    return torch.cat(((turned * cos + partner * sin).to(x.dtype), rest), dim=-1)


def split_heads(qkv: Tensor, heads: HeadLayout, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, ``[sequence, batch, heads, width]`` each, of the projection's output.

    megatron-core interleaves them by group: ``q1 q2 k1 v1 | q3 q4 k2 v2 | ...``. Without rotary embedding and without
    grouped queries the results are views.
    """
    grouped = qkv.view(*heads.leading, heads.groups, heads.queries_per_group + 2, heads.width)
    q, k, v = grouped.split([heads.queries_per_group, 1, 1], dim=-2)
    q = q.reshape(*heads.leading, heads.groups * heads.queries_per_group, heads.width)
    k, v = k.squeeze(-2), v.squeeze(-2)
    return (q, k, v) if rotary is None else (_rotate(q, rotary, 1.0), _rotate(k, rotary, 1.0), v)


def join_heads(dq: Tensor, dk: Tensor, dv: Tensor, heads: HeadLayout, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Gradient of ``split_heads``: ``dqkv``, ``[tokens, width]``, and its float32 column sums ``[1, 1, width]``."""
    if rotary is not None:
        dq, dk = _rotate(dq, rotary, -1.0), _rotate(dk, rotary, -1.0)
    grouped = dq.reshape(*heads.leading, heads.groups, heads.queries_per_group, heads.width)
    dqkv = torch.cat([grouped, dk.unsqueeze(-2), dv.unsqueeze(-2)], dim=-2).view(heads.tokens, -1)
    return dqkv, dqkv.float().sum(0)[None, None]


def softmax_statistics(logits: Tensor, target: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, over the first ``columns`` logits: maximum, sum of ``exp(logit - maximum)``, and the target's logit.

    ``target`` counts from this rank's first column; a target of another rank (or padding) yields 0. All float32.
    """
    values = logits[:, :columns].float()
    maximum = values.max(1).values if columns else torch.full((len(logits),), -torch.inf, device=logits.device)
    total = (values - maximum[:, None]).exp().sum(1)
    here = (target >= 0) & (target < columns)
    chosen = values.gather(1, target.where(here, 0)[:, None])[:, 0] if columns else torch.zeros_like(maximum)
    return maximum, total, chosen.where(here, 0.0)


def softmax_gradient_(logits: Tensor, target: Tensor, log_sum: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Overwrite the logits by ``scale * (softmax - one_hot(target))`` per row; columns past ``columns`` get 0."""
    gradient = (logits.float() - log_sum[:, None]).exp()
    here = (target >= 0) & (target < columns)
    rows = here.nonzero()[:, 0]
    gradient[rows, target[rows]] -= 1.0
    gradient[:, columns:] = 0.0
    return logits.copy_(gradient * scale[:, None])


def accumulate_sums(sums: Tensor, destinations: list[Tensor | None]) -> None:
    """Add the column sums ``[n, partial, width]`` to the matching destinations ``[width]``; ``None`` is left out."""
    for rows, destination in zip(sums, destinations, strict=True):
        if destination is not None:
            destination.add_(rows.sum(0))
