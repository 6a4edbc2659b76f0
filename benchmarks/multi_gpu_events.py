"""What the driver of :mod:`benchmarks.multi_gpu` and its ranks tell each other through files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Setting:
    """Where all jobs of a run take place."""

    device: Literal["cuda", "cpu"]
    tiny: bool
    directory: Path
    """For checkpoints."""


class Events:
    """Lines that rank 0 appends for the driver and the other ranks."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "events.jsonl"
        self._read = 0

    def tell(self, **event: Any) -> None:
        """Append an event."""
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def new(self) -> Iterator[dict[str, Any]]:
        """Those not read yet."""
        if not self.path.exists():
            return
        with self.path.open() as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith("\n"):
                    break  # still being written
                self._read += len(line)
                yield json.loads(line)

    @property
    def unread(self) -> bool:
        """Whether there are any that :meth:`new` has not given yet."""
        return self.path.exists() and self.path.stat().st_size > self._read

    def port_of(self, index: int) -> int:
        """Wait until rank 0 begins a job, and hear where."""
        while True:
            for event in self.new():
                if event.get("begin") == index:
                    return event["port"]
            time.sleep(0.02)
