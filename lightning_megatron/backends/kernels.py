"""Gradient norm, clipping, copies and AdamW for megatron-core's optimizers, from torch and triton alone.

Without TransformerEngine or Apex, megatron-core falls back to loops over parameters: one host synchronisation per
parameter for the gradient norm, one kernel per parameter for scaling and for copying master weights, and torch's
``AdamW`` unfused. For gpt2-large that is 436 synchronisations and over 2,000 launches a step.

:func:`install` replaces them with multi-tensor implementations that never wait for the device: the gradient norm and
the clip coefficient stay tensors. megatron-core offers no hook for these (it picks them at import, as module globals),
so this file rebinds the globals; ``tests/backends/test_kernels.py`` fails when an upgrade moves one. The values are
those of megatron-core's own functions, on CPU and on CUDA.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_megatron.backends.fused_adam import FusedAdam, clip_gradients


class Replacement(NamedTuple):
    """One global of a megatron-core module (or attribute of one of its classes) and what takes its place."""

    module: str
    name: str
    value: Callable[[Any], Any]
    """From the original to its replacement."""
    owner: str | None = None
    """The class that has the attribute, when it is a method."""


def get_grad_norm_fp32(
    grads_for_norm: list[Tensor] | Tensor,
    norm_type: int | float = 2,
    grad_stats_parallel_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The p-norm of all gradients, seen as one vector over the ranks of the group.

    Returns:
        A tensor of shape ``[1]`` on the gradients' device. megatron-core's function returns a float, which makes the
        host wait for the whole backward; ``float(norm)`` does so where the number is needed.
    """
    grads = [grads_for_norm] if isinstance(grads_for_norm, Tensor) else grads_for_norm
    if _has_dtensor(grads):
        return _original("megatron.core.optimizer.clip_grads", "get_grad_norm_fp32")(
            grads_for_norm, norm_type, grad_stats_parallel_group
        )
    p = float(norm_type)
    # A rank without gradients (a frozen stage) still takes part in the collective.
    device = grads[0].device if grads else _default_device(grad_stats_parallel_group)
    if not grads:
        total = torch.zeros(1, device=device)
    else:
        norms = torch.stack(torch._foreach_norm(grads, p, dtype=torch.float32))
        total = torch.linalg.vector_norm(norms, p).reshape(1)
    if p == float("inf"):
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=grad_stats_parallel_group)
        return total
    total = total.pow(p)
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=grad_stats_parallel_group)
    return total.pow(1.0 / p)


def clip_grad_by_total_norm_fp32(
    parameters: list[Tensor] | Tensor,
    max_norm: int | float,
    total_norm: float | Tensor,
    use_decoupled_grad: bool = False,
) -> None:
    """Scale the gradients by ``min(1, max_norm / (total_norm + 1e-6))``, without asking the device for the norm.

    Where a :class:`FusedAdam` runs as one kernel, it gets the coefficient instead: the kernel multiplies while it reads
    the gradient, which saves a read and a write of every gradient. ``.grad`` then stays unclipped.
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if use_decoupled_grad or _has_dtensor(p.grad for p in params if p.grad is not None):
        _original("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32")(
            params, max_norm, total_norm, use_decoupled_grad
        )
        return
    with_grad = [p for p in params if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    if not grads:
        return
    wrong = {g.dtype for g in grads} - {torch.float32, torch.bfloat16}
    if wrong:
        raise TypeError(f"Gradients of {wrong} reached the clipping, which takes float32 and bfloat16.")
    if not isinstance(total_norm, Tensor):
        total_norm = torch.tensor([total_norm], dtype=torch.float32, device=grads[0].device)
    clip_gradients(with_grad, total_norm.to(grads[0].device), max_norm)


def multi_tensor_copy(this: list[Tensor], that: list[Tensor], overflow_buf: Tensor | None = None) -> None:
    """Copy each tensor of ``this`` into its partner in ``that``, casting, in a handful of launches."""
    if overflow_buf is not None:
        overflow_buf.fill_(0)
    if this:
        torch._foreach_copy_(that, this)


def _copy_float16(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``Float16OptimizerWithFloat16Params``: copy in one go, unless the optimizer's kernel has written the weights."""

    def copy_main_params_to_model_params(self: Any) -> None:
        if not _wrote_model_params(self.optimizer):
            groups = zip(self.fp32_from_float16_groups, self.float16_groups, strict=True)
            _copy_and_hand_over(self.optimizer, [pair for g in groups for pair in zip(*g, strict=True)])

    return copy_main_params_to_model_params


def _copy_distributed(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``DistributedOptimizer``: the same, for this rank's shards of the parameter buffers."""

    def copy_main_params_to_model_params(self: Any) -> None:
        if self.is_stub_optimizer or not _has_plain_buffers(self):
            original(self)
        elif not _wrote_model_params(self.optimizer):
            _copy_and_hand_over(self.optimizer, _shard_pairs(self))

    return copy_main_params_to_model_params


def _wrote_model_params(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, FusedAdam) and optimizer.wrote_model_params


def _copy_and_hand_over(optimizer: torch.optim.Optimizer, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy masters to model weights; an optimizer that can does so itself from its next step on."""
    multi_tensor_copy([main.data for main, _ in pairs], [model.data for _, model in pairs])
    if isinstance(optimizer, FusedAdam):
        optimizer.set_model_params(pairs)


def _has_plain_buffers(optimizer: Any) -> bool:
    """Neither FSDP nor 8- or 4-bit weights nor masters inside the optimizer: the case that the fast copy knows."""
    ddp = optimizer.ddp_config
    return not (
        ddp.use_megatron_fsdp
        or ddp.fp8_param_gather
        or ddp.fp4_param_gather
        or optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    )


def _shard_pairs(optimizer: Any) -> list[tuple[Tensor, Tensor]]:
    """``(master shard, the slice of the parameter buffer it belongs to)``, flat, for all parameters of this rank."""
    pairs = []
    for mains, models in (
        (optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups),
        (optimizer.shard_fp32_groups, optimizer.model_fp32_groups),
    ):
        for main_group, model_group in zip(mains, models, strict=True):
            for main, model in zip(main_group, model_group, strict=True):
                where = optimizer._get_model_param_range_map(model)["gbuf_world_in_bucket"]
                buffer, _, bucket = optimizer.model_param_gbuf_map[model]
                shard = optimizer.buffers[buffer].buckets[bucket].param_data.view(-1)[where.start : where.end]
                if shard.data_ptr() != main.data_ptr():  # a float32 model's shards are the weights themselves
                    pairs.append((main, shard))
    return pairs


def _has_dtensor(tensors: Iterable[Tensor | None]) -> TypeGuard[list[DTensor]]:
    return any(isinstance(t, DTensor) for t in tensors)


def _default_device(group: dist.ProcessGroup | None) -> torch.device:
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else torch.device("cuda")


def _bias_beside_frozen_weight(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``linear_with_frozen_weight``, whose backward returns no gradient of the bias: the bias is added outside."""

    @functools.wraps(original)
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        output = original(input, weight, None, *args, **kwargs)
        return output if bias is None else output + bias

    return linear


def _sgd(original: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """TransformerEngine's or Apex's ``FusedSGD``, which megatron-core takes where installed, for a GPU's parameters."""
    if original is torch.optim.SGD:
        return original

    @functools.wraps(original, updated=())
    def build(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
        on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
        return (original if on_gpu else torch.optim.SGD)(groups, **options)

    return build


def _distributed_with_sgd(original: Callable[..., None]) -> Callable[..., None]:
    """``DistributedOptimizer``, which refuses SGD for megatron-core's own checkpoints: these need a function that fills
    the optimizer's state, which it has for Adam alone. The package's checkpoints fill it by themselves."""

    @functools.wraps(original)
    def construct(
        self: Any, optimizer: Any, config: Any, grad_scaler: Any, init_state_fn: Any, *args: Any, **options: Any
    ) -> None:
        if init_state_fn is None and isinstance(optimizer, torch.optim.SGD):
            init_state_fn = _fill_sgd_state
        original(self, optimizer, config, grad_scaler, init_state_fn, *args, **options)

    return construct


def _fill_sgd_state(optimizer: Optimizer, config: Any = None) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


# Every module that has imported a function by name holds a reference of its own.
REPLACEMENTS = (
    *(
        Replacement(f"megatron.core.{module}", "get_grad_norm_fp32", lambda _: get_grad_norm_fp32)
        for module in ("optimizer.clip_grads", "optimizer.optimizer", "optimizer.layer_wise_optimizer")
    ),
    *(
        Replacement(f"megatron.core.{module}", "clip_grad_by_total_norm_fp32", lambda _: clip_grad_by_total_norm_fp32)
        for module in ("optimizer.clip_grads", "optimizer.optimizer")
    ),
    Replacement("megatron.core.optimizer.optimizer", "_multi_tensor_copy_this_to_that", lambda _: multi_tensor_copy),
    Replacement(
        "megatron.core.optimizer.optimizer",
        "_copy_main_params_to_model_params",
        _copy_float16,
        owner="Float16OptimizerWithFloat16Params",
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer",
        "_copy_main_params_to_model_params",
        _copy_distributed,
        owner="DistributedOptimizer",
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer", "__init__", _distributed_with_sgd, owner="DistributedOptimizer"
    ),
    Replacement("megatron.core.tensor_parallel.layers", "linear_with_frozen_weight", _bias_beside_frozen_weight),
    # With this flag unset, `get_megatron_optimizer` builds `Adam(..., adam_w_mode=...)` instead of torch.optim.AdamW.
    Replacement("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", lambda _: False),
    Replacement("megatron.core.optimizer", "Adam", lambda _: FusedAdam),
    Replacement("megatron.core.optimizer", "SGD", _sgd),
)

_originals: dict[Replacement, Any] = {}


def _owner(replacement: Replacement) -> Any:
    module = importlib.import_module(replacement.module)
    return module if replacement.owner is None else getattr(module, replacement.owner)


def _original(module: str, name: str) -> Any:
    for replacement, value in _originals.items():
        if (replacement.module, replacement.name) == (module, name):
            return value
    return getattr(importlib.import_module(module), name)


def installed() -> bool:
    """Whether megatron-core uses the functions of this module."""
    return bool(_originals)


def install() -> None:
    """Let optimizers that megatron-core builds from now on use this module's functions. Twice is the same as once."""
    if _originals:
        return
    for replacement in REPLACEMENTS:
        owner = _owner(replacement)
        _originals[replacement] = getattr(owner, replacement.name)
        setattr(owner, replacement.name, replacement.value(_originals[replacement]))


def uninstall() -> None:
    """Give megatron-core its own functions back."""
    while _originals:
        replacement, value = _originals.popitem()
        setattr(_owner(replacement), replacement.name, value)
