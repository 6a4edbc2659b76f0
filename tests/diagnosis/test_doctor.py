"""`lightning-megatron doctor`: what it finds, what it says to do, and its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_megatron.backends import inventory, report
from lightning_megatron.backends.inventory import Kernel
from lightning_megatron.cli.doctor import _selftest_findings
from lightning_megatron.cli.main import main
from lightning_megatron.diagnosis import Status, environment
from lightning_megatron.diagnosis.environment import requirement
from lightning_megatron.diagnosis.selftest import SelfTest, Trial, layouts, run_selftest


def doctor(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_megatron.cli.main", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **kwargs)


@pytest.mark.slow
def test_a_healthy_machine() -> None:
    result = doctor("--accelerator", "cpu", "--timeout", "200")
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("python", "megatron-core", "AdamW", "attention", "data parallel 2", "tp2_sp", "pp2", "agreement"):
        assert text in result.stdout
    assert result.stdout.strip().endswith("No problem found.")


def test_a_missing_package_is_a_problem_with_a_remedy(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(
        environment, "requires", lambda name: ["torch>=99", "no-such-package-of-mine>=1", "x; extra == 'y'"]
    )
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "pip install 'torch>=99'" in output
    assert "not installed" in output
    assert "2 problems: torch, no-such-package-of-mine" in output
    assert "Kernels" not in output


def test_malicious_uploads_are_told(monkeypatch: Any) -> None:
    monkeypatch.setattr(environment, "version", lambda name: "2.6.3")
    found = requirement("lightning>=2.6")
    assert found.status is Status.PROBLEM
    assert "GHSA-w37p-236h-pfx3" in found.detail


def test_packages_that_cannot_be_imported_are_problems(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "lightning_megatron.data.native", None)  # as a broken file would
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "1 problem: megatron-core" in output
    assert "pip install --force-reinstall megatron-core" in output
    assert "Self-test" not in output


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("OMP_NUM_THREADS", None, "export OMP_NUM_THREADS=1"), ("http_proxy", "http://proxy:1", "no_proxy=localhost")],
)
def test_notes_about_variables(monkeypatch: Any, name: str, value: str | None, text: str) -> None:
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    notes = [finding.remedy for finding in environment.environment() if finding.status is Status.NOTE]
    assert any(text in remedy for remedy in notes)


def test_a_host_without_an_address_is_a_problem(monkeypatch: Any) -> None:
    def fails(name: str) -> str:
        raise OSError("no address")

    monkeypatch.setattr(environment.socket, "gethostbyname", fails)
    (found,) = environment._network()
    assert found.status is Status.PROBLEM
    assert "/etc/hosts" in found.remedy


def test_another_apex_is_noticed(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import no_such_package_of_mine")  # it must not be imported for that
    monkeypatch.syspath_prepend(tmp_path)
    assert [finding.remedy for finding in environment._extensions()] == ["pip uninstall apex"]


def test_every_kernel_says_why() -> None:
    kernels = {kernel.part: kernel for kernel in report()}
    assert {"attention", "AdamW", "layers and loss", "gradient norm and clipping", "megatron-core"} <= set(kernels)
    assert all(kernel.choice and kernel.why for kernel in kernels.values())


def test_the_reason_of_a_broken_build_is_no_markup(monkeypatch: Any, capsys: Any) -> None:
    kernel = Kernel("Apex", "not used", "broken: OSError: [/usr/lib/libcudart.so]")
    monkeypatch.setattr(inventory, "report", lambda: [kernel])
    assert main(["doctor", "--no-self-test"]) == 0
    assert kernel.why in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- self-test


def test_layouts_that_a_number_of_processes_can_try() -> None:
    assert layouts(1) == ("tp1",)
    assert layouts(2) == ("tp1", "tp2_sp", "pp2")
    assert layouts(3) == ("tp1",)
    assert layouts(4) == ("tp1", "tp2_sp", "pp2", "tp2_pp2_sp")


@pytest.mark.slow
def test_a_rank_that_dies_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    # Python runs this when a process starts.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('DIE'): os.register_at_fork(after_in_child=lambda: os._exit(3))\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent.parent}")
    monkeypatch.setenv("DIE", "1")
    result = run_selftest("cpu", 2, timeout=30)
    assert "died with exit code 3" in result.error
    (found,) = _selftest_findings(result)
    assert found.status is Status.PROBLEM
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def trial(layout: str, *losses: float, error: str = "") -> Trial:
    return Trial(layout=layout, losses=losses, error=error)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (SelfTest(accelerator="cpu", devices=2, trials=(trial("tp1", 4.0, 3.0),)), None),
        (SelfTest(accelerator="cpu", devices=2, trials=(trial("tp1", 4.0, 5.0),)), "does not fall"),
        (SelfTest(accelerator="cpu", devices=2, trials=(trial("tp1", 4.0, float("nan")),)), "does not fall"),
        (SelfTest(accelerator="cpu", devices=2, trials=(trial("pp2", error="rank 1: boom"),)), "boom"),
        (
            SelfTest(accelerator="cpu", devices=2, trials=(trial("tp1", 4.0, 3.0),), disagreement=0.1),
            "differ by 1.0e-01",
        ),
        (SelfTest(accelerator="cuda", devices=2, error="ranks [1] did not finish in 60 s"), "did not finish"),
    ],
)
def test_what_a_self_test_means(result: SelfTest, problem: str | None) -> None:
    problems = [finding for finding in _selftest_findings(result) if finding.status is Status.PROBLEM]
    assert bool(problems) == (problem is not None)
    assert result.healthy == (problem is None)
    if problem is not None:
        assert problem in problems[0].detail
        assert problems[0].remedy


def test_arguments_that_do_not_fit(capsys: Any) -> None:
    assert main(["doctor", "--devices", "0"]) == 2
    assert "--devices=0" in capsys.readouterr().err
    assert main(["doctor", "--timeout", "0"]) == 2
    assert "--timeout=0" in capsys.readouterr().err
    assert main(["doctor", "nowhere.ckpt"]) == 1
    assert "There is no checkpoint" in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, lightning_megatron.diagnosis, lightning_megatron.cli.doctor; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
