# mypy: disable-error-code="no-untyped-def,override"
"""One layer's forward and backward as two CUDA graphs, so that the host launches one thing where it launched thirty.

At small batches the host cannot launch a layer's kernels as fast as the device runs them. After a few ordinary steps a
layer is captured: its forward in the forward pass, its backward in the backward pass, each replayed at once. All layers
share one memory pool. That is safe because they run in the order in which they were captured, forward from the first to
the last and backward from the last to the first; a call that would break this order (a second forward before the
backward of the first, another shape, no gradient wanted) runs without graphs.

The input of a layer is the output of the layer before, at a fixed address, so only the first one's is copied. What
the layers of a decoder attend to is copied for each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_megatron.models.fused.linear import handed_over, main_grad_of

WARM_UP = 3
"""Forward passes before the capture: Triton compiles, cuBLAS and cuDNN choose their kernels."""


class _Capture:
    """The stream and the memory that all captures of a process share.

    The memory lives as long as one of its graphs; a model that comes after another is gone needs a new pool.
    """

    stream: torch.cuda.Stream | None = None
    pool: Any = None
    graphs: ClassVar[weakref.WeakSet[torch.cuda.CUDAGraph]] = weakref.WeakSet()

    @classmethod
    def run[Result](cls, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Record what ``function`` launches, without running it."""
        cls.stream = cls.stream or torch.cuda.Stream()
        if not cls.graphs:
            # The graphs cannot use memory that the steps before have left cached.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            cls.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        cls.stream.wait_stream(current)
        with torch.cuda.stream(cls.stream):
            # Other threads (NCCL's watchdog) may go on calling CUDA.
            graph.capture_begin(pool=cls.pool, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        current.wait_stream(cls.stream)
        cls.graphs.add(graph)
        return graph, result


class _Call:
    """Lives as long as the backward of one forward may still come."""


class LayerGraph:
    """Captures and replays one layer.

    Args:
        run: the layer, from its inputs ``[sequence, batch, hidden]`` and the dropouts' seed (or ``None``) to the shape
            of the first. Its backward must put all gradients but the inputs' into ``main_grad``.
        parameters: of the layer.
        before_backward: called before each replay of the backward, for what the graph reads from the device.
    """

    def __init__(
        self,
        run: Callable[[tuple[Tensor, ...], Tensor | None], Tensor],
        parameters: list[torch.nn.Parameter],
        before_backward: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._before_backward = before_backward
        self._parameters = parameters
        self._seen = 0
        self._key: tuple[object, ...] = ()
        self._pending: weakref.ref[_Call] | None = None
        self._forward: torch.cuda.CUDAGraph | None = None
        self._backward: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: tuple[Tensor, ...], seed: Tensor | None, constants: tuple[Tensor, ...]) -> Tensor | None:
        """The layer's output, or ``None`` if this call cannot be a replay.

        Args:
            constants: what the layer reads at fixed addresses besides its inputs and parameters.
        """
        # A parameter that was frozen later still has a buffer, which the captured backward would fill.
        gradients = [main_grad_of(p) if p.requires_grad else None for p in self._parameters]
        if any(g is None for g in gradients):
            return None
        addresses = tuple(t.data_ptr() for t in (*self._parameters, *gradients, *constants) if t is not None)
        key = (*((x.shape, x.dtype) for x in inputs), seed is None, addresses)
        if key != self._key:
            if self._forward is not None:
                return None
            self._key, self._seen = key, 0
        self._seen += 1
        in_flight = self._pending is not None and self._pending() is not None
        if self._seen <= WARM_UP or in_flight or not all(x.requires_grad for x in inputs):
            return None
        return _Replay.apply(seed, self, len(inputs), *inputs, *self._parameters)

    def forward(self, inputs: tuple[Tensor, ...], seed: Tensor | None) -> Tensor:
        """Replay (the first time: capture and replay) the forward."""
        if self._forward is None:
            self._inputs = tuple(x.detach().requires_grad_() for x in inputs)
            self._seed = None if seed is None else seed.clone()
            with torch.enable_grad():
                self._forward, self._out = _Capture.run(lambda: self._run(self._inputs, self._seed))
        for x, place in zip(inputs, self._inputs, strict=True):
            _put(x, place)
        if seed is not None:
            assert self._seed is not None
            self._seed.copy_(seed)
        self._forward.replay()
        return self._out.detach()

    def backward(self, dout: Tensor) -> tuple[Tensor, ...]:
        """Replay (the first time: capture and replay) the backward."""
        if self._before_backward is not None:
            self._before_backward()
        if self._backward is None:
            self._dout = dout.detach().contiguous()
            self._backward, self._gradients = _Capture.run(
                lambda: torch.autograd.grad(self._out, self._inputs, grad_outputs=self._dout)
            )
            self._out = self._out.detach()  # the next capture may use the memory of what was kept for this backward
        _put(dout, self._dout)
        self._backward.replay()
        return self._gradients


def _put(source: Tensor, place: Tensor) -> None:
    if source.data_ptr() != place.data_ptr():
        place.detach().copy_(source)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seed, graph: LayerGraph, count: int, *tensors):
        out = graph.forward(tensors[:count], seed)
        ctx.graph, ctx.parameters, ctx.call = graph, tensors[count:], _Call()
        graph._pending = weakref.ref(ctx.call)
        return out

    @staticmethod
    def backward(ctx, dout):
        gradients = ctx.graph.backward(dout)
        ctx.call = None
        return None, None, None, *gradients, *(handed_over(p) for p in ctx.parameters)
