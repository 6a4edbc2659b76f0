"""Write and read checkpoints of a model that is spread over ranks. Called by every rank together.

A checkpoint directory holds

- ``__<rank>_0.distcp``, ``.metadata``, ``metadata.json`` and ``common.pt``: weights, optimizer and random states in
  megatron-core's format (see :mod:`lightning_megatron.checkpoint.shard_files`);
- ``lightning.pt``: the Trainer's loops, callbacks and schedulers;
- ``lightning_megatron.json``: model, layout, versions and checksums (:mod:`lightning_megatron.checkpoint.metadata`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.backends import rng
from lightning_megatron.checkpoint.averages import CURRENT, FillableAverages
from lightning_megatron.checkpoint.integrity import LIGHTNING_FILE, open_checked
from lightning_megatron.checkpoint.metadata import CheckpointMetadata, FileSum, new_id, versions
from lightning_megatron.checkpoint.names import Mismatch, shapes
from lightning_megatron.checkpoint.publish import clean_up, new_partial, partial_path, publish, recover, sync_files
from lightning_megatron.checkpoint.run_state import OPTIMIZER_PREFIX, RNG, RunState, Wanted, WeightsKind
from lightning_megatron.checkpoint.shard_files import (
    Outline,
    ShardFiles,
    share_out,
    write_index,
)
from lightning_megatron.checkpoint.summed_file import WrittenFile, write_file
from lightning_megatron.checkpoint.together import Team
from lightning_megatron.checkpoint.trainer_state import read_trainer_state
from lightning_megatron.errors import CheckpointError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.lora import is_adapter

# ------------------------------------------------------------------------------------------------------------- save


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one rank is to write, decided and (if ``tensors`` are copies) independent of training that goes on."""

    path: Path
    tensors: Iterable[Tensor]
    outlines: Sequence[Sequence[Outline]]
    """What each rank writes, on rank 0."""
    lightning: bytes
    """The Trainer's state, on rank 0."""
    metadata: CheckpointMetadata

    read_back: bool = False
    """Read every file from the disk again before the checkpoint gets its name."""

    id: str = field(default_factory=new_id)
    """Of this checkpoint alone, the same on all ranks."""

    def with_tensors(self, tensors: Sequence[Tensor]) -> Snapshot:
        """The same of other memory."""
        return replace(self, tensors=tensors)

    def write(self, team: Team) -> None:
        """Write the checkpoint, which appears under its name when it is whole.

        Raises:
            CheckpointError: on every rank, if any failed. What was there under the name is untouched.
        """
        partial = partial_path(self.path, self.id[:8])
        what = f"Saving the checkpoint {self.path}"
        with ExitStack() as lock:
            try:
                team.do(what, lambda: self._prepare(partial, lock) if team.first else None)
                file = team.do(what, lambda: self._write_mine(partial / f"__{team.rank}_0.distcp"))
                files = team.gather(file)
                team.do(what, lambda: self._complete(partial, files) if team.first else None)
            except CheckpointError:
                if team.first:
                    shutil.rmtree(partial, ignore_errors=True)  # a full disk has room again
                raise

    def _prepare(self, partial: Path, lock: ExitStack) -> None:
        clean_up(self.path.parent)
        lock.enter_context(new_partial(partial))

    def _write_mine(self, path: Path) -> WrittenFile:
        return write_file(path, self.tensors, read_back=self.read_back)

    def _complete(self, partial: Path, files: Sequence[WrittenFile]) -> None:
        write_index(partial, zip(files, self.outlines, strict=True))
        (partial / LIGHTNING_FILE).write_bytes(self.lightning)
        sums = {file.name: FileSum(file.size, file.crc32) for file in files}
        others = [path for path in sorted(partial.iterdir()) if path.name not in sums]
        sums |= {path.name: FileSum.of(path) for path in others}
        replace(self.metadata, id=self.id, files=sums).write(partial)
        sync_files(partial)
        ShardFiles.open(partial).check_whole(sums)
        publish(partial, self.path)


def snapshot(
    path: Path,
    state: RunState,
    lightning: dict[str, Any],
    model: dict[str, Any],
    layout: ParallelLayout,
    team: Team,
    *,
    read_back: bool = False,
    tokenizer: dict[str, Any] | None = None,
) -> Snapshot:
    """Decide who writes what.

    Args:
        lightning: the Trainer's state.
        model: what the model says of itself.
        tokenizer: what the data says of its tokenizer, on rank 0.
    """
    shards = list(state.shards(team.rank))
    reports = team.gather(([Outline.of(shard) for shard in shards], state.facts(), state.steps()))
    outlines = [report[0] for report in reports]
    shares = share_out(outlines)
    own_id = new_id()
    mine, shared_id = team.scatter([(share, own_id) for share in shares])
    if state.optimizer is not None and team.first:
        lightning = lightning | {"optimizer_states": [_merge([report[1:] for report in reports])]}
    return Snapshot(
        path=path,
        tensors=[shards[index].tensor for index in mine],
        outlines=[[outlines[rank][index] for index in share] for rank, share in enumerate(shares)]
        if team.first
        else [],
        lightning=pickled(lightning) if team.first else b"",
        metadata=CheckpointMetadata(model, layout.as_dict(), team.size, versions(), tokenizer=tokenizer or {}),
        read_back=read_back,
        id=shared_id,
    )


def pickled(lightning: dict[str, Any]) -> bytes:
    """The Trainer's state as a file holds it."""
    buffer = BytesIO()
    torch.save(lightning, buffer)
    return buffer.getvalue()


def _merge(reports: Sequence[tuple[dict[str, Any], dict[str, int]]]) -> dict[str, Any]:
    """One account of the optimizer from all ranks': its facts, and the steps of parameters that lag behind."""
    facts: dict[str, Any] = {}
    steps: dict[str, int] = {}
    for part, counts in reports:
        facts |= part | {name: facts.get(name, {}) | part.get(name, {}) for name in ("groups", "configured")}
        steps |= counts
    step = max(steps.values(), default=0)
    return facts | {"step": step, "steps": {name: count for name, count in steps.items() if count != step}}


# ------------------------------------------------------------------------------------------------------------- load


def load(
    path: Path,
    state: RunState,
    model: dict[str, Any],
    layout: ParallelLayout,
    team: Team,
    *,
    strict: bool = True,
    weights_only: bool | None = None,
    averages: FillableAverages | None = None,
) -> dict[str, Any]:
    """Fill the weights and the optimizer, and return the Trainer's state.

    Args:
        averages: of weights, which a callback continues; the ``state`` has them too.
        strict: whether the names must be those of the model exactly. Shapes must in any case.
        weights_only: ``False`` lets the Trainer's state hold any Python object, which runs code of whoever wrote it;
            otherwise only what :mod:`lightning_megatron.checkpoint.trainer_state` lists loads.

    Raises:
        CheckpointError: no whole checkpoint, a damaged one, or one of another model.
    """
    what = f"Loading the checkpoint {path}"
    metadata, lightning, files = team.do(what, lambda: _open(path, team, weights_only))
    with_optimizer = state.optimizer is not None and "optimizer_states" in lightning
    kind = WeightsKind.TRAINED
    if CURRENT in lightning:
        continues = averages is not None and averages.averages.of_weights
        kind = WeightsKind.BESIDE_AVERAGES if continues else WeightsKind.AVERAGES
    weights = list(state.wanted_weights(kind))
    moments = list(state.wanted_moments()) if with_optimizer else []
    _check_names(path, weights, moments, files, team, strict, _same_vocabulary(metadata.model, model))

    def fill() -> None:
        _fill(files, weights)
        state.masters_from_weights()
        _fill(files, state.wanted_masters(kind))
        _fill(files, moments)
        if averages is not None:
            averages.start_from_weights()
            _fill(files, state.wanted_averages(averages_of_weights=kind is WeightsKind.BESIDE_AVERAGES))

    with torch.no_grad():
        team.do(what, fill)
    if with_optimizer and state.optimizer is not None:
        facts = lightning["optimizer_states"][0]
        state.restore_steps(facts["step"], facts["steps"])
        state.optimizer.restore_facts(facts)
        same_layout = metadata.layout == layout.as_dict() and metadata.world_size == team.size
        if state.window is not None:
            window = state.window
            team.do(what, lambda: window.restore(files, facts, same_layout=same_layout))
        if same_layout:
            rng.restore(_random_states(files, team.rank))
    return lightning


def load_weights(
    path: Path,
    state: RunState,
    model: dict[str, Any],
    team: Team,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
) -> list[str]:
    """Fill the weights whose names match a pattern of ``include`` and none of ``exclude``; their names, of all ranks.

    From a checkpoint without adapters of LoRA, a model that has some takes the other weights.

    Raises:
        CheckpointError: a weight that was asked for is missing there or has another shape, or none was asked for.
    """
    what = f"Loading weights of {path}"
    metadata, _, files = team.do(what, lambda: _open(path, team, None))

    def asked_for(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)

    weights = [wanted for wanted in state.wanted_weights() if asked_for(wanted.shard.key)]
    local = shapes(wanted.shard for wanted in weights)
    everywhere = {name: shape for part in team.share(local) for name, shape in part.items()}
    if not everywhere:
        raise CheckpointError(f"No weight of the model matches {list(include)} without {list(exclude)}.")
    saved = {name: shape for name, shape in files.shapes.items() if not name.startswith((OPTIMIZER_PREFIX, RNG))}
    if not any(is_adapter(name) for name in saved):  # adapters of LoRA begin on top of a model without any
        base = {name: shape for name, shape in everywhere.items() if not is_adapter(name)}
        everywhere = base or everywhere
    found = Mismatch.between(everywhere, saved, same_vocabulary=_same_vocabulary(metadata.model, model))
    if found.missing or found.reshaped:
        raise CheckpointError(found.describe(path))

    def fill() -> None:
        _fill(files, weights)
        state.masters_from_weights()
        _fill(files, (wanted for wanted in state.wanted_masters() if asked_for(wanted.sources[-1])))

    with torch.no_grad():
        team.do(what, fill)
    return sorted(everywhere)


def _open(path: Path, team: Team, weights_only: bool | None) -> tuple[CheckpointMetadata, dict[str, Any], ShardFiles]:
    """Open a checkpoint of which every file has been checked by some rank."""
    recover(path)
    opened = open_checked(path, team.rank, team.size)
    state = read_trainer_state(path / LIGHTNING_FILE, opened.small[LIGHTNING_FILE], weights_only)
    return opened.metadata, state, opened.files


def _check_names(
    path: Path,
    weights: list[Wanted],
    moments: list[Wanted],
    files: ShardFiles,
    team: Team,
    strict: bool,
    same_vocabulary: bool,
) -> None:
    """Compare names and shapes, and say the same on every rank."""
    local = shapes(wanted.shard for wanted in (*weights, *moments))
    wanted = {name: shape for part in team.share(local) for name, shape in part.items()}
    # The state of an optimizer that this run lacks is no reason to refuse its weights.
    prefixes = tuple(
        {f"{OPTIMIZER_PREFIX}{name.split('.')[2]}." for name in wanted if name.startswith(OPTIMIZER_PREFIX)}
    )
    hidden = (OPTIMIZER_PREFIX, RNG)
    saved = {
        name: shape
        for name, shape in files.shapes.items()
        if not name.startswith(hidden) or (prefixes and name.startswith(prefixes))
    }
    found = Mismatch.between(wanted, saved, same_vocabulary=same_vocabulary)
    if found.reshaped or (strict and found):
        raise CheckpointError(found.describe(path))


def _same_vocabulary(one: dict[str, Any], other: dict[str, Any]) -> bool:
    sizes = [(description.get("config") or {}).get("vocab_size") for description in (one, other)]
    return None in sizes or sizes[0] == sizes[1]


def _fill(files: ShardFiles, all_wanted: Iterable[Wanted]) -> None:
    for wanted in all_wanted:
        key = next((key for key in wanted.sources if key in files.shapes), None)
        if key is not None:
            shard = wanted.shard
            copied = files.read(key, shard.box, shard.tensor)
            if copied < shard.box.numel and not shard.resizable:
                raise CheckpointError(
                    f"{files.directory} has only {copied} of the {shard.box.numel} elements of {key}."
                )


def _random_states(files: ShardFiles, rank: int) -> dict[str, Tensor]:
    prefix = f"{RNG}{rank}."
    return {
        key.removeprefix(prefix): files.load(chunks[0]).clone()
        for key, chunks in files.chunks.items()
        if key.startswith(prefix)
    }
