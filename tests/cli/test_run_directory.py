"""A run has its directory to itself: another run is refused there, and ``config.yaml`` stays that of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hydra.utils import instantiate

from lightning_megatron.cli.configuration import recipe
from lightning_megatron.cli.run_directory import claimed, save_config
from lightning_megatron.errors import CheckpointError
from tests.cli.test_configuration import DATA, compose


@recipe("pretrain")
def _pretrain(config: Any) -> None:
    """What the recipe does first, and the checkpoint that it leaves."""
    save_config(config)
    checkpoints = instantiate(config.callbacks.checkpoint)
    if config.task == "fit":
        (Path(checkpoints.dirpath) / "last.ckpt").mkdir(parents=True, exist_ok=True)


def _run(directory: Path, *overrides: str) -> None:
    with patch("sys.argv", ["pretrain", DATA, f"run_dir={directory}", *overrides]):
        _pretrain()


def test_a_second_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, last = tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt"
    (tmp_path / "other.ckpt").mkdir()
    _run(run, "trainer.max_steps=11")
    for more in ((), (f"ckpt_path={tmp_path / 'other.ckpt'}",)):
        with pytest.raises(SystemExit) as stopped:
            _run(run, "trainer.max_steps=22", *more)
        assert stopped.value.code == 1
        message = capsys.readouterr().err
        assert f"run_dir={run} holds the checkpoints of another run. Give a new run_dir" in message
        assert f"ckpt_path={last}" in message
        assert "max_steps: 11" in (run / "config.yaml").read_text()
    for path in (last, "last"):
        _run(run, "trainer.max_steps=33", f"ckpt_path={path}")
        assert "max_steps: 33" in (run / "config.yaml").read_text()


def test_a_requeued_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").mkdir()
    with pytest.raises(SystemExit):
        _run(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    _run(tmp_path)


@pytest.mark.parametrize("task", ["validate", "test"])
def test_an_evaluation_leaves_the_configuration_of_the_training(tmp_path: Path, task: str) -> None:
    _run(tmp_path, "trainer.max_steps=11")
    _run(tmp_path, "trainer.max_steps=22", f"task={task}", f"ckpt_path={tmp_path / 'checkpoints/last.ckpt'}")
    assert "max_steps: 11" in (tmp_path / "config.yaml").read_text()
    assert "max_steps: 22" in (tmp_path / f"config.{task}.yaml").read_text()


def test_two_runs_at_once(tmp_path: Path) -> None:
    config = compose("pretrain", [DATA, f"run_dir={tmp_path}"])
    with claimed(config):
        with pytest.raises(CheckpointError, match="Another process is training in run_dir"), claimed(config):
            pytest.fail("both train")
        with claimed(compose("pretrain", [DATA, f"run_dir={tmp_path}", "task=validate"])):
            pass
    with claimed(config):
        pass


def test_last_is_replaced_by_the_run_that_goes_on() -> None:
    """Lightning would else write ``last-v1.ckpt`` where the checkpoint it resumes from knows of no last one."""
    checkpoint = instantiate(compose("pretrain", [DATA]).callbacks.checkpoint)
    assert checkpoint._enable_version_counter is False
