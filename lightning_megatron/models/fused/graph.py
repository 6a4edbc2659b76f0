# mypy: disable-error-code="no-untyped-def,override"
"""One layer's forward and backward as two CUDA graphs, so that the host launches one thing where it launched thirty.

At small batches the host cannot launch a layer's kernels as fast as the device runs them. After a few ordinary steps a
layer is captured: its forward in the forward pass, its backward in the backward pass, each replayed at once. All layers
of a chunk share one memory pool. That is safe because they run in the order in which they were captured, forward from
the first to the last and backward from the last to the first; a call that would break this order (another shape, no
gradient wanted) runs without graphs.

A pipeline has several micro-batches in flight. Each has a pair of graphs of its own for every layer, and a pool of its
own, which the next micro-batch takes over once its backward is done.

The input of a layer is the output of the layer before, at a fixed address, so only the first one's is copied. What
the layers of a decoder attend to is copied for each.

Collectives of tensor parallelism are part of the graphs. A layer makes the same ones in the same order with and without
graphs, so ranks need not agree on when they capture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_megatron.backends.groups import release_before_groups_end
from lightning_megatron.models.fused.linear import handed_over, main_grad_of

WARM_UP = 3
"""Forward passes before the capture: Triton compiles, cuBLAS and cuDNN choose their kernels, NCCL connects."""
MOST_IN_FLIGHT = 16
"""Micro-batches in flight beyond which a layer runs without graphs."""


class _Capture:
    """The stream that all captures of a process share, and the memory of each chunk and micro-batch in flight.

    The memory lives as long as one of its graphs; a model that comes after another is gone needs a new pool.
    """

    stream: torch.cuda.Stream | None = None
    pools: ClassVar[dict[Hashable, tuple[Any, weakref.WeakSet[torch.cuda.CUDAGraph]]]] = {}

    @classmethod
    def run[Result](cls, function: Callable[[], Result], place: Hashable) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Record what ``function`` launches, without running it, in the memory of ``place``."""
        # Before weight gradients, which run beside on a stream of their own and fill what is left.
        cls.stream = cls.stream or torch.cuda.Stream(priority=-1)
        pool, graphs = cls.pools.get(place, (None, weakref.WeakSet()))
        if not graphs:
            if not any(others for _, others in cls.pools.values()):
                # The graphs cannot use memory that the steps before have left cached.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            pool = torch.cuda.graph_pool_handle()
            cls.pools[place] = (pool, graphs)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        cls.stream.wait_stream(current)
        with torch.cuda.stream(cls.stream):
            # Other threads (NCCL's watchdog) may go on calling CUDA.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        current.wait_stream(cls.stream)
        graphs.add(graph)
        return graph, result


class _Call:
    """Lives as long as the backward of one forward may still come."""


class _Recorded:
    """The graphs of one layer for one micro-batch in flight, and the tensors at their ends."""

    def __init__(self, place: Hashable) -> None:
        self.place = place
        self.pending: weakref.ref[_Call] | None = None
        self.forward: torch.cuda.CUDAGraph | None = None
        self.backward: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.seed: Tensor | None = None
        self.out: Tensor
        self.dout: Tensor
        self.gradients: tuple[Tensor, ...] = ()

    @property
    def in_flight(self) -> bool:
        return self.pending is not None and self.pending() is not None


class LayerGraph:
    """Captures and replays one layer.

    Args:
        run: the layer, from its inputs ``[sequence, batch, hidden]`` and the dropouts' seed (or ``None``) to the shape
            of the first. Its backward must put all gradients but the inputs' into ``main_grad``.
        parameters: of the layer.
        before_backward: called before each replay of the backward, for what the graph reads from the device.
        chunk: of the pipeline; layers of different chunks do not take turns in one order.
        holds_collectives: whether the graphs must be gone before the process groups are.
    """

    def __init__(
        self,
        run: Callable[[tuple[Tensor, ...], Tensor | None], Tensor],
        parameters: list[torch.nn.Parameter],
        before_backward: Callable[[], None] | None = None,
        *,
        chunk: int = 0,
        holds_collectives: bool = False,
    ) -> None:
        self._run = run
        self._before_backward = before_backward
        self._parameters = parameters
        self._chunk = chunk
        self._seen = 0
        self._key: tuple[object, ...] = ()
        self._recorded: list[_Recorded] = []
        if holds_collectives:
            release_before_groups_end(self)

    @property
    def captured(self) -> int:
        """Micro-batches in flight for which forward and backward are captured."""
        return sum(recorded.backward is not None for recorded in self._recorded)

    def __call__(self, inputs: tuple[Tensor, ...], seed: Tensor | None, constants: tuple[Tensor, ...]) -> Tensor | None:
        """The layer's output, or ``None`` if this call cannot be a replay.

        Args:
            constants: what the layer reads at fixed addresses besides its inputs and parameters.
        """
        key = self._key_of(inputs, seed, constants)
        if key is None:
            return None
        if key != self._key:
            if self._recorded:
                return None
            self._key, self._seen = key, 0
        self._seen += 1
        if self._seen <= WARM_UP or not all(x.requires_grad for x in inputs):
            return None
        recorded = self._free()
        if recorded is None:
            return None
        return _Replay.apply(seed, self, recorded, len(inputs), *inputs, *self._parameters)

    def without_gradient(
        self, inputs: tuple[Tensor, ...], seed: Tensor | None, constants: tuple[Tensor, ...]
    ) -> Tensor | None:
        """A copy of the layer's output where the backward computes the layer again, or ``None``.

        Only for models all of whose layers are recomputed: between such a pass and the backward, no layer keeps
        anything in the memory that it writes to.
        """
        recorded = self._recorded[0] if self._recorded else None
        if recorded is None or recorded.backward is None or recorded.in_flight:
            return None
        if self._key_of(inputs, seed, constants) != self._key:
            return None
        return self.forward(recorded, inputs, seed).clone()

    def _key_of(
        self, inputs: tuple[Tensor, ...], seed: Tensor | None, constants: tuple[Tensor, ...]
    ) -> tuple[object, ...] | None:
        """What a recording depends on; ``None`` if gradients are not accumulated in one place."""
        # A parameter that was frozen later still has a buffer, which the captured backward would fill.
        gradients = [main_grad_of(p) if p.requires_grad else None for p in self._parameters]
        if any(g is None for g in gradients):
            return None
        addresses = tuple(t.data_ptr() for t in (*self._parameters, *gradients, *constants) if t is not None)
        return (*((x.shape, x.dtype) for x in inputs), seed is None, addresses)

    def _free(self) -> _Recorded | None:
        """Graphs that no micro-batch in flight uses."""
        for recorded in self._recorded:
            if not recorded.in_flight:
                return recorded
        if len(self._recorded) == MOST_IN_FLIGHT:
            return None
        self._recorded.append(_Recorded((self._chunk, len(self._recorded))))
        return self._recorded[-1]

    def forward(self, recorded: _Recorded, inputs: tuple[Tensor, ...], seed: Tensor | None) -> Tensor:
        """Replay (the first time: capture and replay) the forward."""
        if recorded.forward is None:
            recorded.inputs = tuple(x.detach().requires_grad_() for x in inputs)
            recorded.seed = None if seed is None else seed.clone()
            with torch.enable_grad():
                recorded.forward, recorded.out = _Capture.run(
                    lambda: self._run(recorded.inputs, recorded.seed), recorded.place
                )
        for x, place in zip(inputs, recorded.inputs, strict=True):
            _put(x, place)
        if seed is not None:
            assert recorded.seed is not None
            recorded.seed.copy_(seed)
        recorded.forward.replay()
        return recorded.out.detach()

    def backward(self, recorded: _Recorded, dout: Tensor) -> tuple[Tensor, ...]:
        """Replay (the first time: capture and replay) the backward."""
        if self._before_backward is not None:
            self._before_backward()
        if recorded.backward is None:
            recorded.dout = dout.detach().contiguous()
            recorded.backward, recorded.gradients = _Capture.run(
                lambda: torch.autograd.grad(recorded.out, recorded.inputs, grad_outputs=recorded.dout), recorded.place
            )
            # The next capture may use the memory of what was kept for this backward.
            recorded.out = recorded.out.detach()
        _put(dout, recorded.dout)
        recorded.backward.replay()
        return recorded.gradients

    def release(self) -> None:
        """Drop the graphs; after as many ordinary passes as at first the layer is captured again."""
        self._recorded, self._key = [], ()


def _put(source: Tensor, place: Tensor) -> None:
    if source.data_ptr() != place.data_ptr():
        place.detach().copy_(source)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seed, graph: LayerGraph, recorded: _Recorded, count: int, *tensors):
        out = graph.forward(recorded, tensors[:count], seed)
        ctx.graph, ctx.recorded, ctx.parameters, ctx.call = graph, recorded, tensors[count:], _Call()
        recorded.pending = weakref.ref(ctx.call)
        return out

    @staticmethod
    def backward(ctx, dout):
        gradients = ctx.graph.backward(ctx.recorded, dout)
        ctx.call = None
        return None, None, None, None, *gradients, *(handed_over(p) for p in ctx.parameters)
