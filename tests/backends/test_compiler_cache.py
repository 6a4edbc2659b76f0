"""The cache directory of torch's compiler, which megatron-core's import makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_megatron.backends.compiler_cache import left_to_compilation


def test_only_an_empty_directory_that_was_made_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, file: str | None = None) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        if file is not None:
            (directory / file).touch()
        return directory

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for name, file, stays in (("empty", None, False), ("used", "kernel", True)):
        with left_to_compilation():
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(make(name, file)))
        assert (tmp_path / name).exists() == stays
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(make("chosen")))
    with left_to_compilation():
        pass
    assert (tmp_path / "chosen").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("code", "left"), [
    ("import megatron.core.transformer.moe.router", True),  # an upgrade that does not, needs no compiler_cache.py
    ("import lightning_megatron.backends.core", False),
])  # fmt: skip
def test_an_import_leaves_nothing(code: str, left: bool, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment | {"TMPDIR": str(tmp_path)}, check=True
    )
    assert any(path.name.startswith("torchinductor_") for path in tmp_path.iterdir()) == left
