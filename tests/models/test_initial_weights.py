"""A seed gives the same weights at any layout of CPU ranks, whatever the padding of the vocabulary there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from tests.checkpoint.runs import Case, make_trainer, tensors

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 12, "num_attention_heads": 4, "max_position_embeddings": 17}
"""Tables of 12 columns: no multiple of the 16 numbers that torch draws at a time."""
VOCABULARY = {"vocab_size": 97, "make_vocab_size_divisible_by": 35}


def gpt(**changes: Any) -> lm.MegatronModule:
    return lm.GPTModule(lm.GPTConfig(**SIZES, **VOCABULARY).replace(**changes))


def bert(**changes: Any) -> lm.MegatronModule:
    return lm.BertModule(lm.BertConfig(**SIZES, **VOCABULARY).replace(**changes))


def t5(**changes: Any) -> lm.MegatronModule:
    return lm.T5Module(lm.T5Config(**SIZES, **VOCABULARY).replace(**changes))


UNTIED = {"share_embeddings_and_output_weights": False}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt": (gpt, {}),
    "gpt-untied": (gpt, UNTIED),
    "gpt-rope": (gpt, {"position_embedding_type": "rope", **UNTIED}),
    "gpt-experts": (gpt, {"num_moe_experts": 4, "add_bias_linear": False}),
    "bert": (bert, {}),
    "bert-untied": (bert, UNTIED),
    "t5": (t5, {}),
    "t5-untied": (t5, UNTIED),
    "t5-learned": (t5, {"position_embedding_type": "learned_absolute", "initializer_factor": None}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def save_new(directory: Path, names: list[str], world: int, layout: dict[str, Any]) -> None:
    """Checkpoints of new models."""
    for name in names:
        make, changes = MODELS[name]
        module = make(**changes)
        split = "num_moe_experts" in changes and "tensor_model_parallel_size" in layout
        sizes = layout | {"sequence_parallel": True} if split else layout  # as experts need it
        trainer = make_trainer(Case(world, sizes), max_steps=1)
        trainer.validate(module, [], verbose=False)
        trainer.save_checkpoint(directory / name, weights_only=True)


def test_the_layouts_pad_the_vocabulary_otherwise() -> None:
    assert [gpt().config.padded_vocab_size(tp) for tp in (1, 2, 4)] == [105, 140, 140]


def assert_equal_weights(ranks: Any, path: Path, names: list[str], layouts: list[str]) -> None:
    for layout in layouts:
        world, sizes = LAYOUTS[layout]
        ranks.run(save_new, world, path / layout, names, world, sizes, timeout=600.0)
    for name in names:
        wanted = tensors(path / layouts[0] / name)
        for layout in layouts[1:]:
            found = tensors(path / layout / name)
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                rows = 99 if (value.dim() and "embeddings.weight" in key) or "output_layer" in key else None
                assert torch.equal(found[key][:rows], value[:rows]), (name, layout, key)


def test_padding_of_the_vocabulary_moves_no_weight(ranks: Any, tmp_path: Path) -> None:
    assert_equal_weights(ranks, tmp_path, ["gpt-untied", "bert", "t5-untied"], ["tp1", "tp2"])


@pytest.mark.slow
def test_every_model_at_every_layout(ranks: Any, tmp_path: Path) -> None:
    assert_equal_weights(ranks, tmp_path, list(MODELS), list(LAYOUTS))
