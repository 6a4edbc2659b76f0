"""Write and read checkpoints of a model that is spread over ranks. Called by every rank together.

A checkpoint directory holds megatron-core's distributed checkpoint (weights, optimizer, RNG states), ``lightning.pt``
(the Trainer's loops, callbacks and schedulers) and ``lightning_megatron.json`` (see
:mod:`lightning_megatron.checkpoint.metadata`).
"""

from __future__ import annotations

import difflib
import os
import pickle
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.backends import rng
from lightning_megatron.backends.checkpoint_writer import in_process_results
from lightning_megatron.backends.core import ProcessGroupCollection, dist_checkpointing
from lightning_megatron.checkpoint.metadata import CheckpointMetadata
from lightning_megatron.errors import CheckpointError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.optim.optimizer import MegatronOptimizer

LIGHTNING_FILE = "lightning.pt"


class ShardedCheckpoint:
    """The parts of a run that are spread over ranks.

    Args:
        chunks: this rank's chunks, unwrapped (megatron-core's DDP would prefix every name).
        optimizer: ``None`` for weights alone.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        optimizer: MegatronOptimizer | None,
        layout: ParallelLayout,
        groups: ProcessGroupCollection,
    ) -> None:
        self._chunks = list(chunks)
        self._optimizer = optimizer
        self._layout = layout
        self._metadata = {
            # Tensors in model space: the only type that any layout loads and that saves without TransformerEngine.
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": groups.dp_cp,
        }

    # --------------------------------------------------------------------- save

    def save(self, path: Path, lightning: dict[str, Any], model: dict[str, Any]) -> None:
        """Write a checkpoint, which appears at ``path`` only when it is whole.

        Args:
            lightning: the Trainer's state.
            model: what the model says of itself.
        """
        partial = path.with_name(f".{path.name}.partial")
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        state = self._sharded_state(is_loading=False) | {"rng": rng.sharded_state()}
        with in_process_results():
            dist_checkpointing.save(state, str(partial), validate_access_integrity=False)
        if first:
            torch.save(lightning, partial / LIGHTNING_FILE)
            CheckpointMetadata(
                model=model, layout=self._layout.as_dict(), world_size=dist.get_world_size(), versions=_versions()
            ).write(partial)
            _replace(partial, path)
        dist.barrier()

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        model = {
            name: chunk.sharded_state_dict(metadata=self._metadata)
            for name, chunk in zip(self._chunk_names(), self._chunks, strict=True)
        }
        if self._optimizer is None:
            return model
        optimizer = self._optimizer.sharded_state_dict(dict(model), is_loading=is_loading, metadata=self._metadata)
        return model | {"optimizer": optimizer}

    def _chunk_names(self) -> list[str]:
        return ["model"] if len(self._chunks) == 1 else [f"model{index}" for index in range(len(self._chunks))]

    # --------------------------------------------------------------------- load

    def load(self, path: Path, *, strict: bool = True, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the chunks and the optimizer, and return the Trainer's state.

        Args:
            strict: whether names and shapes must match those of the model exactly.
            weights_only: ``False`` lets the Trainer's state hold any Python object, which runs code of whoever wrote
                it; otherwise only plain containers, numbers and tensors load.

        Raises:
            CheckpointError: no whole checkpoint, or one of another model.
        """
        metadata = CheckpointMetadata.read(path)
        lightning = _load_lightning(path / LIGHTNING_FILE, weights_only)
        has_optimizer = "optimizer_states" in lightning
        if self._optimizer is not None and not has_optimizer:
            self._optimizer = None
        state = self._sharded_state(is_loading=True)
        self._check_names(path, {name: state[name] for name in self._chunk_names()}, strict)
        same_place = metadata.layout == self._layout.as_dict() and metadata.world_size == dist.get_world_size()
        if same_place and self._optimizer is not None:
            state["rng"] = rng.sharded_state()
        handling = "assume_ok_unexpected" if strict else "log_unexpected"
        loaded = dist_checkpointing.load(state, str(path), validate_access_integrity=False, strict=handling)
        for name, chunk in zip(self._chunk_names(), self._chunks, strict=True):
            chunk.load_state_dict(loaded[name], strict=strict)
        if self._optimizer is not None:
            self._optimizer.load_sharded_state(loaded["optimizer"])
        if "rng" in loaded:
            rng.restore(loaded["rng"])
        return lightning

    def _check_names(self, path: Path, wanted: dict[str, Any], strict: bool) -> None:
        """Compare names and shapes with the checkpoint's, and say the same on every rank."""
        saved = {
            name: tuple(tensor.global_shape)
            for name, tensor in dist_checkpointing.load_tensors_metadata(str(path)).items()
            if not name.startswith("optimizer.")
        }
        local = {
            entry.key: (tuple(entry.global_shape), getattr(entry, "allow_shape_mismatch", False))
            for entry in _entries(wanted)
            if hasattr(entry, "global_shape") and hasattr(entry, "allow_shape_mismatch")
        }
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, local)
        wanted_shapes = {name: shape for part in everyone for name, shape in part.items()}
        missing = sorted(set(wanted_shapes) - set(saved))
        unexpected = sorted(set(saved) - set(wanted_shapes))
        reshaped = [
            f"{name}: {saved[name]} in the checkpoint, {shape} in the model"
            for name, (shape, may_differ) in sorted(wanted_shapes.items())
            if name in saved and saved[name] != shape and not may_differ
        ]
        if reshaped or (strict and (missing or unexpected)):
            raise CheckpointError(_mismatch(path, missing, unexpected, reshaped))


def _entries(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [entry for value in state.values() for entry in _entries(value)]
    if isinstance(state, list):
        return [entry for value in state for entry in _entries(value)]
    return [state]


def _mismatch(path: Path, missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    lines = [f"The checkpoint at {path} is of another model."]
    if missing:
        near = [(name, difflib.get_close_matches(name, unexpected, n=1)) for name in missing]
        lines.append(f"  {len(missing)} names of the model are missing in it:")
        lines += [f"    {name}" + (f" (nearest there: {match[0]})" if match else "") for name, match in near[:10]]
    if unexpected:
        lines.append(f"  {len(unexpected)} names in it are not the model's:")
        lines += [f"    {name}" for name in unexpected[:10]]
    if reshaped:
        lines.append(f"  {len(reshaped)} shapes differ:")
        lines += [f"    {line}" for line in reshaped[:10]]
    lines.append("Build the model with the configuration in its lightning_megatron.json, or load with strict=False.")
    return "\n".join(lines)


def _load_lightning(file: Path, weights_only: bool | None) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", weights_only=weights_only is not False)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds Python objects other than plain containers, numbers and tensors, which could run code. If "
            f"you trust it, pass weights_only=False. ({str(error).splitlines()[0]})"
        ) from error


def _replace(source: Path, target: Path) -> None:
    """Put ``source`` in ``target``'s place; at every moment one of the two names holds a whole checkpoint."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("lightning-megatron", "megatron-core", "lightning", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
