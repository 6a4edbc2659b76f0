"""Metrics of torchmetrics from logits, in a user's own validation: the same number at any layout."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

import lightning_megatron as lm
from tests.helpers import VOCAB, quiet_trainer, tiny_config
from tests.models.runs import Shared, strategy
from tests.models.test_gpt import tokens
from tests.ranks import RankPool


class Measured(lm.GPTModule):
    """As a user writes it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tiny_config(init_method_std=0.2), return_logits="every_rank", **options)
        self.accuracy = MulticlassAccuracy(VOCAB, top_k=10, average="micro")
        self.perplexity = Perplexity(ignore_index=-100)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        result = super().validation_step(batch, batch_idx, dataloader_idx)
        labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
        self.perplexity(result["logits"], labels)
        self.accuracy(result["logits"].flatten(0, 1), batch["labels"].flatten())
        self.log("perplexity", self.perplexity, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        return result


def _validate(layout: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    module = Measured(**options)
    trainer = quiet_trainer(strategy(**layout), int(os.environ["WORLD_SIZE"]))
    labels = tokens(8)["labels"].clone()
    labels[3, 9:] = -100
    return trainer.validate(module, Shared(module, tokens(8) | {"labels": labels}, 2), verbose=False)[0]


def test_the_same_at_any_layout(ranks: RankPool) -> None:
    (reference,) = ranks.run(_validate, 1, {"mbs": 2}, {})
    assert torch.log(torch.tensor(reference["perplexity"])) == pytest.approx(reference["val_loss"], abs=1e-4)
    assert 0.0 < reference["accuracy"] < 1.0
    for world, layout, options in (
        (2, {"tp": 2, "sp": True}, {}),
        (2, {}, {}),
        (2, {"pp": 2}, {}),
        (2, {"cp": 2}, {}),
        (4, {"pp": 4}, {"data_on_every_stage": True}),  # every rank has labels then
    ):
        for found in ranks.run(_validate, world, layout | {"mbs": 2}, options):
            assert found == pytest.approx(reference, rel=1e-5), layout
