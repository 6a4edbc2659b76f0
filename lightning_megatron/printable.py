"""Text that came from a file, made safe for a terminal."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_HIDDEN = ("Cc", "Cs", "Zl", "Zp")
"""Control characters, halves of surrogate pairs, and separators of lines."""
_REORDER = frozenset(map(chr, (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
"""Characters that show the text around them in another order."""


def printable(text: str) -> str:
    """``text`` with control characters other than newlines and tabs, and those that reorder it, as Python escapes."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in _KEPT and (unicodedata.category(character) in _HIDDEN or character in _REORDER)
        else character
        for character in text
    )
