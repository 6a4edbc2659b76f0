"""Code blocks of a Markdown page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"(?P<slow><!-- slow -->\n)?^```(?P<language>\w*)\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    source: str
    slow: bool
    line: int


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = path.read_text()
    return [
        Block(
            language=match["language"],
            source=match["source"],
            slow=match["slow"] is not None,
            line=text[: match.start("source")].count("\n") + 1,
        )
        for match in FENCE.finditer(text)
    ]
