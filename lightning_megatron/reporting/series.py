"""Values over optimizer steps."""

from __future__ import annotations

import math

Series = tuple[tuple[int, float], ...]
"""``(step, value)``, in the order of steps."""


def finite(points: Series) -> Series:
    """The points that can be drawn."""
    return tuple((step, value) for step, value in points if math.isfinite(value))
