"""What a run's directory holds: logged values, configuration, checkpoints."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_megatron.errors import CheckpointError, DataError
from lightning_megatron.json_files import read_bounded
from lightning_megatron.reporting.series import Series

if TYPE_CHECKING:
    from lightning_megatron.checkpoint.metadata import CheckpointMetadata

_NOT_SERIES = ("step", "epoch")
_CONFIG_LIMIT = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint directory of a run."""

    path: Path
    metadata: CheckpointMetadata | None
    """``None`` for one that is not whole."""

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(total.size for total in self.metadata.files.values()) if self.metadata else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run, as its directory tells."""

    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    """``(step, value)`` by name, in the order of steps."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration, empty for a run that did not save one."""
    config_text: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()
    sources: tuple[Path, ...] = ()
    """Files that the values come from."""

    def last(self, name: str) -> float | None:
        """The last value of a series."""
        points = self.series.get(name)
        return points[-1][1] if points else None

    @property
    def steps(self) -> int:
        """Optimizer steps that were logged."""
        return max((points[-1][0] + 1 for points in self.series.values() if points), default=0)


def read_run(path: Path) -> Run:
    """Read a run's directory: ``run_dir`` of the recipes, or what a Trainer's logger wrote.

    Raises:
        DataError: there is no such directory, or nothing was logged in it as CSV or for TensorBoard.
    """
    if not path.is_dir():
        raise DataError(f"There is no directory {path}. Give the run_dir of a run, such as runs/pretrain.")
    sources = sorted(path.rglob("metrics.csv"), key=_modified)
    series = merge(_read_csv(source) for source in sources)
    if not series:
        sources = sorted(path.rglob("events.out.tfevents.*"), key=_modified)
        series = merge(_read_events(source) for source in sources)
    if not series:
        raise DataError(
            f"Nothing was logged in {path}: it holds neither a metrics.csv nor TensorBoard's event files. Train with "
            "logger=csv, or Trainer(logger=CSVLogger(...))."
        )
    config_text = _config_text(path / "config.yaml")
    return Run(
        path=path,
        series=series,
        config=_parsed(config_text),
        config_text=config_text,
        checkpoints=tuple(_checkpoints(path)),
        sources=tuple(sources),
    )


def merge(parts: Iterable[dict[str, Series]]) -> dict[str, Series]:
    """One run's series from those of its starts, the earliest first: a start that resumed replaces what it redid."""
    merged: dict[str, dict[int, float]] = {}
    for part in parts:
        first = min((points[0][0] for points in part.values() if points), default=0)
        for name, points in part.items():
            kept = {step: value for step, value in merged.get(name, {}).items() if step < first}
            merged[name] = kept | dict(points)
    return {name: tuple(sorted(points.items())) for name, points in sorted(merged.items()) if points}


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _read_csv(path: Path) -> dict[str, Series]:
    columns: dict[str, list[tuple[int, float]]] = {}
    number = -1
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                step = int(float(row.get("step") or number))
                for name, text in row.items():
                    if name and name not in _NOT_SERIES and isinstance(text, str) and _is_number(text):
                        columns.setdefault(name, []).append((step, float(text)))
    except (ValueError, OverflowError, csv.Error) as error:
        raise DataError(f"{path} is damaged behind row {number + 1}: {error}. Remove it, or mend that row.") from error
    return {name: tuple(points) for name, points in columns.items()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_events(path: Path) -> dict[str, Series]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise DataError(f"{path} is TensorBoard's, which is not installed: pip install tensorboard.") from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name not in ("hp_metric", *_NOT_SERIES)]
    return {name: tuple((event.step, float(event.value)) for event in events.Scalars(name)) for name in names}


def _config_text(path: Path) -> str:
    """The text of a run's configuration, none if there is no such file or it is none that a run writes."""
    try:
        return read_bounded(path, _CONFIG_LIMIT).decode()
    except (OSError, ValueError):
        return ""


def _parsed(text: str) -> dict[str, Any]:
    import yaml

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            return {}  # which a run does not write, and which can grow without bound
        found = yaml.safe_load(text) if text else {}
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checkpoints(path: Path) -> Iterable[Checkpoint]:
    directories = sorted((found for found in path.rglob("*.ckpt") if found.is_dir()), key=_modified)
    if not directories:
        return
    from lightning_megatron.checkpoint.metadata import CheckpointMetadata  # takes seconds: its package needs torch

    for directory in directories:
        try:
            metadata: CheckpointMetadata | None = CheckpointMetadata.read(directory)
        except CheckpointError:
            metadata = None
        yield Checkpoint(path=directory, metadata=metadata)
