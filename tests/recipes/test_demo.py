"""The demo from raw text to generated text, in a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes/demo.py"), "--steps", "12", "--run-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["difference"] < 1e-4
    assert 2 < summary["validation_loss"] < 8.4  # log(4096) = 8.3 knows nothing
    assert 500 < summary["unigram_perplexity"] < 1000
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert "Return a new" in result.stdout
