"""Distributed checkpoints: ours, and Megatron-LM's ``torch_dist``. Whole tensors are read from and written to them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.shards import Box
from lightning_megatron.checkpoint.io import Snapshot, pickled
from lightning_megatron.checkpoint.metadata import CheckpointMetadata, versions
from lightning_megatron.checkpoint.publish import partial_path, publish, remove
from lightning_megatron.checkpoint.run_state import MASTER
from lightning_megatron.checkpoint.shard_files import Outline, ShardFiles, write_index
from lightning_megatron.checkpoint.summed_file import write_file
from lightning_megatron.checkpoint.together import Alone
from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop import safe_pickle
from lightning_megatron.interop.core_model import CoreSpec, Identity, module_name
from lightning_megatron.interop.core_names import core_name, is_weight, numbered, stacked, stored_name
from lightning_megatron.interop.megatron_args import described, from_args
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import T5Config, TransformerModelConfig

COMMON_FILE = "common.pt"


@dataclass(frozen=True)
class ShardedCheckpoint:
    """A model in a distributed checkpoint."""

    identity: Identity
    specs: Mapping[str, CoreSpec]
    places: Mapping[str, tuple[str, int | None]]
    """Each tensor's name in the files, and its layer if that holds all of them."""
    files: ShardFiles

    @classmethod
    def open_ours(cls, path: Path, *, exact: bool = False) -> ShardedCheckpoint:
        """A checkpoint of this package.

        Args:
            exact: whether to take the optimizer's fp32 copies of 16-bit weights.

        Raises:
            CheckpointError: no whole checkpoint, or a model that cannot be converted.
        """
        metadata = CheckpointMetadata.read(path)
        identity = described(metadata.model, path)
        for name, total in metadata.files.items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != total.size:
                found = "is missing" if size is None else f"has {size} bytes instead of {total.size}"
                raise CheckpointError(f"The checkpoint {path} is damaged: {name} {found}.")
        return cls._open(path, exact, lambda specs: identity)

    @classmethod
    def open_megatron(
        cls, path: Path, *, vocab_size: int | None = None, config: TransformerModelConfig | None = None
    ) -> ShardedCheckpoint:
        """A checkpoint of Megatron-LM, the directory of one iteration.

        Args:
            vocab_size: of the tokenizer, if known.
            config: if the checkpoint carries no arguments.

        Raises:
            CheckpointError: no readable index, no arguments, or a model that this package does not have.
        """
        common = safe_pickle.load(path / COMMON_FILE) if (path / COMMON_FILE).is_file() else {}

        def identify(specs: Mapping[str, CoreSpec]) -> Identity:
            return Identity(config) if config else from_args(common.get("args"), specs, vocab_size, path / COMMON_FILE)

        return cls._open(path, False, identify)

    @classmethod
    def _open(
        cls, path: Path, exact: bool, identify: Callable[[Mapping[str, CoreSpec]], Identity]
    ) -> ShardedCheckpoint:
        files = ShardFiles.open(path)
        specs: dict[str, CoreSpec] = {}
        places: dict[str, tuple[str, int | None]] = {}
        for key in filter(is_weight, files.shapes):
            if ".experts." in key:
                raise CheckpointError(f"{path} holds a mixture of experts ({key}), which cannot be converted.")
            best = MASTER + key if exact and MASTER + key in files.shapes else key
            shape, dtype, name = files.shapes[key], files.dtypes[best], core_name(key)
            if (parts := stacked(name)) is None:
                specs[name], places[name] = CoreSpec(shape, dtype), (best, None)
                continue
            for layer in range(shape[0]):
                one = f"{parts[0]}.{layer}.{parts[1]}"
                specs[one], places[one] = CoreSpec(shape[1:], dtype), (best, layer)
        if "embedding.word_embeddings.weight" not in specs:
            raise CheckpointError(f"{path} holds no language model: it has no embedding.word_embeddings.weight.")
        return cls(identify(specs), specs, places, files)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: a file is missing, cut short or damaged.
        """
        key, layer = self.places[name]
        shape, dtype = self.specs[name]
        into = torch.empty(shape if layer is None else (1, *shape), dtype=dtype)
        start = () if layer is None else (layer,)
        box = Box((*start, *(0 for _ in shape)), tuple(into.shape))
        if self.files.read(key, box, into) < box.numel:
            raise CheckpointError(f"{self.files.directory} does not have all elements of {key}.")
        return into if layer is None else into[0]


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class Target:
    """A distributed checkpoint to write."""

    path: Path
    identity: Identity
    layout: ParallelLayout
    world_size: int
    specs: Mapping[str, CoreSpec]
    """All tensors, vocabularies padded, in the order in which they come."""


def write_ours(target: Target, tensors: Iterable[Tensor]) -> None:
    """A checkpoint of this package with the weights alone, as ``trainer.fit(..., ckpt_path=...)`` and
    :class:`~lightning_megatron.callbacks.InitialWeights` load it. ``tensors`` are taken one at a time.

    Raises:
        CheckpointError: writing failed.
    """
    import lightning.pytorch as pl

    identity = target.identity
    model: dict[str, Any] = {"module": module_name(identity.config), "config": identity.config.as_dict()}
    if identity.hugging_face:
        model["hugging_face"] = dict(identity.hugging_face)
    trainer = {
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": identity.iteration,
        "state_dict": {},
        "loops": {},
    }
    metadata = CheckpointMetadata(model, target.layout.as_dict(), target.world_size, versions())
    outlines = list(_outlines(target, megatron=False))
    Snapshot(target.path, tensors, [outlines], pickled(trainer), metadata).write(Alone())


def write_megatron(target: Target, tensors: Iterable[Tensor], args: argparse.Namespace) -> None:
    """The directory of one iteration, in Megatron-LM's format ``torch_dist``.

    Raises:
        CheckpointError: writing failed.
    """
    partial = partial_path(target.path)
    remove(partial)
    partial.mkdir(parents=True)
    written = write_file(partial / "__0_0.distcp", tensors)
    write_index(partial, [(written, list(_outlines(target, megatron=True)))])
    common = {"args": args, "checkpoint_version": 3.0, "iteration": target.identity.iteration}
    torch.save(common, partial / COMMON_FILE)
    ShardFiles.open(partial)
    publish(partial, target.path)


def _outlines(target: Target, *, megatron: bool) -> Iterator[Outline]:
    relative = isinstance(target.identity.config, T5Config)
    layers = _layers(target.specs)
    for core, (shape, dtype) in target.specs.items():
        name = stored_name(core, megatron=megatron, relative_positions=relative)
        zeros = (0,) * len(shape)
        if (parts := numbered(name)) is None:
            yield Outline(name, shape, Box(zeros, shape), dtype)
        else:
            stack, layer, rest = parts
            box = Box((layer, *zeros), (1, *shape))
            yield Outline(f"{stack}.{rest}", (layers[stack], *shape), box, dtype)


def _layers(specs: Mapping[str, CoreSpec]) -> dict[str, int]:
    found: dict[str, int] = {}
    for parts in filter(None, map(numbered, specs)):
        found[parts[0]] = max(found.get(parts[0], 0), parts[1] + 1)
    return found
