"""Which implementation runs each part of a step on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_megatron.backends.extensions import APEX_NORM, EXTENSIONS, TRANSFORMER_ENGINE_NORMS, unavailable


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
        _extension("TransformerEngine", cuda),
        _extension("Apex", cuda),
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
    if not kernels.installed():
        why = "backends.kernels was uninstalled"
        return [
            Kernel("AdamW", f"{_core_optimizer('Adam').partition('.')[0]}'s", why),
            Kernel("gradient norm and clipping", "megatron-core's", why),
        ]
    one = cuda and gpu_adam_kernel.AVAILABLE
    adam = Kernel(
        "AdamW",
        "one Triton kernel with clipping and casts" if one else "torch.optim.AdamW",
        "CUDA and Triton" if one else ("there is no GPU" if not cuda else "Triton cannot be imported"),
    )
    norm = "multi-tensor, without host synchronisation"
    return [adam, Kernel("gradient norm and clipping", norm, "backends.kernels is installed")]


def _core_optimizer(name: str) -> str:
    """The module that megatron-core has its ``Adam`` or ``SGD`` from: TransformerEngine's, Apex's or torch's."""
    from megatron.core import optimizer

    return str(getattr(optimizer, name).__module__)


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


def _extension(package: str, cuda: bool) -> Kernel:
    """Which parts of TransformerEngine or Apex run, and why the others do not."""
    device_type = "cuda" if cuda else "cpu"
    parts = [extension for extension in EXTENSIONS if extension.package == package]
    reasons = {extension.part: unavailable(extension, device_type) for extension in parts}
    if (
        APEX_NORM in parts
        and reasons[APEX_NORM.part] is None
        and unavailable(TRANSFORMER_ENGINE_NORMS, device_type) is None
    ):
        reasons[APEX_NORM.part] = "TransformerEngine's runs instead"
    runs = [part for part, reason in reasons.items() if reason is None]
    choice = f"{' and '.join(runs)} of layers that run unfused" if runs else "not used"
    # megatron-core's own choice, which a GPU's parameters keep.
    if cuda and _core_optimizer("SGD").startswith(parts[0].module.partition(".")[0]):
        choice = f"{choice}; optimizer='sgd'" if runs else "optimizer='sgd'"
    told = {part: reason for part, reason in reasons.items() if reason is not None}
    if not told:
        return Kernel(package, choice, "installed; fused layers run the package's own kernels, which are faster")
    if len(told) == len(parts) and len(set(told.values())) == 1:
        return Kernel(package, choice, next(iter(told.values())))
    return Kernel(package, choice, "; ".join(f"{part}: {reason}" for part, reason in told.items()))
