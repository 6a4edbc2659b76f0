"""The initial weights of a T5 are T5's, at any layout."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_megatron.interop import mapping, sharding, t5
from lightning_megatron.interop.megatron_args import described
from lightning_megatron.models.config import T5Config
from lightning_megatron.models.t5_module import T5Module
from tests.helpers import quiet_trainer
from tests.models.runs import Batch, Shared, evaluate, strategy
from tests.models.test_t5 import MEGATRON, V1_1
from tests.ranks import RankPool

VOCAB, HIDDEN, HEADS, HEAD, FFN = 512, 96, 4, 32, 256


def tiny(**changes: Any) -> T5Config:
    sizes = {"num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "kv_channels": HEAD}
    sizes |= {"ffn_hidden_size": FFN, "vocab_size": VOCAB}
    return T5Config(**sizes, hidden_dropout=0.0, attention_dropout=0.0).replace(**changes)


def batch() -> Batch:
    tokens = torch.randint(1, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens[:, :16], "labels": tokens[:, 16:].contiguous()}


def _pieces(config: T5Config, layout: dict[str, Any]) -> list[tuple[Any, ...]]:
    """This rank's pieces of the weights before any step; runs on every rank."""
    module = T5Module(config, return_logits=True)
    quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"])).predict(module, Shared(module, batch(), 1))
    return [(p.name, p.place, p.tensor.detach().clone()) for chunk in module.chunks for p in sharding.pieces(chunk)]


def weights(ranks: RankPool, config: T5Config, **layout: Any) -> dict[str, Tensor]:
    """By Hugging Face's names."""
    runs = ranks.run(_pieces, math.prod(layout.get(key, 1) for key in ("tp", "pp")), config, layout)
    joined = sharding.join([sharding.Piece(*piece) for run in runs for piece in run])
    return mapping.to_theirs(t5.table(config), joined)


@pytest.mark.parametrize(("changes", "factor"), [({}, 1.0), (V1_1, 0.5)], ids=["v1.0", "v1.1"])
def test_deviations_are_those_of_hugging_face(ranks: RankPool, changes: dict[str, Any], factor: float) -> None:
    import transformers as hf

    config = tiny(**changes, initializer_factor=factor)
    torch.manual_seed(0)
    theirs = hf.T5ForConditionalGeneration(hf.T5Config(**t5.fields(config))).state_dict()
    for name, weight in weights(ranks, config).items():
        expected = factor * HIDDEN**-0.5 if name == "lm_head.weight" else float(theirs[name].std())
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert float(weight.std()) == pytest.approx(expected, rel=0.3 if weight.numel() < 1000 else 0.05), name


def test_layouts_draw_the_same(ranks: RankPool) -> None:
    expected = weights(ranks, tiny(**V1_1))
    actual = weights(ranks, tiny(**V1_1), tp=2, pp=2, sp=True)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("changes", [{}, V1_1, {"scale_decoder_output": False}, MEGATRON], ids=str)
def test_a_fresh_model_knows_nothing(ranks: RankPool, changes: dict[str, Any]) -> None:
    """Its loss is that of a guess, and not of a model that repeats what it reads."""
    (result,) = ranks.run(evaluate, 1, partial(T5Module, tiny(**changes, num_layers=6)), batch(), {})
    assert float(result["loss"]) < math.log(VOCAB) + 1.0


def test_one_kind_of_initial_weights() -> None:
    message = r"init_method_std=0\.05 .* initializer_factor=1\.0 .* initializer_factor=None"
    with pytest.raises(ValueError, match=message):
        T5Config(init_method_std=0.05)
    assert T5Config(init_method_std=0.05, initializer_factor=None).init_method_std == 0.05


def test_a_checkpoint_older_than_the_field_says_what_it_was_drawn_by() -> None:
    told = asdict(T5Config(init_method_std=0.05, initializer_factor=None))
    del told["initializer_factor"]
    found = described({"module": "T5Module", "config": told}, "a checkpoint").config
    assert found == T5Config(init_method_std=0.05, initializer_factor=None)
    newer = {"module": "T5Module", "config": asdict(T5Config(initializer_factor=0.5))}
    assert described(newer, "a checkpoint").config == T5Config(initializer_factor=0.5)
