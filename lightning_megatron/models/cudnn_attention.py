"""ALiBi inside cuDNN's attention, which knows it, on CUDA and with ``nvidia-cudnn-frontend`` installed.

torch's scaled dot product attention reaches cuDNN's kernels, but not their ALiBi, and FlexAttention takes 2.5 times as
long. cuDNN computes the slopes from the number of heads, so a tensor-parallel rank, which has heads out of the middle
of the sequence of slopes, cannot use it. It copies them from memory of the host that is gone when a CUDA graph replays
the copy, so a layer with this attention must not be recorded. cuDNN's score modifiers, which would take slopes as a
tensor, exclude its causal mask.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SHORTEST = 2048
"""Tokens from which on the faster attention is worth more than recording the layer in a CUDA graph."""
_refused: list[str] = []


@functools.cache
def unavailable() -> str | None:
    """Why this kernel cannot be used here, in words; ``None`` if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the device is older than an A100"
    try:
        import cudnn
    except (ImportError, OSError) as error:
        return f"nvidia-cudnn-frontend is not installed ({error}): pip install 'lightning_megatron[cuda]'"
    return None if hasattr(cudnn, "pygraph") else f"nvidia-cudnn-frontend {cudnn.__version__} has no graphs"


def usable(sequence: int, head_size: int, like: Tensor) -> bool:
    """Whether ALiBi of so many tokens runs in cuDNN, on the device and in the type of ``like``; logs once why not."""
    if not like.is_cuda or like.dtype not in (torch.bfloat16, torch.float16) or sequence < SHORTEST or _refused:
        return False
    reason = unavailable()
    if reason is not None:
        _refuse(reason)
        return False
    return head_size % 8 == 0 and head_size <= 128


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    """Causal attention with ALiBi, ``[batch, heads, sequence, head_size]`` to ``[batch, query_groups, ...]``.

    Returns:
        A tensor whose memory is ``[sequence, batch, heads, head_size]``; ``None`` if cuDNN refuses, which is logged
        once.
    """
    try:
        out: Tensor = _CausalAlibi.apply(query, key, value, scale)
    except Exception as error:  # cuDNN's own are no RuntimeErrors
        if not type(error).__module__.startswith("cudnn"):
            raise
        _refuse(str(error).splitlines()[0])
        return None
    return out


def _refuse(reason: str) -> None:
    _refused.append(reason)
    logger.warning("ALiBi runs in FlexAttention instead of cuDNN, which takes longer: %s.", reason)


@dataclass(frozen=True, slots=True)
class _Form:
    """How a tensor of four dimensions lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tuple(tensor.shape), tuple(tensor.stride()))

    @classmethod
    def sequence_first(cls, shape: tuple[int, ...]) -> _Form:
        """``[batch, heads, sequence, head_size]`` with megatron-core's order in memory."""
        batch, heads, _, width = shape
        return cls(shape, (heads * width, width, batch * heads * width, 1))

    def empty(self, like: Tensor) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, slots=True)
class _Problem:
    """What a compiled graph depends on."""

    device: int
    dtype: torch.dtype
    scale: float
    query: _Form
    key: _Form
    value: _Form
    gradient: _Form | None = None
    """Of the output, for a backward."""

    @property
    def out(self) -> _Form:
        return _Form.sequence_first(self.query.shape)

    @property
    def statistics(self) -> _Form:
        batch, heads, sequence, _ = self.query.shape
        return _Form((batch, heads, sequence, 1), (heads * sequence, sequence, 1, 1))


class _Compiled:
    """A graph of cuDNN's and the names of its tensors."""

    def __init__(self, problem: _Problem) -> None:
        import cudnn

        self._cudnn = cudnn
        self._handle = _handle(problem.device)
        types = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        single = cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            io_data_type=types[problem.dtype],
            intermediate_data_type=single,
            compute_data_type=single,
            handle=self._handle,
        )
        rules = {
            "attn_scale": problem.scale,
            "use_alibi_mask": True,
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }

        def tensor(form: _Form, kind: Any = types[problem.dtype]) -> Any:
            return self.graph.tensor(dim=list(form.shape), stride=list(form.stride), data_type=kind)

        inputs = [tensor(form) for form in (problem.query, problem.key, problem.value)]
        query, key, value = inputs
        if problem.gradient is None:
            results = self.graph.sdpa(q=query, k=key, v=value, generate_stats=True, **rules)
            forms = [problem.out, problem.statistics]
            results[1].set_data_type(single)
        else:
            out, gradient = tensor(problem.out), tensor(problem.gradient)
            statistics = tensor(problem.statistics, single)
            inputs += [out, gradient, statistics]
            results = self.graph.sdpa_backward(q=query, k=key, v=value, o=out, dO=gradient, stats=statistics, **rules)
            forms = [_Form.sequence_first(form.shape) for form in (problem.query, problem.key, problem.value)]
        for result, form in zip(results, forms, strict=True):
            result.set_output(True).set_dim(list(form.shape)).set_stride(list(form.stride))
        self.graph.build([cudnn.heur_mode.A])
        self._names = [*inputs, *results]
        self._workspace = max(self.graph.get_workspace_size(), 1)

    def __call__(self, *tensors: Tensor) -> None:
        """Run on the current stream: inputs, then results, in the order of the constructor."""
        device = tensors[0].device
        workspace = torch.empty(self._workspace, device=device, dtype=torch.uint8)
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(device).cuda_stream)
        self.graph.execute(dict(zip(self._names, tensors, strict=True)), workspace, handle=self._handle)


@functools.cache
def _handle(device: int) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@functools.lru_cache(maxsize=64)
def _compiled(problem: _Problem) -> _Compiled:
    return _Compiled(problem)


def _problem(query: Tensor, key: Tensor, value: Tensor, scale: float, gradient: Tensor | None = None) -> _Problem:
    return _Problem(
        query.device.index,
        query.dtype,
        scale,
        _Form.of(query),
        _Form.of(key),
        _Form.of(value),
        None if gradient is None else _Form.of(gradient),
    )


class _CausalAlibi(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        problem = _problem(query, key, value, scale)
        out = problem.out.empty(query)
        statistics = torch.empty(problem.statistics.shape, dtype=torch.float32, device=query.device)
        _compiled(problem)(query, key, value, out, statistics)
        ctx.save_for_backward(query, key, value, out, statistics)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, statistics = ctx.saved_tensors
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        problem = _problem(query, key, value, ctx.scale, gradient)
        results = tuple(_Form.sequence_first(tuple(t.shape)).empty(t) for t in (query, key, value))
        _compiled(problem)(query, key, value, out, gradient, statistics, *results)
        return (*results, None)
