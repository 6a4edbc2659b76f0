"""Parallel layouts: sizes of each kind of parallelism, rank arithmetic, and every check on sizes.

Standard library only: the planner, the command line and the error path of a mistyped configuration use it without
importing torch. Megatron-LM keeps these guards in its argument parser (``megatron/training/arguments.py``), so users of
megatron-core alone meet them as hangs or wrong numbers; here they run before any process group exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import NamedTuple

from lightning_megatron.errors import LayoutError


class Coordinates(NamedTuple):
    """Where one rank sits in the grid of ranks. Each is an index into the group of that name."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """How one model is spread over processes. Data parallelism takes the ranks that are left over.

    Raises:
        LayoutError: sizes below one, or combinations that megatron-core cannot run.
    """

    tensor_model_parallel_size: int = 1
    """Ranks that share each weight matrix (Shoeybi et al. 2019, arXiv:1909.08053)."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers (1F1B: Narayanan et al. 2021, arXiv:2104.04473)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers per stage, for the interleaved schedule. ``None`` or 1 is plain 1F1B."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a mixture-of-experts layer. They are taken from the data-parallel ranks."""
    sequence_parallel: bool = False
    """Split layer norms and dropouts along the sequence over the tensor-parallel ranks (arXiv:2205.05198)."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, when it should hold fewer because of the embedding."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, when it should hold fewer because of the loss."""
    pipeline_model_parallel_layout: str | None = None
    """An explicit stage layout in megatron-core's notation, such as ``"E,t|t*3|t*3,L"``; see :meth:`stage_sizes`."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        ):
            size = getattr(self, name)
            if size is None and "virtual" not in name and "num_layers" not in name:
                raise LayoutError(f"{name} is None, but must be a whole number of at least 1.")
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise LayoutError(f"{name}={size!r}, but must be a whole number of at least 1.")
        if self.virtual_pipeline_model_parallel_size == 1:
            object.__setattr__(self, "virtual_pipeline_model_parallel_size", None)
        if self.virtual_pipeline_model_parallel_size is not None and self.pipeline_model_parallel_size == 1:
            raise LayoutError(
                f"virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size} interleaves the "
                "stages of a pipeline, but pipeline_model_parallel_size=1. Set pipeline_model_parallel_size to at "
                "least 2, or leave virtual_pipeline_model_parallel_size out."
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise LayoutError(
                "sequence_parallel=True splits sequences over the tensor-parallel ranks, but "
                "tensor_model_parallel_size=1. Set tensor_model_parallel_size to at least 2, or leave "
                "sequence_parallel out."
            )
        uneven = (self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage)
        if any(size is not None for size in uneven):
            if self.pipeline_model_parallel_size == 1:
                raise LayoutError(
                    "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage need "
                    "pipeline_model_parallel_size of at least 2, but it is 1."
                )
            if self.pipeline_model_parallel_layout is not None:
                raise LayoutError(
                    "Give either pipeline_model_parallel_layout or num_layers_in_first/last_pipeline_stage, not both."
                )

    # ------------------------------------------------------------------ sizes

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def num_chunks(self) -> int:
        """Model chunks per rank: the virtual pipeline size, or 1."""
        return self.virtual_pipeline_model_parallel_size or 1

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in ``world_size`` ranks.

        Raises:
            LayoutError: ``world_size`` is not a multiple of TP x PP x CP, or EP does not divide the replicas.
        """
        if world_size < 1 or world_size % self.model_parallel_size:
            raise LayoutError(
                f"The world size of {world_size} is not divisible by tensor_model_parallel_size="
                f"{self.tensor_model_parallel_size} x pipeline_model_parallel_size={self.pipeline_model_parallel_size} "
                f"x context_parallel_size={self.context_parallel_size} = {self.model_parallel_size}. Start a multiple "
                f"of {self.model_parallel_size} processes (`Trainer(devices=..., num_nodes=...)`), or change the "
                "layout."
            )
        size = world_size // self.model_parallel_size
        experts = self.expert_model_parallel_size
        # Experts are spread over all ranks of a pipeline stage, TP x CP x DP of them.
        if (world_size // self.pipeline_model_parallel_size) % experts:
            raise LayoutError(
                f"expert_model_parallel_size={experts} does not divide the "
                f"{world_size // self.pipeline_model_parallel_size} ranks of a pipeline stage."
            )
        return size

    def coordinates(self, rank: int, world_size: int) -> Coordinates:
        """The place of ``rank``, in megatron-core's default order: tensor fastest, then context, data, pipeline."""
        data = self.data_parallel_size(world_size)
        rank, tensor = divmod(rank, self.tensor_model_parallel_size)
        rank, context = divmod(rank, self.context_parallel_size)
        pipeline, data_rank = divmod(rank, data)
        return Coordinates(tensor=tensor, context=context, data=data_rank, pipeline=pipeline)

    # ----------------------------------------------------------------- guards

    def check_experts(self, num_moe_experts: int | None, *, add_bias_linear: bool) -> None:
        """Raise :class:`LayoutError` unless a model with so many experts, or ``None``, can be split this way."""
        size = self.expert_model_parallel_size
        if num_moe_experts is None:
            if size > 1:
                raise LayoutError(
                    f"expert_model_parallel_size={size}, but the model has no experts. Set num_moe_experts, or "
                    "expert_model_parallel_size=1."
                )
            return
        if num_moe_experts % size:
            fit = ", ".join(str(n) for n in range(1, num_moe_experts + 1) if num_moe_experts % n == 0)
            raise LayoutError(
                f"num_moe_experts={num_moe_experts} is not divisible by expert_model_parallel_size={size}. Sizes that "
                f"fit: {fit}."
            )
        tp = self.tensor_model_parallel_size
        if tp > 1 and not self.sequence_parallel:
            raise LayoutError(f"Experts with tensor_model_parallel_size={tp} need sequence_parallel=True.")
        if tp > 1 and add_bias_linear:
            raise LayoutError(
                f"Experts with biases cannot be split over tensor_model_parallel_size={tp} ranks, each of which would "
                "add them. Set add_bias_linear=False, or tensor_model_parallel_size=1."
            )

    def check_model(
        self,
        *,
        num_layers: int,
        num_attention_heads: int,
        num_query_groups: int | None = None,
        ffn_hidden_size: int | None = None,
    ) -> None:
        """Raise :class:`LayoutError` unless a Transformer of these sizes can be split this way."""
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        groups, ffn = num_query_groups or num_attention_heads, ffn_hidden_size or 0

        def wrong(size: int) -> str | None:
            if num_attention_heads % size:
                return f"num_attention_heads={num_attention_heads} is not divisible by"
            if groups % size and size % groups:
                return f"num_query_groups={groups} neither divides nor is divisible by"
            return f"ffn_hidden_size={ffn} is not divisible by" if ffn % size else None

        if wrong(tp):
            fit = ", ".join(str(size) for size in range(1, num_attention_heads + 1) if not wrong(size))
            raise LayoutError(f"{wrong(tp)} tensor_model_parallel_size={tp}. Sizes that fit the model: {fit}.")
        self._check_layers(num_layers, pp)

    def _check_layers(self, num_layers: int, pp: int) -> None:
        if self.pipeline_model_parallel_layout is not None:
            return  # megatron-core parses and checks its own notation
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        layers = num_layers - (first or 0) - (last or 0)
        stages = pp - (first is not None) - (last is not None)
        if layers < 0 or (stages == 0 and layers != 0):
            raise LayoutError(
                f"num_layers={num_layers}, but the first stage takes {first} and the last {last} of them; "
                f"{layers} layers remain for {stages} stages."
            )
        if stages and layers % stages:
            raise LayoutError(
                f"num_layers={num_layers} leaves {layers} layers for {stages} pipeline stages, which do not divide "
                f"them evenly (pipeline_model_parallel_size={pp}). Choose another size, or set "
                "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage."
            )
        chunks = self.num_chunks
        for where, size in (("first", first), ("middle", layers // stages if stages else None), ("last", last)):
            if size is not None and size % chunks:
                raise LayoutError(
                    f"The {where} pipeline stage holds {size} layers, which virtual_pipeline_model_parallel_size="
                    f"{chunks} chunks do not divide (num_layers={num_layers}, pipeline_model_parallel_size={pp})."
                )

    def check_sequence(self, seq_length: int) -> None:
        """Raise :class:`LayoutError` unless sequences of this length can be split over the ranks."""
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        need = (tp if self.sequence_parallel else 1) * (2 * cp if cp > 1 else 1)
        if seq_length % need:
            reasons = []
            if self.sequence_parallel:
                reasons.append(f"sequence_parallel over tensor_model_parallel_size={tp}")
            if cp > 1:
                reasons.append(f"2 x context_parallel_size={cp}")
            raise LayoutError(
                f"The sequence length of {seq_length} is not divisible by {need} ({' and '.join(reasons)}). "
                f"Pad the sequences to a multiple of {need}."
            )

    def check_global_batch(self, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
        """Micro-batches per schedule for this global batch.

        Raises:
            LayoutError: the global batch is not a multiple of micro-batch x data-parallel size.
        """
        data = self.data_parallel_size(world_size)
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * data):
            raise LayoutError(
                f"global_batch_size={global_batch_size} is not divisible by micro_batch_size={micro_batch_size} x "
                f"data-parallel size={data} = {micro_batch_size * data}. Change one of the three."
            )
        return global_batch_size // (micro_batch_size * data)

    # ------------------------------------------------------------------ names

    def __str__(self) -> str:
        """Short form, such as ``"tp2_pp2_vpp2_sp"``; ``"tp1"`` when nothing is split."""
        parts = [
            (self.tensor_model_parallel_size, "tp"),
            (self.pipeline_model_parallel_size, "pp"),
            (self.num_chunks, "vpp"),
            (self.context_parallel_size, "cp"),
            (self.expert_model_parallel_size, "ep"),
        ]
        names = [f"{name}{size}" for size, name in parts if size > 1] + (["sp"] if self.sequence_parallel else [])
        return "_".join(names) or "tp1"

    @classmethod
    def parse(cls, text: str) -> ParallelLayout:
        """The layout of a short form such as ``"tp2_pp4_sp"``; the inverse of ``str``.

        Raises:
            LayoutError: a part that is none of tpN, ppN, vppN, cpN, epN, sp.
        """
        names = {
            "tp": "tensor_model_parallel_size",
            "pp": "pipeline_model_parallel_size",
            "vpp": "virtual_pipeline_model_parallel_size",
            "cp": "context_parallel_size",
            "ep": "expert_model_parallel_size",
        }
        sizes: dict[str, int] = {}
        sequence_parallel = False
        for part in filter(None, text.split("_")):
            match = re.fullmatch(r"(tp|pp|vpp|cp|ep)(\d+)", part)
            if part == "sp":
                sequence_parallel = True
            elif match is None:
                raise LayoutError(f"{part!r} in the layout {text!r} is none of tpN, ppN, vppN, cpN, epN, sp.")
            else:
                sizes[names[match[1]]] = int(match[2])
        return cls(sequence_parallel=sequence_parallel, **sizes)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, int | bool | str | None]:
        """All fields by name, for metadata and logs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
