"""A wheel, installed in a virtual environment, used outside of the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from lightning_megatron.data.indexed import IndexedDatasetWriter

ROOT = Path(__file__).parent.parent
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "setup.py", "lightning_megatron", "conf", "recipes")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has the wheel, and all else from the environment that runs the tests."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests do not run in a source tree")
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    check(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", place / "dist", source)
    check(sys.executable, "-m", "venv", "--without-pip", place / "venv")
    python = place / "venv" / "bin" / "python"
    (wheel,) = (place / "dist").glob("*.whl")
    # Without a view of the repository, where pip would take what an editable install has left for the package itself.
    check(*pip, "--python", python, "install", *offline, wheel, cwd=place, env=clean_environment())
    shutil.rmtree(source)
    (site,) = (place / "venv" / "lib").glob("python*/site-packages")
    # Plain lines of a .pth add a directory without reading the .pth files in it, where an editable install would be.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def check(*command: Any, **kwargs: Any) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def outside(installed: Path, tmp_path: Path, *command: Any, timeout: float = 240) -> str:
    return check(installed / command[0], *command[1:], cwd=tmp_path, env=clean_environment(), timeout=timeout)


def test_the_package_and_its_files_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, lightning_megatron as lm\n"
        "from lightning_megatron.cli.configuration import conf_dir\n"
        "from lightning_megatron.cli.main import RECIPES, recipe_path\n"
        "print(json.dumps([lm.__file__, str(conf_dir()), *(str(recipe_path(name)) for name in RECIPES)]))"
    )
    paths = json.loads(outside(installed, tmp_path, "python", "-c", code))
    assert all(Path(path).is_relative_to(installed.parent) for path in paths)
    for option in (ROOT / "conf").rglob("*.yaml"):
        assert (Path(paths[1]) / option.relative_to(ROOT / "conf")).is_file()


def test_commands(installed: Path, tmp_path: Path) -> None:
    assert "pretrain" in outside(installed, tmp_path, "lightning-megatron", "--help")
    assert "tokens/s" in outside(installed, tmp_path, "lightning-megatron", "plan", "model=gpt2_small", "gpus=8")
    outside(installed, tmp_path, "lightning-megatron", "config", "--yes", "--data-path", "corpus")
    assert (tmp_path / "megatron.yaml").is_file()
    assert "--prompt" in outside(installed, tmp_path, "lightning-megatron", "generate", "--help")


@pytest.mark.slow
def test_pretrain_report_and_doctor(installed: Path, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus") as writer:
        for document in range(40):
            writer.add_document([(document + i) % 256 for i in range(40)])
    tiny = ["model.num_layers=2", "model.hidden_size=32", "model.vocab_size=256", "model.max_position_embeddings=16"]
    outside(
        *(
            installed,
            tmp_path,
            "lightning-megatron",
            "pretrain",
            "data.data_path=corpus",
            "data.split='80,20,0'",
            *tiny,
        ),
        *("data.global_batch_size=4", "trainer.devices=2", "parallel=tp2", "trainer.accelerator=cpu"),
        *("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "logger=csv"),
        *("callbacks=full", "run_dir=run"),
    )
    assert "4 steps" in outside(installed, tmp_path, "lightning-megatron", "report", "run")
    assert "memory/rank_1" in (tmp_path / "run/csv/version_0/metrics.csv").read_text()
    assert "whole" in outside(installed, tmp_path, "lightning-megatron", "doctor", "run/checkpoints/last.ckpt")
    assert "No problem found" in outside(installed, tmp_path, "lightning-megatron", "doctor", "--timeout", "200")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo(installed: Path, tmp_path: Path) -> None:
    outside(installed, tmp_path, "lightning-megatron", "demo", "--steps", "8", timeout=580)
    assert json.loads((tmp_path / "demo_run/summary.json").read_text())["difference"] < 1e-4
