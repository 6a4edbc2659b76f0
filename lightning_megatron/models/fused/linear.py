"""Matrix products of the fused layers: gradients straight into ``main_grad``, and tensor-parallel collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_megatron.models.fused import ops
from lightning_megatron.models.fused.exchange import LEAST_ROWS, Exchange, Sum


@dataclass(frozen=True, slots=True)
class Pending:
    """The result of a collective that may still run."""

    result: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The result, once what has been launched so far on the current stream has it."""
        if self.work is not None:
            self.work.wait()
        return self.result

    def addends(self) -> tuple[Tensor, Tensor | None]:
        """As those of a sum whose parts arrive one by one: the result, and nothing to add."""
        return self.wait(), None


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """How activations enter and leave the part of a layer that is split over ranks (arXiv:1909.08053, 2205.05198)."""

    group: dist.ProcessGroup | None
    size: int
    sequence_parallel: bool
    exchange: Exchange | None = None
    """Under sequence parallelism, for products that need not wait for the tokens of other ranks."""

    @property
    def keeps_gathered(self) -> bool:
        """Whether the gathered input of a product is kept for its weight gradient, instead of gathered again.

        With two ranks that costs an eighth of a layer's activations and saves two of ten collectives; with more ranks
        the rest of the activations shrinks, and the gathered tokens do not.
        """
        return self.sequence_parallel and self.size == 2

    def _exchange_of(self, rows: int) -> Exchange | None:
        return self.exchange if rows >= LEAST_ROWS else None

    def room(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Memory for tokens to be gathered, and this rank's part of it, for a kernel to write to; or ``None``."""
        exchange = self._exchange_of(len(like))
        if exchange is None or not self.keeps_gathered:  # the part would keep the memory of the whole
            return None, None
        return exchange.room(like)

    def gather_product(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None = None, gathered: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tokens of all ranks, and their product ``gathered @ matrix + bias``.

        Args:
            x: ``[tokens / size, in]`` under sequence parallelism, else ``[tokens, in]``
            matrix: ``[in, out]``
            gathered: of :meth:`room`, if ``x`` is there already.
        """
        exchange = self._exchange_of(len(x))
        if exchange is not None:
            return exchange.gather_product(x, matrix, bias, gathered)
        x = self.enter(x)
        return x, x.mm(matrix) if bias is None else torch.addmm(bias, x, matrix)

    def start_product_leave(self, x: Tensor, matrix: Tensor) -> Pending | Sum:
        """:meth:`leave` of ``x @ matrix``, which goes on beside what is launched before the result's ``wait()``."""
        exchange = self._exchange_of(len(x) // self.size)
        if exchange is not None:
            return exchange.start_product_scatter(x, matrix)
        return Pending(*self.start_leave(x.mm(matrix)))

    def product_leave(self, x: Tensor, matrix: Tensor) -> Tensor:
        """:meth:`leave` of ``x @ matrix``."""
        return self.start_product_leave(x, matrix).wait()

    def kept(self, x: Tensor, gathered: Tensor) -> Tensor:
        """Which of a product's input and its gathered tokens to keep for :meth:`start_gather_kept`."""
        return gathered if self.keeps_gathered else x

    def start_gather_kept(self, kept: Tensor) -> Pending:
        """The gathered tokens of what :meth:`kept` chose; the gather goes on until they are waited for."""
        return Pending(kept, None) if self.keeps_gathered else self.start_gather(kept)

    def start_gather(self, x: Tensor) -> Pending:
        """:meth:`enter` that runs beside the next matrix product."""
        if not self.sequence_parallel:
            return Pending(x, None)
        gathered = x.new_empty(self.size * x.size(0), *x.shape[1:])
        return Pending(gathered, dist.all_gather_into_tensor(gathered, x.contiguous(), group=self.group, async_op=True))

    def enter(self, x: Tensor) -> Tensor:
        """The tokens of all ranks: ``[tokens / size, hidden]`` to ``[tokens, hidden]`` under sequence parallelism."""
        if not self.sequence_parallel:
            return x
        gathered = x.new_empty(self.size * x.size(0), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=self.group)
        return gathered

    def leave(self, x: Tensor) -> Tensor:
        """The sum over ranks; under sequence parallelism, of this rank's tokens only."""
        total, work = self.start_leave(x)
        if work is not None:
            work.wait()
        return total

    def start_leave(self, x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """``leave`` that runs beside the next matrix product; wait for the second result before reading the first."""
        if self.size == 1:
            return x, None
        if self.sequence_parallel:
            part = x.new_empty(x.size(0) // self.size, *x.shape[1:])
            return part, dist.reduce_scatter_tensor(part, x.contiguous(), group=self.group, async_op=True)
        return x, dist.all_reduce(x, group=self.group, async_op=True)


def main_grad_of(parameter: Tensor) -> Tensor | None:
    """The float32 buffer in which megatron-core's DDP accumulates this parameter's gradient, if there is one."""
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    return main_grad


def handed_over(parameter: Tensor) -> Tensor:
    """What the backward returns for a parameter whose gradient is in ``main_grad`` already.

    megatron-core's DDP learns from its hook on the parameter's gradient that the gradient is ready, so there has to be
    one; it does not read it. A tied embedding asks for zeros, since autograd adds the embedding's gradient to it.
    """
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(parameter, "zero_out_wgrad", False):
        return parameter.new_zeros(1).expand(parameter.shape)  # autograd adds to it out of place
    return torch.empty_like(parameter)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """``dy.T @ x``, added to ``main_grad`` by the matrix product itself where the device can.

    Args:
        dy: ``[tokens, out]``
        x: ``[tokens, in]``
        weight: ``[out, in]``
    """
    if not weight.requires_grad:
        return None
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return dy.t().mm(x)
    if dy.is_cuda and main_grad.dtype == torch.float32 and dy.dtype != torch.float32:
        # 16-bit operands, float32 sum: no 16-bit gradient is written, read and added.
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)
    elif main_grad.dtype == dy.dtype:
        main_grad.addmm_(dy.t(), x)
    else:
        main_grad.add_(dy.t().mm(x))
    return handed_over(weight)


class WeightGradients:
    """Weight gradients of one layer's backward, in a CUDA graph beside the chain of input gradients.

    A matrix product seldom fills the device to its last wave; kernels of another stream fill the rest. Outside of a
    graph the host would pay for it, so there everything runs in order.

    The products of a layer are joined by :meth:`join` of the last block that adds one. Until then their operands are
    held, so that no kernel of the main stream gets their memory.
    """

    stream: ClassVar[torch.cuda.Stream | None] = None
    operands: ClassVar[list[Tensor]] = []
    enabled: ClassVar[bool] = True

    def add(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        product: Callable[[Tensor, Tensor, Tensor], Tensor | None] = weight_gradient,
    ) -> Tensor | None:
        """The product, now or beside."""
        if not (self.enabled and dy.is_cuda and torch.cuda.is_current_stream_capturing()):
            return product(dy, x, weight)
        cls = type(self)
        cls.stream = cls.stream or torch.cuda.Stream()
        cls.stream.wait_stream(torch.cuda.current_stream())
        cls.operands += (dy, x)
        with torch.cuda.stream(cls.stream):
            return product(dy, x, weight)

    def join(self) -> None:
        """Let the current stream wait for what was added."""
        cls = type(self)
        if cls.stream is not None and cls.operands:
            torch.cuda.current_stream().wait_stream(cls.stream)
            cls.operands.clear()


def column_gradients(sums: Tensor, parameters: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of vectors (biases, norm weights) from float32 column sums ``[n, partial, width]``, in one launch."""
    wanted = [p if p is not None and p.requires_grad else None for p in parameters]
    buffers: list[Tensor | None] = []
    fresh: dict[int, Tensor] = {}
    for index, parameter in enumerate(wanted):
        buffer = None if parameter is None else main_grad_of(parameter)
        if parameter is not None and (buffer is None or buffer.dtype != torch.float32):
            buffer = fresh[index] = torch.zeros(parameter.shape, device=sums.device)
        buffers.append(buffer)
    ops.accumulate_sums(sums, buffers)
    return [
        None if p is None else fresh[index].to(p.dtype) if index in fresh else handed_over(p)
        for index, p in enumerate(wanted)
    ]


def before_forward(modules: list[Module]) -> None:
    """Run the modules' forward pre-hooks, since the fused layer reads their weights without calling them.

    megatron-core's DDP waits there for weights that the distributed optimizer is still gathering.
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            hook(module, ())


def gradients_come_by_autograd(out: Tensor, parameters: list[Parameter]) -> None:
    """Tell DDP, when the backward of ``out`` begins, that it gets these parameters' gradients by autograd this time.

    A hook, since ``out`` may be what a pipeline stage sends: megatron-core frees its memory, so it must be no view.
    """

    def tell(_: Tensor) -> None:
        for parameter in parameters:
            if hasattr(parameter, "grad_added_to_main_grad"):
                parameter.grad_added_to_main_grad = False

    out.register_hook(tell)
