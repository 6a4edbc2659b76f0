"""Megatron-LM's files of one rank each: ``iter_0000000`` or ``release``, ``mp_rank_TT[_PPP]/model_optim_rng.pt``.

Three shapes were published: tensors under ``model.language_model`` (before megatron-core; GPT and BERT are written so),
flat names of megatron-core, and the former with orders of queries, keys and values of checkpoint versions 0 and 1.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop import safe_pickle
from lightning_megatron.interop.core_model import CoreSpec, Identity
from lightning_megatron.interop.core_names import core_name, is_weight, numbered, partition_dim, stored_name
from lightning_megatron.interop.megatron_args import OURS, from_args
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import T5Config, TransformerModelConfig

_FILES = ("model_optim_rng.pt", "model_rng.pt")
_DIRECTORY = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?$")
_GATED = "mlp.linear_fc1."

# (theirs, ours); a decoder's layers that attend to an encoder are the only ones with three norms.
_LAYER_NAMES = (
    ("self_attention.query_key_value", "self_attention.linear_qkv"),
    ("self_attention.dense", "self_attention.linear_proj"),
    ("inter_attention.query.", "cross_attention.linear_q."),
    ("inter_attention.key_value", "cross_attention.linear_kv"),
    ("inter_attention.dense", "cross_attention.linear_proj"),
    ("mlp.dense_h_to_4h", "mlp.linear_fc1"),
    ("mlp.dense_4h_to_h", "mlp.linear_fc2"),
)
_HEADS = (
    ("language_model.pooler.", "pooler."),
    ("language_model.output_layer.", "output_layer."),
    ("lm_head.layernorm.", "lm_head.layer_norm."),
    ("lm_head.norm.", "lm_head.layer_norm."),
    ("lm_head.bias", "output_layer.bias"),
)
_COPIES = ("word_embeddings_for_head.", "word_embeddings.")


@dataclass(frozen=True)
class LegacyCheckpoint:
    """A model in files of one rank each, which are mapped, not loaded."""

    identity: Identity
    specs: Mapping[str, CoreSpec]
    parts: Mapping[str, list[Tensor]]
    """Of each tensor, by tensor-parallel rank; one if all hold it whole."""
    orders: Callable[[str, Tensor], Tensor]
    """Puts one rank's queries, keys and values into today's order."""

    @classmethod
    def open(
        cls, path: Path, *, vocab_size: int | None = None, config: TransformerModelConfig | None = None
    ) -> LegacyCheckpoint:
        """The directory of one iteration.

        Args:
            vocab_size: of the tokenizer, if known.
            config: if the files carry no arguments.

        Raises:
            CheckpointError: a rank's file is missing, damaged, or asks for objects that Megatron-LM does not write; no
                arguments; or a model that this package does not have.
        """
        grid = _grid(path)
        stages = [[safe_pickle.load(file) for file in stage] for stage in grid]
        first = stages[0][0]
        if not isinstance(first, dict) or ("model" not in first and "model0" not in first):
            raise CheckpointError(f"{grid[0][0]} has no 'model', so it is no checkpoint of Megatron-LM.")
        parts = _parts(stages)
        gated = _GATED + "weight"
        args = first.get("args")
        swiglu = bool(getattr(args, "swiglu", False)) or bool(getattr(config, "gated_linear_unit", False))
        swiglu = bool((getattr(args, OURS, None) or {}).get("config", {}).get("gated_linear_unit", swiglu))
        specs = {
            name: CoreSpec(_joined_shape(name, [tensor.shape for tensor in held]), held[0].dtype)
            for name, held in parts.items()
        }
        identity = Identity(config) if config else from_args(args, specs, vocab_size, grid[0][0])
        if getattr(identity.config, "share_embeddings_and_output_weights", False):
            for copy in (parts, specs):
                copy.pop("output_layer.weight", None)  # the last stage's
        version = float(first.get("checkpoint_version") or 0)
        layer = next((held for name, held in parts.items() if name.endswith(gated)), None)
        if layer is None:
            raise CheckpointError(f"{grid[0][0]} has no Transformer layers: {sorted(parts)[:5]}.")
        core = "model" in first and "language_model" not in first["model"]
        heads = identity.config.num_attention_heads

        def order(name: str, tensor: Tensor) -> Tensor:
            if core or version >= 2 or ("linear_qkv" not in name and "linear_kv" not in name):
                return tensor
            return _reordered(tensor, version, heads // len(parts[name]), 3 if "linear_qkv" in name else 2)

        return cls(identity, specs, {n: _chunked(n, held, swiglu) for n, held in parts.items()}, order)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        dim = partition_dim(name)
        held = [self.orders(name, tensor) for tensor in self.parts[name]]
        return held[0] if dim is None or len(held) == 1 else torch.cat(held, dim=dim)


def _grid(path: Path) -> list[list[Path]]:
    """The file of each pipeline stage and tensor-parallel rank."""
    found: dict[tuple[int, int], Path] = {}
    for directory in sorted(path.glob("mp_rank_*")):
        file = next((directory / name for name in _FILES if (directory / name).is_file()), None)
        match = _DIRECTORY.match(directory.name)
        if file is None:
            continue  # a data-parallel rank's part of the optimizer
        if match is None:
            raise CheckpointError(f"{directory} is of a mixture of experts, which cannot be converted.")
        found[int(match[2] or 0), int(match[1])] = file
    if not found:
        raise CheckpointError(f"{path} has no mp_rank_TT[_PPP]/{_FILES[0]}.")
    stages, ranks = (max(index) + 1 for index in zip(*found, strict=True))
    missing = [f"mp_rank_{t:02d}_{p:03d}" for p in range(stages) for t in range(ranks) if (p, t) not in found]
    if missing:
        raise CheckpointError(
            f"{path} has the files of {len(found)} ranks, but {stages} pipeline stages x {ranks} tensor-parallel ranks "
            f"have {stages * ranks}. Missing: {', '.join(missing)}."
        )
    return [[found[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _parts(stages: list[list[Any]]) -> dict[str, list[Tensor]]:
    """Tensors of all stages by our names, with the layers' numbers in the whole model."""
    chunks = [key for key in ("model", *(f"model{index}" for index in range(64))) if key in stages[0][0]]
    found: dict[str, list[Tensor]] = {}
    offsets: dict[str, int] = {}
    flats = [[[dict(_flat(rank[chunk])) for rank in stage] for stage in stages] for chunk in chunks]
    names = {name for stage in flats[0] for name in stage[0]}
    bert = any("lm_head.dense" in n or "tokentype" in n for n in (*names, *flats[-1][-1][0]))
    stack = "encoder" if bert else "decoder"
    both = any(name.startswith(("language_model.decoder.", "decoder.")) for name in names) and any(
        name.startswith(("language_model.encoder.", "encoder.")) for name in names
    )
    for chunk in flats:  # an interleaved schedule's chunks: all stages' first ones come before the second ones
        for stage in chunk:
            counts: dict[str, int] = {}
            for theirs in stage[0]:
                name = _core_name(theirs, "encoder" if both else stack)
                if name is None:
                    continue
                if (layer := numbered(name)) is not None:
                    counts[layer[0]] = max(counts.get(layer[0], 0), layer[1] + 1)
                    name = f"{layer[0]}.{layer[1] + offsets.get(layer[0], 0)}.{layer[2]}"
                held = [rank[theirs] for rank in stage]
                found.setdefault(name, held[:1] if partition_dim(name) is None else held)
            for key, count in counts.items():
                offsets[key] = offsets.get(key, 0) + count
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif torch.is_tensor(value):
            yield prefix + key, value


def _core_name(theirs: str, stack: str) -> str | None:
    """Our name of a tensor, with the layer's number in its stage; ``None`` for a copy of another, or no weight.

    Args:
        stack: ours of what they call ``language_model.transformer`` or ``encoder``.
    """
    if theirs.startswith(_COPIES) or not is_weight(theirs):
        return None
    if theirs.startswith(("embedding.", "decoder.", "encoder.")) or "relative_pos_emb" in theirs:
        return core_name(theirs)
    for old, new in _HEADS:
        if theirs.startswith(old):
            return theirs.replace(old, new, 1)
    match = re.match(r"language_model\.(embedding|transformer|encoder|decoder)\.(.*)$", theirs)
    if match is None:
        return core_name(theirs)
    part, rest = match[1], match[2]
    if part == "embedding":
        return f"embedding.{rest}"
    rest = re.sub(r"(^|\.)attention\.", r"\1self_attention.", rest).replace("_norm.", "_layernorm.")
    for old, new in _LAYER_NAMES:
        rest = rest.replace(old, new)
    if part == "decoder":
        rest = rest.replace("post_attention_layernorm", "pre_cross_attn_layernorm")
        rest = rest.replace("post_inter_attention_layernorm", "pre_mlp_layernorm")
    rest = rest.replace("post_attention_layernorm", "pre_mlp_layernorm")
    return f"{'decoder' if part == 'decoder' else stack}.{rest}"


def _joined_shape(name: str, shapes: list[torch.Size]) -> tuple[int, ...]:
    shape, dim = list(shapes[0]), partition_dim(name)
    if dim is not None:
        shape[dim] = sum(part[dim] for part in shapes)
    return tuple(shape)


def _chunked(name: str, held: list[Tensor], gated: bool) -> list[Tensor]:
    """Each rank has its gates above its values; whole, all gates come first."""
    if not gated or _GATED not in name:
        return held
    return [tensor.chunk(2)[half] for half in (0, 1) for tensor in held]


def _reordered(tensor: Tensor, version: float, heads: int, splits: int) -> Tensor:
    """One rank's rows of version 0, ``[splits, heads, width]``, or 1, ``[heads, width, splits]``, as today's."""
    rest = tensor.shape[1:]
    if version == 0:
        return tensor.view(splits, heads, -1, *rest).transpose(0, 1).reshape(tensor.shape)
    return tensor.view(heads, -1, splits, *rest).transpose(1, 2).reshape(tensor.shape)


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class LegacyTarget:
    """The directory of one iteration to write."""

    path: Path
    identity: Identity
    layout: ParallelLayout
    data_parallel_size: int
    use_distributed_optimizer: bool
    specs: Mapping[str, CoreSpec]
    """All tensors, vocabularies padded."""


def write(target: LegacyTarget, read: Callable[[str], Tensor], args: argparse.Namespace) -> Iterator[str]:
    """Write one rank's file after the other; yields each one's directory when it is there.

    Raises:
        CheckpointError: a layout that this format does not have.
    """
    config: Any = target.identity.config
    ranks, stages = target.layout.tensor_model_parallel_size, target.layout.pipeline_model_parallel_size
    groups = config.num_query_groups or config.num_attention_heads
    if groups % ranks:
        raise CheckpointError(
            f"num_query_groups={groups} is not divisible by the target tensor-parallel size of {ranks}, and a rank's "
            f"file holds whole groups. Take a size that divides {groups}, or --to megatron, which any size loads."
        )
    if stages > 1 and isinstance(config, T5Config):
        raise CheckpointError(
            f"Files of a T5 in {stages} pipeline stages have no agreed shape. Take a target pipeline-parallel size of "
            "1, or --to megatron or lightning, which any size loads."
        )
    for stage in range(stages):
        names = _of_stage(target.specs, stage, stages, config)
        for rank in range(ranks):
            directory = target.path / (f"mp_rank_{rank:02d}" if stages == 1 else f"mp_rank_{rank:02d}_{stage:03d}")
            directory.mkdir(parents=True)
            tensors = {name: _cut(name, read(core), rank, ranks, config) for name, core in names}
            content = {
                "args": args,
                "checkpoint_version": 3.0,
                "iteration": target.identity.iteration,
                "model": _shape_of_model(tensors, config),
            }
            torch.save(content, directory / _FILES[1 if target.use_distributed_optimizer else 0])
            if target.use_distributed_optimizer:
                _write_empty_optimizers(directory, target.data_parallel_size)
            yield directory.name


def _of_stage(specs: Iterable[str], stage: int, stages: int, config: Any) -> list[tuple[str, str]]:
    """Our names with the layers' numbers in the stage, and in the model."""
    per_stage = config.num_layers // stages
    found: list[tuple[str, str]] = []
    for name in specs:
        layer = numbered(name)
        if layer is not None and not isinstance(config, T5Config):
            if layer[1] // per_stage == stage:
                found.append((f"{layer[0]}.{layer[1] % per_stage}.{layer[2]}", name))
        elif layer is not None:
            found.append((name, name))
        elif name.startswith("embedding."):
            if stage == 0:
                found.append((name, name))
        elif stage == stages - 1:
            found.append((name, name))
    if stage == stages - 1 and stages > 1 and config.share_embeddings_and_output_weights:
        found.append(("output_layer.weight", "embedding.word_embeddings.weight"))
    return found


def _cut(name: str, whole: Tensor, rank: int, ranks: int, config: Any) -> Tensor:
    dim = partition_dim(name)
    if dim is None or ranks == 1:
        return whole.clone()
    if config.gated_linear_unit and _GATED in name:
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, dim=dim)[rank].clone()


def _shape_of_model(tensors: dict[str, Tensor], config: Any) -> dict[str, Any]:
    if isinstance(config, T5Config):
        return {stored_name(n, megatron=True, relative_positions=True): tensor for n, tensor in tensors.items()}
    model: dict[str, Any] = {"language_model": {"embedding": {}, "encoder": {}}}
    language = model["language_model"]
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "embedding":
            inner, _, kind = rest.partition(".")
            language["embedding"].setdefault(inner, {})[kind] = tensor
        elif part in ("decoder", "encoder"):
            language["encoder"][_their_layer_name(rest)] = tensor
        elif part == "pooler":
            language.setdefault("pooler", {})[rest] = tensor
        elif name == "output_layer.bias":
            model.setdefault("lm_head", {})["bias"] = tensor
        elif name == "output_layer.weight" and config.share_embeddings_and_output_weights:
            model["word_embeddings_for_head"] = {"weight": tensor}
        elif part == "output_layer":
            language.setdefault("output_layer", {})[rest] = tensor
        else:
            model.setdefault(part, {})[rest.replace("layer_norm.", "layernorm.")] = tensor
    return model


def _their_layer_name(ours: str) -> str:
    for theirs, core in _LAYER_NAMES:
        ours = ours.replace(core, theirs)
    return ours.replace("pre_mlp_layernorm", "post_attention_layernorm")


def _write_empty_optimizers(directory: Path, data_parallel_size: int) -> None:
    """What stands for each data-parallel rank's part of an optimizer that has not begun."""
    group = {"lr": 0.0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
    group |= {"correct_bias": False, "params": []}  # type: ignore[dict-item]
    for replica in range(data_parallel_size):
        part = directory.with_name(f"{directory.name}_{replica:03d}")
        part.mkdir(exist_ok=True)
        torch.save({"optimizer": {"step": 0, "param_groups": [group]}}, part / "optim.pt")
