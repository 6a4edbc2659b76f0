"""Gradients of weighted, masked, several-term and auxiliary losses against plain autograd in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lightning_megatron as lm
from tests.helpers import SEQUENCE, tiny_config
from tests.models import test_bert
from tests.models.gradient_runs import first_step, reference, router_losses, token_losses
from tests.models.runs import Batch
from tests.models.test_gpt import EXPERTS, tokens
from tests.ranks import RankPool

Case = tuple[int, dict[str, Any], int]
"""World size, layout, batches that are accumulated."""
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}


def gpt(**changes: Any) -> lm.GPTModule:
    return lm.GPTModule(tiny_config(init_method_std=0.2, num_layers=2).replace(**changes))


def experts() -> lm.GPTModule:
    return gpt(**EXPERTS)


def bert() -> lm.BertModule:
    return test_bert.make(num_layers=2)


def mask(kind: str) -> torch.Tensor:
    """``[8, sequence]``; ``random`` has samples without loss, ``half`` none in the first micro-batches and replica."""
    if kind == "random":
        weights = torch.rand(8, SEQUENCE, generator=torch.Generator().manual_seed(1))
        return weights * (torch.arange(8)[:, None] % 3 > 0)
    if kind == "half":
        return torch.full((8, SEQUENCE), 0.3) * (torch.arange(8)[:, None] >= 4)
    return torch.full((8, SEQUENCE), float(kind))


def gpt_loss(module: Any, batch: Batch) -> torch.Tensor:
    return (token_losses(module, batch) * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def bert_loss(module: Any, batch: Batch) -> torch.Tensor:
    losses, binary = module.forward_step(module.chunks[0], dict(batch))
    masked = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    return masked + F.cross_entropy(binary, batch["sentence_order"], ignore_index=-100)


def bert_batch() -> Batch:
    """Samples of 1 to 8 masked tokens, half of them with a label of the sentences' order."""
    batch = test_bert.batch(8)
    masked = torch.arange(SEQUENCE) <= torch.arange(8)[:, None]
    order = torch.tensor([0, 1, -100, 1, 0, -100, -100, -100])
    return batch | {"labels": batch["input_ids"].masked_fill(~masked, -100), "next_sentence_label": order}


def check(ranks: RankPool, make: Any, batch: Batch, loss: Any, cases: list[Case]) -> None:
    ((expected_loss, expected_norm),) = ranks.run(reference, 1, make, batch, loss)
    for world, layout, parts in cases:
        losses, norm = ranks.run(first_step, world, make, batch, layout, parts)[0]
        assert norm == pytest.approx(expected_norm, rel=1e-5), (world, layout, parts)
        if parts == 1 and loss in (gpt_loss, bert_loss):
            assert losses[0] == pytest.approx(expected_loss, rel=1e-6), (world, layout)


def test_fractional_weights(ranks: RankPool) -> None:
    batch = tokens(8, loss_mask=mask("random"))
    check(ranks, gpt, batch, gpt_loss, [(1, {"mbs": 1}, 2), (2, {"mbs": 2} | SHARDED, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["0.1", "0.3", "random", "half"])
def test_fractional_weights_at_any_layout(ranks: RankPool, kind: str) -> None:
    cases: list[Case] = [(1, {"mbs": size}, 1) for size in (1, 2, 4)]
    cases += [(1, {"mbs": 2}, 4), (2, {"pp": 2}, 2), (2, {"cp": 2}, 1), (4, {"pp": 2, "mbs": 1} | SHARDED, 2)]
    check(ranks, gpt, tokens(8, loss_mask=mask(kind)), gpt_loss, cases)


def test_terms_with_counts_of_their_own(ranks: RankPool) -> None:
    check(ranks, bert, bert_batch(), bert_loss, [(1, {"mbs": 2}, 4), (2, {"mbs": 1}, 2)])


@pytest.mark.slow
def test_terms_at_any_layout(ranks: RankPool) -> None:
    cases: list[Case] = [(1, {}, 1), (1, {"mbs": 1}, 8), (2, {"mbs": 1} | SHARDED, 4), (2, {"pp": 2}, 4)]
    check(ranks, bert, bert_batch(), bert_loss, [*cases, (4, {"pp": 2, "mbs": 1}, 4)])


def test_auxiliary_losses_of_experts(ranks: RankPool) -> None:
    loss = partial(router_losses, micro_batch_size=2)
    check(ranks, experts, tokens(8, loss_mask=mask("half")), loss, [(1, {"mbs": 2}, 2), (2, {"mbs": 2, "ep": 2}, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["1", "random", "half", "0"])
def test_auxiliary_losses_at_any_layout(ranks: RankPool, kind: str) -> None:
    cases: list[Case] = [
        (1, {"mbs": 2}, 1),
        (1, {"mbs": 2}, 4),
        (2, {"mbs": 2} | SHARDED, 2),
        (2, {"mbs": 2, "cp": 2}, 2),
        (2, {"mbs": 2, "pp": 2}, 2),
        (2, {"mbs": 2, "tp": 2, "sp": True}, 1),
    ]
    loss = partial(router_losses, micro_batch_size=2)
    check(ranks, experts, tokens(8, loss_mask=mask(kind)), loss, cases)


class OwnTerms(lm.GPTModule):
    """A user's loss of two means: over tokens, and over samples."""

    counts_terms = True

    def loss(self, output: torch.Tensor, microbatch: dict[str, Any]) -> lm.Loss:
        loss = super().loss(output, microbatch)
        return lm.Loss(loss.sum, loss.num_tokens, {}, {"samples": (output.square().mean(1).sum(), output.size(0))})

    def loss_counts(self, batch: Any) -> Any:
        samples = batch["tokens"].size(0)
        return {"num_tokens": batch["loss_mask"].sum(), "samples": samples} if self.counts_terms else None


class Uncounted(OwnTerms):
    counts_terms = False


class Miscounted(OwnTerms):
    def loss_counts(self, batch: Any) -> Any:
        return {"num_tokens": batch["loss_mask"].sum() + 1, "samples": batch["tokens"].size(0)}


def of_kind(kind: Any) -> Any:
    return kind(tiny_config(init_method_std=0.2, num_layers=2))


def own_loss(module: Any, batch: Batch) -> torch.Tensor:
    return gpt_loss(module, batch) + token_losses(module, batch).square().mean()


def test_terms_of_a_user(ranks: RankPool) -> None:
    batch = tokens(8, loss_mask=mask("random"))
    check(ranks, partial(of_kind, OwnTerms), batch, own_loss, [(2, {"mbs": 1}, 2)])
    for kind, text in ((Uncounted, "Override loss_counts"), (Miscounted, "had told")):
        _, errors = ranks.attempt(first_step, 1, partial(of_kind, kind), batch, {"mbs": 2}, 1)
        assert "ModuleError" in errors[0]
        assert text in errors[0]
