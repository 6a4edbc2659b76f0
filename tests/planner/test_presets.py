"""Presets and the configurations that ship under the same names."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lightning_megatron.cli.configuration import conf_dir
from lightning_megatron.planner import PRESETS, model_preset


def test_names_are_forgiving_and_errors_are_not() -> None:
    assert model_preset("GPT2-Large", num_layers=12).num_layers == 12
    with pytest.raises(ValueError, match=r"model=lama_7b is not known\. Did you mean llama_7b"):
        model_preset("lama_7b")


def test_presets_are_the_models_that_can_be_trained() -> None:
    names = {path.stem for path in (conf_dir() / "model").glob("*.yaml")}
    assert names == set(PRESETS)
    with initialize_config_dir(str(conf_dir()), version_base=None):
        for name in names:
            assert instantiate(compose("pretrain", overrides=[f"model={name}"]).model) == PRESETS[name], name
