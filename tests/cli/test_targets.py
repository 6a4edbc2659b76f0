"""What a configuration may make: the package's own groups, and what the user names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from omegaconf import OmegaConf

from lightning_megatron.cli import targets
from lightning_megatron.cli.configuration import ConfigurationError, check, compose, recipe

DATA = "data.data_path=corpus"
REFUSED = [
    "pandas.read_pickle",
    "os.system",
    "builtins.eval",
    "hydra.utils.get_method",
    "lightning_megatron_evil.Anything",
    "lightning.pytorch.cli.LightningCLI",
    "torch.load",
    "",
    "system",
]
BEHIND = [
    "lightning_megatron.cli.main.os",
    "lightning_megatron.checkpoint.publish.remove",
    "lightning_megatron.checkpoint.publish.Path",
    "lightning.pytorch.callbacks.model_checkpoint.shutil",
    "lightning.pytorch.callbacks.model_checkpoint.warn",
]
"""Names of the allow-list behind which is none of its classes."""


def _node(target: Any, place: str) -> Any:
    made = {"_target_": target}
    return OmegaConf.create({"here": {"a": made}, "in_a_list": {"a": [1, [made]]}, "deep": {"a": {"b": made}}}[place])


@pytest.mark.parametrize("place", ["here", "in_a_list", "deep"])
@pytest.mark.parametrize("target", REFUSED)
def test_refused(target: str, place: str) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing that a configuration may make: lightning_megatron, .*LIGHT"):
        check(OmegaConf.create({"trainer": _node(target, place)}))


@pytest.mark.parametrize("target", BEHIND)
def test_no_other_object_behind_an_allowed_name(target: str) -> None:
    with pytest.raises(ConfigurationError, match=r"it is no class of lightning_meg|cannot be imported"):
        check(OmegaConf.create({"trainer": _node(target, "here")}))


def test_resolved_targets_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_TARGET", "os.system")
    with pytest.raises(ConfigurationError, match=r"'os.system' is nothing that"):
        check(OmegaConf.create({"a": {"_target_": "${oc.env:X_TARGET}"}}))
    with pytest.raises(ConfigurationError, match="is nothing that"):
        check(OmegaConf.create({"a": {"_target_": 3}}))


@pytest.mark.parametrize(
    "value",
    [
        "${oc.create:{_target_:pandas.read_pickle}}",
        "${oc.decode:'{_target_: pandas.read_pickle}'}",
        ["${oc.create:{_target_:pandas.read_pickle}}"],
        "${behind}",
    ],
)
def test_targets_behind_interpolations(value: Any) -> None:
    config = OmegaConf.create({"trainer": {"x": value}, "behind": {"y": "${oc.create:{_target_:pandas.read_pickle}}"}})
    with pytest.raises(ConfigurationError, match=r"'pandas.read_pickle' is nothing that"):
        check(config)


def test_what_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    fraction = "fractions.Fraction"
    for override in (f"+callbacks.x={{_target_: {fraction}}}", f"++callbacks.x={{_target_: {fraction}}}"):
        assert compose("pretrain", [DATA, override]).callbacks.x._target_ == fraction
        assert targets.typed([override]) == {fraction}
    node = OmegaConf.create({"a": {"_target_": fraction}})
    for value, allowed in (("other", False), ("fraction", False), ("other, fractions", True), (fraction, True)):
        monkeypatch.setenv(targets.ENVIRONMENT, value)
        if allowed:
            check(node)
        else:
            with pytest.raises(ConfigurationError, match="LIGHTNING_MEGATRON_TARGETS=fractions"):
                check(node)


@pytest.mark.parametrize("where", ["callbacks", "launcher", "group"])
def test_hydras_own_objects_of_a_foreign_file(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra makes its callbacks and launchers before a recipe runs, so they are checked before Hydra does."""
    ran = tmp_path / "ran"
    made = f"{{_target_: pathlib.Path.touch, self: {{_target_: pathlib.Path, _args_: [{ran}]}}}}"
    files = {
        "callbacks": ("theirs.yaml", f"defaults: [pretrain, _self_]\nhydra: {{callbacks: {{x: {made}}}}}\n"),
        "launcher": ("theirs.yaml", "defaults: [pretrain, _self_]\nhydra: {launcher: {_target_: pathlib.Path}}\n"),
        "group": ("experiment/theirs.yaml", f"# @package hydra.callbacks\nx: {made}\n"),
    }
    name, text = files[where]
    (tmp_path / "conf" / name).parent.mkdir(parents=True)
    (tmp_path / "conf" / name).write_text(text)
    chosen = ["+experiment=theirs"] if where == "group" else ["--config-name", "theirs"]
    arguments = ["--config-dir", str(tmp_path / "conf"), *chosen, DATA, f"run_dir={tmp_path / 'run'}"]

    @recipe("pretrain")
    def run(config: Any) -> None:
        pytest.fail("ran")

    with patch("sys.argv", ["pretrain", *arguments]), pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    assert "is nothing that a configuration may make: hydra._internal.core_plugins" in capsys.readouterr().err
    assert not ran.exists()


def test_the_installed_hydra_refuses_dangers_by_any_name() -> None:
    """The floor in pyproject.toml: a second net below the allow-list."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    for target in ("os.system", "logging.os.system", "pickle.loads", "builtins.eval", "subprocess.run"):
        with pytest.raises(InstantiationException):
            instantiate({"_target_": target, "_args_": ["true"]})
    assert "HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE" not in os.environ
