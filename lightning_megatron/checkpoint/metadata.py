"""What a checkpoint tells about itself, readable without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_megatron.errors import CheckpointError

FILE = "lightning_megatron.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """The model, the layout that wrote it, and the versions; written last, so its presence means a whole checkpoint."""

    model: dict[str, Any]
    layout: dict[str, Any]
    world_size: int
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        """Write the file into ``directory``."""
        (directory / FILE).write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def read(cls, directory: Path) -> CheckpointMetadata:
        """The metadata of the checkpoint in ``directory``.

        Raises:
            CheckpointError: there is no whole checkpoint of ours there, or it is of a newer format.
        """
        if not directory.exists():
            raise CheckpointError(f"There is no checkpoint at {directory}.")
        if not (directory / FILE).is_file():
            kind = "a directory without" if directory.is_dir() else "a file, not a directory with"
            raise CheckpointError(
                f"{directory} is no whole checkpoint of lightning_megatron: it is {kind} {FILE}, which is written last."
            )
        data = json.loads((directory / FILE).read_text())
        if data.get("format", 0) > FORMAT:
            raise CheckpointError(
                f"{directory} has format {data['format']}, but this version of lightning_megatron reads up to "
                f"{FORMAT}. Upgrade lightning_megatron."
            )
        return cls(**data)
