"""megatron-core on a machine (or a Trainer) without CUDA, over gloo.

megatron-core 0.19 names CUDA in some 770 lines: ``torch.cuda.current_device()``, ``device="cuda"`` literals,
``Tensor.cuda()``, comparisons with ``"torch.cuda.FloatTensor"``. Its mathematics does not need CUDA: with the stand-ins
below, every layout matches one process to 5e-7.

How: each ``megatron.core`` module has a global called ``torch``. While installed, that global is a stand-in whose
``.cuda`` answers for the CPU, whose factories turn ``device="cuda"`` into the CPU, and whose ``.distributed`` adds the
one collective that gloo lacks. Everything else is forwarded. ``torch`` itself stays as it is, so other strategies,
models and libraries of the process see no difference; only ``Tensor.cuda``, which can do nothing but raise there, is
made an identity for callers inside megatron-core. :func:`uninstall` puts everything back.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_CPU = torch.device("cpu")
_PREFIX = "megatron.core"


class _NullStream:
    """For ``torch.cuda.Stream``, ``Event`` and the ``stream()`` context: the CPU runs in program order."""

    device = _CPU
    cuda_stream = 0
    priority = 0

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NullStream)

    def __hash__(self) -> int:
        return 0

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 0.0

    def record_event(self, event: object = None) -> object:
        return event or _NullStream()

    def record(self, *_: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    wait_event = wait_stream = synchronize = record

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


_STREAM = _NullStream()


class _CudaStandIn(types.ModuleType):
    """For ``torch.cuda`` inside megatron-core."""

    Stream = Event = _NullStream

    def __init__(self) -> None:
        super().__init__("torch.cuda (CPU stand-in)")
        self.random = self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _CPU

    def device_count(self) -> int:
        return 1

    def is_current_stream_capturing(self) -> bool:
        return False

    def current_stream(self, *_: object) -> _NullStream:
        return _STREAM

    default_stream = stream = current_stream

    def set_device(self, *_: object) -> None: ...

    synchronize = empty_cache = set_stream = set_device

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def memory_allocated(self, *_: object) -> int:
        return 0

    max_memory_allocated = memory_reserved = memory_allocated

    def get_device_capability(self, *_: object) -> tuple[int, int]:
        return (0, 0)


class _DistributedStandIn(types.ModuleType):
    """For ``torch.distributed`` inside megatron-core: gloo rejects lists of unequal shapes ("invalid tensor size")."""

    def __init__(self) -> None:
        super().__init__("torch.distributed (gloo stand-in)")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def all_gather(
        self, tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if _even_or_not_gloo(tensor_list, group):
            return torch.distributed.all_gather(tensor_list, tensor, group=group, async_op=async_op)
        rank = torch.distributed.get_rank(group)
        for source, out in enumerate(tensor_list):
            buffer = tensor.contiguous() if source == rank else torch.empty_like(out).contiguous()
            torch.distributed.broadcast(buffer, group_src=source, group=group)
            out.copy_(buffer)
        return None

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _even_or_not_gloo(input_list, group):
            return torch.distributed.reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        rank = torch.distributed.get_rank(group)
        for target, part in enumerate(input_list):
            buffer = part.clone().contiguous()
            torch.distributed.all_reduce(buffer, op=op, group=group)
            if target == rank:
                output.copy_(buffer)
        return None


def _even_or_not_gloo(tensors: Sequence[torch.Tensor], group: Any) -> bool:
    even = all(t.shape == tensors[0].shape for t in tensors)
    return even or torch.distributed.get_backend(group) != "gloo"


class _TorchStandIn(types.ModuleType):
    """For ``torch`` inside megatron-core."""

    FACTORIES = (
        *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "rand", "randn", "randint", "eye"),
        *("linspace", "empty_like", "zeros_like", "ones_like", "full_like"),
    )

    def __init__(self) -> None:
        super().__init__("torch (CPU stand-in)")
        self.cuda = _CudaStandIn()
        self.distributed = _DistributedStandIn()
        for name in self.FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):  # raises without an accelerator
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


# --------------------------------------------------------------------------- where another `torch` is not enough


def _patch_random(module: types.ModuleType, put: Callable[[object, str, object], None]) -> None:
    """The RNG tracker forks the device's generator; upstream warns at every dropout that the CPU's changed."""

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    @contextmanager
    def fork(self: Any, name: str = module._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise RuntimeError(f"The RNG state {name!r} was never added; known are {sorted(self.states_)}.")
        outer_state, outer_name = torch.get_rng_state(), self._current_state_name
        if outer_name != "default-rng":
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer_state)
            self._current_state_name = outer_name

    put(module, "_set_cuda_rng_state", set_state)  # upstream queues it until CUDA starts, which is never
    put(module.CudaRNGStatesTracker, "fork", fork)


def _patch_moe(module: types.ModuleType, put: Callable[[object, str, object], None]) -> None:
    """Split sizes of an all-to-all must be lists; upstream converts them only ``if tensor.is_cuda``."""

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    put(module, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu)


def _patch_inference(module: types.ModuleType, put: Callable[[object, str, object], None]) -> None:
    """Drops ``assert tensor.is_cuda`` before a broadcast from the last pipeline stage."""
    put(module, "_is_cuda", lambda tensor: None)


def _patch_jit(module: types.ModuleType, put: Callable[[object, str, object], None]) -> None:
    """megatron-core's public switch: torch.compile needs a C++ compiler and a long warm-up on a CPU."""
    module.disable_jit_fuser()


PATCHES: dict[str, Callable[[types.ModuleType, Callable[[object, str, object], None]], None]] = {
    "megatron.core.jit": _patch_jit,
    "megatron.core.tensor_parallel.random": _patch_random,
    "megatron.core.transformer.moe.moe_utils": _patch_moe,
    "megatron.core.transformer.moe.token_dispatcher": _patch_moe,
    "megatron.core.inference.communication_utils": _patch_inference,
}
"""Module -> patch. `tests/backends/test_cpu.py` fails when an upgrade moves one of these names."""


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Let ``Tensor.type()`` say ``torch.cuda.FloatTensor`` for a CPU tensor, while megatron-core compares strings.

    Its mixed-precision and distributed optimizers sort parameters that way in their constructors.
    """
    if not installed() or "type" in torch.Tensor.__dict__:
        yield
        return
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del torch.Tensor.type


# ------------------------------------------------------------------------------------------ install and uninstall


class _Finder(importlib.abc.MetaPathFinder):
    """Prepares modules of megatron-core that are imported after :func:`install`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith(_PREFIX):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _prepare(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_stand_in = _TorchStandIn()
_finder = _Finder()
_undo: list[Callable[[], None]] = []


def _put(owner: object, name: str, value: object) -> None:
    before = getattr(owner, name)
    _undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def _prepare(module: types.ModuleType) -> None:
    if module.__dict__.get("torch") is torch:
        _put(module, "torch", _stand_in)
    patch = PATCHES.get(module.__name__)
    if patch is not None:
        patch(module, _put)


def _tensor_cuda(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_PREFIX):
            return self
        return original(self, *args, **kwargs)

    return cuda


def installed() -> bool:
    """Whether megatron-core currently runs on the CPU stand-ins."""
    return _finder in sys.meta_path


def install() -> None:
    """Prepare every module of megatron-core, loaded or yet to be loaded. Does nothing the second time."""
    if installed():
        return
    sys.meta_path.insert(0, _finder)
    _put(torch.Tensor, "cuda", _tensor_cuda(torch.Tensor.cuda))
    for name, module in list(sys.modules.items()):
        if name.startswith(_PREFIX) and module is not None:
            _prepare(module)


def uninstall() -> None:
    """Undo :func:`install`, except that jit fusion stays off."""
    if not installed():
        return
    sys.meta_path.remove(_finder)
    while _undo:
        _undo.pop()()
