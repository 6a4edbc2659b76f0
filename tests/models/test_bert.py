"""BERT at every layout against one process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lightning_megatron as lm
from lightning_megatron.models.bert_module import BertModule
from lightning_megatron.models.config import BertConfig
from tests.models.runs import Batch, assert_same, evaluate, fit
from tests.ranks import RankPool

VOCAB, SEQUENCE = 96, 16


def make(**changes: Any) -> BertModule:
    config = BertConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=8,
        max_position_embeddings=SEQUENCE,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        classifier_dropout=0.0,
        init_method_std=0.2,
    )
    return BertModule(config.replace(**changes))


def batch(samples: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (samples, SEQUENCE), generator=generator)
    labels = tokens.masked_fill(torch.rand(samples, SEQUENCE, generator=generator) > 0.3, -100)
    mask = torch.ones(samples, SEQUENCE, dtype=torch.long)
    mask[1, 9:] = 0
    types = (torch.arange(SEQUENCE) > 7).long().expand(samples, SEQUENCE)
    return {
        "input_ids": tokens,
        "labels": labels.masked_fill(mask == 0, -100),
        "attention_mask": mask,
        "token_type_ids": types,
        "next_sentence_label": torch.arange(samples) % 2,
    }


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        (
            {},
            [
                (2, {"tp": 2, "sp": True}),
                (2, {"pp": 2, "mbs": 1}),
                (2, {"mbs": 1}),
                (4, {"pp": 4}),
                (4, {"tp": 2, "pp": 2, "sp": True}),
                (2, {"pp": 2, "vpp": 2}),
            ],
        ),
        ({"add_binary_head": False, "position_embedding_type": "rope"}, [(2, {"tp": 2})]),
    ],
    ids=["pretraining", "mlm_rope"],
)
def test_layouts_agree(ranks: RankPool, config: dict[str, Any], layouts: list[tuple[int, dict[str, Any]]]) -> None:
    build = partial(make, **config)
    (reference,) = ranks.run(fit, 1, build, batch(), {})
    for world, layout in layouts:
        for run in ranks.run(fit, world, build, batch(), layout):
            assert_same(run, reference)
            assert run[2]["train_lm_loss"] == pytest.approx(reference[2]["train_lm_loss"], abs=1e-5)


def make_fused(**changes: Any) -> BertModule:
    module = make(**changes)
    module.fused = True
    return module


@pytest.mark.parametrize("padded", [True, False])
def test_fused_layers_and_loss_equal_unfused(ranks: RankPool, padded: bool) -> None:
    given = batch()
    if not padded:
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    (reference,) = ranks.run(fit, 1, make, given, {})
    for world, layout in [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2, "mbs": 1})]:
        for run in ranks.run(fit, world, make_fused, given, layout):
            assert_same(run, reference)


class WholeVocabulary(BertModule):
    """Computes the vocabulary for all tokens, as it is done under sequence parallelism."""

    def prepare_batch(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in super().prepare_batch(batch).items() if name != "masked_positions"}


def make_whole(fused: bool) -> BertModule:
    module = WholeVocabulary(make().config)
    module.fused = fused
    return module


@pytest.mark.parametrize("fused", [False, True])
def test_a_vocabulary_for_masked_tokens_alone_changes_nothing(ranks: RankPool, fused: bool) -> None:
    positions = make().prepare_batch(batch())["masked_positions"]
    assert positions.shape == (4, 8)
    mask = batch()["labels"] >= 0
    assert positions[0].tolist() == [*mask[0].nonzero().flatten().tolist(), *[SEQUENCE] * (8 - int(mask[0].sum()))]
    (expected,) = ranks.run(fit, 1, partial(make_whole, fused), batch(), {})
    (actual,) = ranks.run(fit, 1, make_fused if fused else make, batch(), {})
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["regression", "classes", "multi_label"])
def test_finetuning(ranks: RankPool, kind: str) -> None:
    labels = {
        "regression": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "classes": torch.tensor([0, 2, 1, 2]),
        "multi_label": torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]),
    }[kind]
    build = partial(make, num_labels=1 if kind == "regression" else 3)
    data = {key: batch()[key] for key in ("input_ids", "attention_mask")} | {"labels": labels}
    (result,) = ranks.run(evaluate, 1, build, data, {})
    logits = result["logits"]
    expected = {
        "regression": lambda: F.mse_loss(logits.view(-1), labels),
        "classes": lambda: F.cross_entropy(logits, labels),
        "multi_label": lambda: F.binary_cross_entropy_with_logits(logits, labels),
    }[kind]()
    torch.testing.assert_close(result["loss"], expected, atol=1e-6, rtol=1e-6)
    (reference,) = ranks.run(fit, 1, build, data, {})
    assert reference[0][-1] < reference[0][0]
    for run in ranks.run(fit, 4, build, data, {"tp": 2, "pp": 2, "sp": True}):
        assert_same(run, reference)


def test_bad_input() -> None:
    with pytest.raises(lm.DataError, match="The label 3 is none of num_labels=3"):
        make(num_labels=3).prepare_batch({"input_ids": torch.ones(1, 4).long(), "labels": torch.tensor([3])})
    with pytest.raises(lm.DataError, match="num_tokentypes=2"):
        make().prepare_batch(batch() | {"token_type_ids": torch.full((4, SEQUENCE), 2)})
    with pytest.raises(lm.DataError, match="longer than max_position_embeddings"):
        make().prepare_batch({"input_ids": torch.ones(1, 17).long(), "labels": torch.ones(1, 17).long()})
