"""Which implementation runs each part of a step on this machine, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kernel:
    """A part of a step, what runs it, and why that."""

    part: str
    choice: str
    why: str


def report() -> list[Kernel]:
    """All parts. Imports the package's models, and so megatron-core."""
    import torch

    cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    return [
        *_attention(cuda, capability),
        _layers(cuda),
        *_optimizer(cuda),
        _index_builders(),
        _core(cuda),
        _extension("TransformerEngine", "transformer_engine"),
        _extension("Apex", "apex"),
    ]


def _attention(cuda: bool, capability: tuple[int, int]) -> list[Kernel]:
    if not cuda:
        return [
            Kernel("attention", "torch scaled dot product attention", "its CPU kernel; there is no GPU"),
            Kernel("attention with masks", "the same, with the mask as a tensor", "FlexAttention needs CUDA"),
        ]
    from lightning_megatron.models import cudnn_attention

    name = f"sm_{capability[0]}{capability[1]}"
    flash = capability >= (8, 0)
    plain = Kernel(
        "attention",
        "FlashAttention, in torch" if flash else "memory-efficient attention, in torch",
        f"{name} {'has' if flash else 'is older than'} the instructions of FlashAttention (sm_80); 16-bit weights",
    )
    masked = Kernel("attention with masks", "FlexAttention, in torch", "documents and biases stay in rows")
    reason = cudnn_attention.unavailable()
    alibi = Kernel(
        "ALiBi",
        "cuDNN" if reason is None else "FlexAttention, in torch",
        "nvidia-cudnn-frontend is installed; long sequences without tensor parallelism" if reason is None else reason,
    )
    return [plain, masked, alibi]


def _layers(cuda: bool) -> Kernel:
    from lightning_megatron.models.fused import ops

    if cuda and ops.HAVE_TRITON:
        return Kernel("layers and loss", "fused Triton kernels", "CUDA, and Triton is installed; GPTModule.fused")
    why = "there is no GPU" if not cuda else "Triton cannot be imported: pip install triton"
    return Kernel("layers and loss", "torch operations", why)


def _optimizer(cuda: bool) -> list[Kernel]:
    from lightning_megatron.backends import core, gpu_adam_kernel, kernels

    assert core is not None  # importing it installs the kernels
    one = cuda and gpu_adam_kernel.AVAILABLE
    adam = Kernel(
        "AdamW",
        "one Triton kernel with clipping and casts" if one else "torch.optim.AdamW",
        "CUDA and Triton" if one else ("there is no GPU" if not cuda else "Triton cannot be imported"),
    )
    norm = Kernel(
        "gradient norm and clipping",
        "multi-tensor, without host synchronisation" if kernels.installed() else "megatron-core's loops",
        "backends.kernels is installed" if kernels.installed() else "backends.kernels was uninstalled",
    )
    return [adam, norm]


def _index_builders() -> Kernel:
    from lightning_megatron.data.native import helpers
    from lightning_megatron.errors import DataError

    try:
        helpers()
    except DataError as error:
        return Kernel("dataset indices", "none", str(error))
    return Kernel("dataset indices", "megatron-core's compiled helpers", "they came with its wheel")


def _core(cuda: bool) -> Kernel:
    from lightning_megatron.backends import cpu

    if cpu.installed():
        return Kernel("megatron-core", "with the CPU stand-ins, over gloo", "there is no GPU")
    return Kernel("megatron-core", "as it is, over NCCL", "CUDA" if cuda else "the stand-ins were uninstalled")


def _extension(name: str, module: str) -> Kernel:
    found = importlib.util.find_spec(module) is not None
    return Kernel(name, "not used", "installed, but the package's own kernels run" if found else "not needed")
