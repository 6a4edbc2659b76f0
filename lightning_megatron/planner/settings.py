"""What is planned for: the batch, how the package executes it, and what the user has already decided."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from lightning_megatron.errors import LayoutError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.planner.hardware import GIB, unknown
from lightning_megatron.planner.kernels import FUSED, KERNELS, MEGATRON_CORE, Kernels, LayerKernels

Precision = Literal["bf16-mixed", "bf16-true", "16-mixed", "32-true"]
PRECISIONS: tuple[Precision, ...] = ("bf16-mixed", "bf16-true", "16-mixed", "32-true")
AttentionKernel = Literal["flash", "fused_softmax", "torch_softmax"]
ATTENTION_KERNELS: tuple[AttentionKernel, ...] = ("flash", "fused_softmax", "torch_softmax")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one optimizer step trains on.

    Raises:
        ValueError: a size below one, or a precision that does not exist.
    """

    global_batch_size: int
    """Sequences per optimizer step, over all ranks."""
    seq_length: int
    """Tokens per sequence."""
    precision: Precision = "bf16-mixed"

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "seq_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, but must be at least 1.")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch_size * self.seq_length

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation, and of one weight as the forward reads it."""
        return 4 if self.precision == "32-true" else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """Which activations the backward recomputes; the same three fields as in a model configuration."""

    granularity: Literal["selective", "full"] | None = None
    method: Literal["uniform", "block"] | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if self.granularity == "full" and (self.method is None or not self.num_layers):
            raise ValueError("recompute_granularity=full needs recompute_method and recompute_num_layers.")
        if self.granularity != "full" and (self.method is not None or self.num_layers is not None):
            raise ValueError("recompute_method and recompute_num_layers belong to recompute_granularity=full.")

    def recomputed_layers(self, layers: int) -> int:
        """Layers of a chunk of ``layers`` whose forward runs again in the backward."""
        if self.granularity != "full":
            return 0
        return layers if self.method == "uniform" else min(layers, self.num_layers or 0)

    def __str__(self) -> str:
        if self.granularity == "full":
            return f"full, {self.method} {self.num_layers}"
        return self.granularity or "none"


NO_RECOMPUTE = Recompute()


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How the package executes a model: kernels in use, overheads, and fractions of the peaks that kernels reach.

    The defaults are this package on a current GPU. Each number says where it comes from; change one to plan for
    something else.
    """

    layers: LayerKernels | None = None
    """``fused`` are the package's own layers, as CUDA graphs; ``megatron_core`` its modules, run eagerly. ``None`` is
    ``fused`` with flash attention, and ``megatron_core`` with any other."""
    attention: AttentionKernel = "flash"
    """``flash`` never stores the scores; ``fused_softmax`` is the papers' 16-bit kernel; ``torch_softmax`` is
    megatron-core's fallback without Apex, which keeps the softmax in 32 bits and its 16-bit copy."""
    grad_reduce_in_fp32: bool | None = None
    """Accumulate and reduce gradients in 32 bits. ``None`` is what the precision means: in all but ``bf16-true``."""
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    matmul_efficiency: float | None = None
    """Fraction of the peak FLOP/s inside a matrix product; ``None`` is that of ``layers``."""
    bandwidth_efficiency: float = 0.8
    """Fraction of the memory bandwidth that element-wise kernels and norms reach; a plain copy reaches 0.9 of it."""
    host_seconds_per_layer: float | None = None
    """Host time to launch one layer's forward and backward on one micro-batch; ``None`` is that of ``layers``: 3.3 ms
    for megatron-core's, 0 for CUDA graphs."""
    host_seconds_optimizer_per_layer: float | None = None
    """Host time of one optimizer step for one layer's parameters; ``None`` is that of ``layers``."""
    context_bytes: float = 0.85 * GIB
    """CUDA context (0.5 GiB on an H100), cuBLAS workspaces and loaded kernels: outside PyTorch's allocator."""
    communicator_bytes: float = 0.4 * GIB
    """NCCL's buffers for one process group that is used, measured on an H100 with NCCL 2.28."""
    fragmentation: float = 0.05
    """Fraction of the allocated bytes that the caching allocator holds on top."""
    memory_fraction: float = 0.97
    """Fraction of a GPU's memory that a plan may fill."""

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION_KERNELS:
            raise unknown("attention", self.attention, ATTENTION_KERNELS)
        if self.layers is not None and self.layers not in KERNELS:
            raise unknown("layers", self.layers, KERNELS)
        if self.layers == "fused" and self.attention != "flash":
            raise ValueError(f"layers=fused computes attention=flash, not {self.attention}. Use layers=megatron_core.")

    @property
    def kernels(self) -> Kernels:
        """The constants of the layers in use, with those that are given here."""
        kernels = KERNELS[self.layers] if self.layers else FUSED if self.attention == "flash" else MEGATRON_CORE
        names = ("matmul_efficiency", "host_seconds_per_layer", "host_seconds_optimizer_per_layer")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(kernels, **given) if given else kernels

    def gradient_bytes(self, batch: Batch) -> int:
        """Bytes of one accumulated gradient."""
        if batch.precision == "32-true":
            return 4
        in_fp32 = batch.precision != "bf16-true" if self.grad_reduce_in_fp32 is None else self.grad_reduce_in_fp32
        return 4 if in_fp32 else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What the search must keep; ``None`` is free."""

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int | None = None
    sequence_parallel: bool | None = None
    micro_batch_size: int | None = None
    use_distributed_optimizer: bool | None = None
    recompute: Recompute | None = None

    def allows(self, name: str, value: object) -> bool:
        """Whether the field ``name`` is free, or equal to ``value``."""
        wanted = getattr(self, name)
        return wanted is None or wanted == value

    def given(self) -> dict[str, object]:
        """The fields that are not free."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @classmethod
    def of_layout(cls, layout: ParallelLayout, **others: object) -> Constraints:
        """Constraints that leave exactly one layout, such as ``ParallelLayout.parse("tp2_pp2_sp")``.

        Raises:
            LayoutError: expert parallelism, which the planner does not model.
        """
        if layout.expert_model_parallel_size > 1:
            raise LayoutError(
                f"expert_model_parallel_size={layout.expert_model_parallel_size}: the planner models dense "
                "Transformers only. Leave it out of the layout to plan."
            )
        return cls(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=layout.num_chunks,
            context_parallel_size=layout.context_parallel_size,
            sequence_parallel=layout.sequence_parallel,
            **others,  # type: ignore[arg-type]
        )
