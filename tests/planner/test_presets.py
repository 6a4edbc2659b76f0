"""Presets and the configurations that ship under the same names."""

from pathlib import Path

import pytest

from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner import MODELS, model_preset

CONF = Path(__file__).parents[2] / "conf" / "model"
SHARED = sorted({path.stem for path in CONF.glob("*.yaml")} & MODELS.keys())


@pytest.mark.parametrize("name", SHARED)
def test_a_shipped_configuration_of_the_same_name_is_the_same_model(name: str) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    merged: dict[str, object] = {}
    for part in ("gpt_tiny", name):  # every model of conf/ extends the tiny one
        merged |= omegaconf.OmegaConf.to_object(omegaconf.OmegaConf.load(CONF / f"{part}.yaml"))
    sizes = {key: value for key, value in merged.items() if key not in ("defaults", "_target_")}
    assert GPTConfig(**sizes) == MODELS[name]


def test_names_are_forgiving_and_errors_are_not() -> None:
    assert model_preset("GPT2-Large", num_layers=12).num_layers == 12
    with pytest.raises(ValueError, match=r"model=lama_7b is not known\. Did you mean llama_7b"):
        model_preset("lama_7b")
