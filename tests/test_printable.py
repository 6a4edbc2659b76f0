"""No text of a file commands a terminal."""

from __future__ import annotations

import pickle

import pytest

import lightning_megatron as lm
from lightning_megatron.errors import DataError
from lightning_megatron.printable import printable


def test_printable() -> None:
    assert printable("plain\n\ttext: Größe 模型 👩‍👩‍👧") == "plain\n\ttext: Größe 模型 👩‍👩‍👧"
    assert printable("\x1b]0;x\x07\r\x00\x9b2J") == r"\x1b]0;x\x07\r\x00\x9b2J"
    assert printable("a\u202eb\u2066c\u2028d\ud800") == r"a\u202eb\u2066c\u2028d\ud800"


@pytest.mark.parametrize("kind", [lm.CheckpointError, lm.LayoutError, lm.ModuleError, DataError])
def test_errors_escape(kind: type[Exception]) -> None:
    error = kind("name \x1b[2J")
    assert str(error) == r"name \x1b[2J"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
