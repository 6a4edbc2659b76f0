"""Distributed checkpoints: ours, and Megatron-LM's ``torch_dist``. Whole tensors are read from and written to them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends.shards import Box
from lightning_megatron.checkpoint.integrity import open_checked
from lightning_megatron.checkpoint.io import Snapshot, pickled
from lightning_megatron.checkpoint.metadata import CheckpointMetadata, versions
from lightning_megatron.checkpoint.publish import partial_path, publish, remove
from lightning_megatron.checkpoint.run_state import MASTER
from lightning_megatron.checkpoint.shard_files import Outline, ShardFiles, StoredObject, write_index
from lightning_megatron.checkpoint.summed_file import write_file
from lightning_megatron.checkpoint.together import Alone
from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop import safe_pickle
from lightning_megatron.interop.core_model import CoreSpec, Identity, module_name
from lightning_megatron.interop.core_names import core_name, is_weight, numbered, stacked, stored_name
from lightning_megatron.interop.megatron_args import described, from_args
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.lora import A, B, LoRAConfig, is_adapter
from lightning_megatron.models.config import T5Config, TransformerModelConfig

COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
"""Where recent versions keep what was in that file."""

_LINEAR = (
    *("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    *("cross_attention.linear_q", "cross_attention.linear_kv", "cross_attention.linear_proj"),
    *("cross_attention.core_attention", "mlp.linear_fc1", "mlp.linear_fc2"),
)


@dataclass(frozen=True)
class ShardedCheckpoint:
    """A model in a distributed checkpoint. Adapters of LoRA are merged into the weights that are read."""

    identity: Identity
    specs: Mapping[str, CoreSpec]
    places: Mapping[str, tuple[str, int | None]]
    """Each tensor's name in the files, and its layer if that holds all of them."""
    files: ShardFiles
    lora: LoRAConfig | None = None
    adapters: Mapping[str, CoreSpec] = field(default_factory=dict)
    """Their matrices, which :attr:`specs` leaves out."""
    ours: bool = False
    """Whether this package wrote it."""

    @classmethod
    def open_ours(cls, path: Path, *, exact: bool = False) -> ShardedCheckpoint:
        """A checkpoint of this package.

        Args:
            exact: whether to take the optimizer's fp32 copies of 16-bit weights.

        Raises:
            CheckpointError: no whole checkpoint, a damaged one, or a model that cannot be converted.
        """
        checked = open_checked(path)
        metadata = checked.metadata
        identity = described(metadata.model, path)
        source = metadata.tokenizer.get("source")
        tokenizer = Path(source if isinstance(source, str) else ".")
        if tokenizer.is_absolute() and tokenizer.is_dir():
            identity = replace(identity, files=tokenizer)
        opened = cls._open(checked.files, exact, lambda specs: identity)
        adapters = {name: spec for name, spec in opened.specs.items() if is_adapter(name)}
        opened = replace(opened, ours=True)
        if not adapters:
            return opened
        if "lora" not in metadata.model:
            raise CheckpointError(
                f"{path} holds adapters, but does not say how they are scaled: {next(iter(adapters))}."
            )
        specs = {name: spec for name, spec in opened.specs.items() if name not in adapters}
        return replace(opened, specs=specs, adapters=adapters, lora=LoRAConfig(**metadata.model["lora"]))

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
        common = _common(path)

        def identify(specs: Mapping[str, CoreSpec]) -> Identity:
            if config is not None:
                return Identity(config)
            identity = from_args(common.get("args"), specs, vocab_size, path)
            return replace(identity, iteration=int(common.get("iteration") or 0))

        return cls._open(ShardFiles.open(path), False, identify)

    @classmethod
    def _open(
        cls, files: ShardFiles, exact: bool, identify: Callable[[Mapping[str, CoreSpec]], Identity]
    ) -> ShardedCheckpoint:
        path = files.directory
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
        tensor, stem = self._read(name, self.specs[name]), name.removesuffix("weight")
        if self.lora is None or stem + A not in self.adapters:
            return tensor
        low, high = (self._read(stem + matrix, self.adapters[stem + matrix]).float() for matrix in (A, B))
        return (tensor.float() + self.lora.scale * (high @ low)).to(tensor.dtype)

    def _read(self, name: str, spec: CoreSpec) -> Tensor:
        key, layer = self.places[name]
        shape, dtype = spec
        into = torch.empty(shape if layer is None else (1, *shape), dtype=dtype)
        start = () if layer is None else (layer,)
        box = Box((*start, *(0 for _ in shape)), tuple(into.shape))
        if self.files.read(key, box, into) < box.numel:
            raise CheckpointError(f"{self.files.directory} does not have all elements of {key}.")
        self.files.release()
        return into if layer is None else into[0]


def _common(path: Path) -> dict[str, Any]:
    """What ranks have in common: the arguments, the iteration."""
    if (path / COMMON_FILE).is_file():
        found = safe_pickle.load(path / COMMON_FILE)
    else:
        files = ShardFiles.open(path)
        if COMMON_OBJECT not in files.objects:
            return {}
        found = safe_pickle.load(path / files.objects[COMMON_OBJECT].file, files.object_bytes(COMMON_OBJECT))[0]
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------------------- writing


Steps = Callable[[list[Any]], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Target:
    """A distributed checkpoint to write."""

    path: Path
    identity: Identity
    layout: ParallelLayout
    world_size: int
    specs: Mapping[str, CoreSpec]
    """All tensors, vocabularies padded, in the order in which they come."""


def write_ours(target: Target, read: Callable[[str], Tensor], steps: Steps = iter) -> None:
    """A checkpoint of this package with the weights alone, which validate, test and predict take as ``ckpt_path`` and
    :class:`~lightning_megatron.callbacks.InitialWeights` begins a fit with. Tensors are read one at a time.

    Args:
        steps: goes through the tensors, showing how far.

    Raises:
        CheckpointError: writing failed.
    """
    import lightning.pytorch as pl

    identity = target.identity
    model: dict[str, Any] = {"module": module_name(identity.config), "config": identity.config.as_dict()}
    if identity.hugging_face:
        model["hugging_face"] = dict(identity.hugging_face)
    if identity.generation:
        model["generation"] = dict(identity.generation)
    trainer = {
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": identity.iteration,
        "state_dict": {},
    }
    metadata = CheckpointMetadata(model, target.layout.as_dict(), target.world_size, versions())
    outlines = list(_outlines(target, megatron=False))
    stored = [outline for _, outline in outlines]
    Snapshot(target.path, _read(read, steps(outlines)), [stored], pickled(trainer), metadata).write(Alone())


def write_megatron(
    target: Target, read: Callable[[str], Tensor], args: argparse.Namespace, steps: Steps = iter
) -> None:
    """The directory of one iteration, in Megatron-LM's format ``torch_dist``.

    Args:
        steps: goes through the tensors, showing how far.

    Raises:
        CheckpointError: writing failed.
    """
    partial = partial_path(target.path)
    remove(partial)
    partial.mkdir(parents=True)
    outlines = list(_outlines(target, megatron=True))
    written = write_file(partial / "__0_0.distcp", _read(read, steps(outlines)))
    objects = _write_remarks(partial / "__0_1.distcp", target.specs)
    write_index(partial, [(written, [outline for _, outline in outlines])], objects)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": target.identity.iteration}
    torch.save(common, partial / COMMON_FILE)
    ShardFiles.open(partial)
    publish(partial, target.path)


def _read(read: Callable[[str], Tensor], outlines: Iterable[tuple[str, Outline]]) -> Iterator[Tensor]:
    for core, outline in outlines:
        yield read(core).reshape(outline.box.sizes)  # a layer of all of them


def _write_remarks(file: Path, specs: Mapping[str, CoreSpec]) -> dict[str, StoredObject]:
    """Megatron-LM's linear layers and norms have remarks of TransformerEngine's, which it misses if they are not there.
    These say nothing, as those of layers without TransformerEngine do."""
    keys = [f"{name}._extra_state/shard_0_1" for name in ("output_layer", "lm_head.output_layer")]
    for stack, count in _layers(specs).items():
        keys += [f"{stack}.{module}._extra_state/shard_{n}_{count}" for module in _LINEAR for n in range(count)]
        keys.append(f"{stack.removesuffix('.layers')}.final_layernorm._extra_state/shard_0_1")
    torch.save([None], file)
    return {key: StoredObject(file.name, 0, file.stat().st_size) for key in keys}


def _outlines(target: Target, *, megatron: bool) -> Iterator[tuple[str, Outline]]:
    """Our name and what is stored, for each tensor that is."""
    relative = isinstance(target.identity.config, T5Config)
    layers = _layers(target.specs)
    for core, (shape, dtype) in target.specs.items():
        name = stored_name(core, megatron=megatron, relative_positions=relative)
        zeros = (0,) * len(shape)
        if (parts := numbered(name)) is None:
            yield core, Outline(name, shape, Box(zeros, shape), dtype)
            if name != core and core.startswith("output_layer."):
                yield core, Outline(core, shape, Box(zeros, shape), dtype)  # a T5 of Megatron-LM's has two names for it
        else:
            stack, layer, rest = parts
            box = Box((layer, *zeros), (1, *shape))
            yield core, Outline(f"{stack}.{rest}", (layers[stack], *shape), box, dtype)


def _layers(specs: Mapping[str, CoreSpec]) -> dict[str, int]:
    found: dict[str, int] = {}
    for parts in filter(None, map(numbered, specs)):
        found[parts[0]] = max(found.get(parts[0], 0), parts[1] + 1)
    return found
