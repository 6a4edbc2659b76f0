"""GPT variants at every layout against one process."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

import lightning_megatron as lm
from tests.helpers import SEQUENCE, VOCAB, quiet_trainer, tiny_config
from tests.models.runs import Batch, assert_same, evaluate, fit, strategy
from tests.ranks import RankPool


def tokens(samples: int = 4, **more: torch.Tensor) -> Batch:
    text = torch.randint(0, VOCAB, (samples, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    return {"tokens": text[:, :-1], "labels": text[:, 1:], **more}


def documents(samples: int = 4) -> torch.Tensor:
    lengths = torch.tensor([[5, 6, 5], [16, 0, 0], [1, 2, 13], [8, 4, 4]])[:samples]
    return torch.stack([torch.arange(3).repeat_interleave(row) for row in lengths])


def make(return_logits: Any = False, data_on_every_stage: bool = False, **changes: Any) -> lm.GPTModule:
    return lm.GPTModule(tiny_config(**changes), return_logits=return_logits, data_on_every_stage=data_on_every_stage)


LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "num_query_groups": 2,
}


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        (LLAMA, [{"tp": 2, "sp": True}, {"pp": 2}, {"tp": 4}]),
        ({"num_query_groups": 1}, [{"tp": 2, "sp": True}, {"tp": 4}, {"tp": 2, "cp": 2}]),
        ({"position_embedding_type": "alibi"}, [{"tp": 2}, {"cp": 2}]),
        ({}, [{"cp": 2}, {"tp": 2, "cp": 2}]),
        (LLAMA | {"rope_scaling": True}, [{"tp": 2, "cp": 2, "sp": True}]),
    ],
    ids=["llama", "mqa", "alibi", "learned", "rope_scaling"],
)
def test_layouts_agree(ranks: RankPool, config: dict[str, Any], layouts: list[dict[str, Any]]) -> None:
    build, batch = partial(make, **config), tokens()
    (reference,) = ranks.run(fit, 1, build, batch, {})
    for layout in layouts:
        size = layout.get("tp", 1) * layout.get("cp", 1) * layout.get("pp", 1)
        for run in ranks.run(fit, size, build, batch, layout):
            assert_same(run, reference)


def test_documents_are_separate(ranks: RankPool) -> None:
    """Logits of each document are those of the document alone, at every layout."""
    batch = tokens(document_ids=documents())
    build = partial(make, return_logits="every_rank", data_on_every_stage=True, position_embedding_type="rope")
    (packed,) = ranks.run(evaluate, 1, build, batch, {})
    alone = {"tokens": batch["tokens"][:1, 5:11], "labels": batch["labels"][:1, 5:11]}
    (single,) = ranks.run(evaluate, 1, build, alone, {})
    torch.testing.assert_close(packed["logits"][0, 5:11], single["logits"][0], atol=1e-5, rtol=0)
    (reference,) = ranks.run(fit, 1, build, batch, {})
    for world, layout in ((2, {"tp": 2}), (2, {"cp": 2}), (4, {"pp": 4}), (4, {"cp": 2, "tp": 2})):
        for run in ranks.run(evaluate, world, build, batch, layout):
            torch.testing.assert_close(run["logits"], packed["logits"], atol=1e-5, rtol=0)
        for run in ranks.run(fit, world, build, batch, layout):
            assert_same(run, reference)


def test_padding_on_the_left_changes_nothing(ranks: RankPool) -> None:
    text = torch.randint(0, VOCAB, (1, 6), generator=torch.Generator().manual_seed(1))
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 4, dtype=torch.long), text], dim=1),
        "attention_mask": torch.tensor([[0] * 4 + [1] * 6]),
    }
    (alone,) = ranks.run(evaluate, 1, make, {"input_ids": text}, {})
    (result,) = ranks.run(evaluate, 1, make, padded, {})
    torch.testing.assert_close(result["logits"][:, 4:], alone["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(result["loss"], alone["loss"], atol=1e-5, rtol=0)


def test_arbitrary_mask_hides(ranks: RankPool) -> None:
    """A mask that tells the same as document_ids gives the same logits."""
    ids = documents()
    mask = ids[:, :, None] != ids[:, None, :]
    (by_mask,) = ranks.run(evaluate, 1, make, tokens(attention_mask=mask), {})
    (by_ids,) = ranks.run(evaluate, 1, make, tokens(document_ids=ids), {})
    (neither,) = ranks.run(evaluate, 1, make, tokens(), {})
    torch.testing.assert_close(by_mask["logits"], by_ids["logits"], atol=1e-6, rtol=0)
    assert (by_mask["logits"] - neither["logits"]).abs().max() > 1e-3


def test_logits_where_asked(ranks: RankPool) -> None:
    (reference,) = ranks.run(evaluate, 1, make, tokens(), {})
    assert reference["logits"].shape == (4, SEQUENCE, VOCAB)
    first, last = ranks.run(evaluate, 2, make, tokens(), {"pp": 2})
    assert first["logits"] is None
    torch.testing.assert_close(last["logits"], reference["logits"], atol=1e-5, rtol=0)
    odd = partial(make, vocab_size=VOCAB - 3)
    few = {key: value.clamp(max=VOCAB - 4) for key, value in tokens().items()}
    for run in ranks.run(evaluate, 2, odd, few, {"tp": 2}):
        assert run["logits"].shape[-1] == VOCAB - 3  # the padding of the vocabulary is gone


EXPERTS = LLAMA | {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 1e-3, "num_layers": 2}


def test_experts_in_parallel(ranks: RankPool) -> None:
    build, batch = partial(make, **EXPERTS), tokens()
    (reference,) = ranks.run(fit, 1, build, batch, {"mbs": 2})
    assert reference[2]["train_load_balancing_loss"] > 0.9  # 1 is balanced
    assert reference[2]["train_z_loss"] > 0
    for world, layout in ((2, {"ep": 2, "mbs": 2}), (2, {"pp": 2, "mbs": 2}), (4, {"pp": 2, "ep": 2, "mbs": 2})):
        for run in ranks.run(fit, world, build, batch, layout):
            assert_same(run, reference)
            for name in ("train_load_balancing_loss", "train_z_loss"):
                assert run[2][name] == pytest.approx(reference[2][name], abs=1e-5)


SWITCH = EXPERTS | {"moe_router_topk": 1, "add_bias_linear": False}


def _routed(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer of experts makes of 24 tokens, and what its definition makes of them."""
    module = make(**(SWITCH | changes))
    quiet_trainer(strategy(), 1).predict(module, [])
    layer = module.chunks[0].decoder.layers[0].mlp.train()
    states = torch.randn(12, 2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = layer(states)[0].view(24, 32)
        tokens, config = states.view(24, 32), module.config
        logits = tokens @ layer.router.weight.t()
        weights, chosen = logits.softmax(-1).topk(config.moe_router_topk)
        if config.moe_router_topk > 1 and not config.moe_router_pre_softmax:
            weights = logits.topk(config.moe_router_topk).values.softmax(-1)
        dense = torch.zeros(24, 4).scatter(1, chosen, weights)
        if config.moe_expert_capacity_factor is not None:
            most = math.ceil(24 * config.moe_router_topk / 4 * config.moe_expert_capacity_factor)
            kept = torch.zeros_like(dense).scatter(0, dense.topk(most, dim=0).indices, 1.0)
            dense = dense * kept
        experts = torch.stack([expert(tokens)[0] for expert in layer.experts.local_experts], dim=1)
        return output, (dense[..., None] * experts).sum(1)


def test_experts_are_chosen_weighed_and_filled_by_definition(ranks: RankPool) -> None:
    for changes in (
        {},
        {"moe_expert_capacity_factor": 0.5},
        {"moe_router_topk": 2, "moe_router_pre_softmax": True},
        {"moe_router_topk": 2, "moe_expert_capacity_factor": 0.75},
    ):
        ((output, expected),) = ranks.run(partial(_routed, **changes), 1)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        if changes.get("moe_expert_capacity_factor") == 0.5:
            assert (expected == 0).all(dim=1).any()  # a token that no expert had room for
    build = partial(make, **SWITCH, moe_expert_capacity_factor=0.5)
    (reference,) = ranks.run(fit, 1, build, tokens(), {"mbs": 2})
    for run in ranks.run(fit, 2, build, tokens(), {"ep": 2, "mbs": 2}):
        assert_same(run, reference)


def test_positions_that_rotary_embeddings_do_not_need(ranks: RankPool) -> None:
    """Positions that start anew in each document cost nothing; others run unfused, at every layout, to the same."""
    ids = documents()
    anew = torch.stack([torch.cat([torch.arange(n) for n in row.bincount()]) for row in ids])
    model = {"position_embedding_type": "rope", "init_method_std": 0.2}
    build = partial(fused_layers, data_on_every_stage=True, **model)
    (plain,) = ranks.run(fit, 1, build, tokens(document_ids=ids), {})
    assert ranks.run(fit, 1, build, tokens(document_ids=ids, position_ids=anew), {}) == [plain]
    odd = tokens(document_ids=ids, position_ids=anew * 2)
    (reference,) = ranks.run(fit, 1, partial(make, **model), odd, {})
    assert abs(reference[0][0] - plain[0][0]) > 1e-4
    for world, layout in ((1, {"mbs": 2}), (2, {"tp": 2, "sp": True}), (2, {"cp": 2}), (4, {"pp": 4})):
        for run in ranks.run(fit, world, build, odd, layout):
            assert_same(run, reference)


def fused_layers(**changes: Any) -> lm.GPTModule:
    module = make(**changes)
    module.fused = True
    return module


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        (EXPERTS | {"num_layers": 4}, [(2, {"pp": 2, "mbs": 2}), (4, {"pp": 2, "ep": 2, "mbs": 2})]),
        ({"num_query_groups": 1}, [(4, {"tp": 2, "pp": 2, "vpp": 2, "sp": True, "mbs": 1})]),
        pytest.param(
            EXPERTS
            | {
                "num_layers": 4,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            [(2, {"pp": 2, "mbs": 2}), (4, {"tp": 2, "sp": True, "pp": 2, "mbs": 2})],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"num_query_groups": 1, "recompute_granularity": "selective"},
            [(4, {"tp": 2, "pp": 2})],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["experts", "mqa", "experts recomputed", "mqa recomputed"],
)
def test_layers_that_cannot_be_fused_run_in_a_pipeline(
    ranks: RankPool, config: dict[str, Any], layouts: list[tuple[int, dict[str, Any]]]
) -> None:
    """With ``fused=True``, the default on CUDA. A stage frees what it has sent, which must not be a view."""
    (reference,) = ranks.run(fit, 1, partial(make, **config), tokens(), {"mbs": 2})
    for world, layout in layouts:
        for run in ranks.run(fit, world, partial(fused_layers, **config), tokens(), layout):
            assert_same(run, reference)


RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"moe_router_topk": 1, "add_qkv_bias": True}, RECOMPUTED])
def test_experts_of_equal_micro_batches(ranks: RankPool, changes: dict[str, Any]) -> None:
    """Losses of routers are means over a micro-batch, so runs are equal where their micro-batches are."""
    config = EXPERTS | {"num_layers": 4} | changes
    (reference,) = ranks.run(fit, 1, partial(make, **config), tokens(8), {"mbs": 2})
    (larger,) = ranks.run(fit, 1, partial(make, **config), tokens(8), {"mbs": 8})
    assert abs(larger[0][-1] - reference[0][-1]) > 1e-5
    split = {"tp": 2, "sp": True}
    for world, layout in (
        (1, {}),
        (2, {}),
        (2, {"pp": 2}),
        (2, {"pp": 2, "vpp": 2}),
        (4, {"pp": 2, "ep": 2}),
        (4, {"ep": 2}),
        (2, split),
        (4, split | {"ep": 2}),
        (2, {"cp": 2}),
    ):
        for run in ranks.run(fit, world, partial(fused_layers, **config), tokens(8), layout | {"mbs": 2}):
            assert max(abs(a - b) for a, b in zip(run[0], reference[0], strict=True)) < 5e-7, layout
            assert max(abs(a / b - 1) for a, b in zip(run[1], reference[1], strict=True)) < 5e-7, layout


def test_experts_with_biases(ranks: RankPool) -> None:
    build, batch = partial(make, **(EXPERTS | {"add_bias_linear": True})), tokens()
    (reference,) = ranks.run(fit, 1, build, batch, {"mbs": 2})
    for run in ranks.run(fit, 2, build, batch, {"ep": 2, "mbs": 2}):
        assert_same(run, reference)


def test_bad_input() -> None:
    for changes, words in (
        ({"num_attention_heads": 5}, "not divisible by num_attention_heads=5"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"position_embedding_type": "alibbi"}, "Did you mean 'alibi'"),
        ({"rope_scaling": True}, "belong to position_embedding_type='rope'"),
        ({"num_moe_experts": 2, "moe_router_topk": 3}, "moe_router_topk=3"),
        ({"num_moe_experts": 2, "moe_router_topk": 1, "moe_router_pre_softmax": False}, "the weight 1"),
        ({"num_moe_experts": 2, "moe_expert_capacity_factor": 0.0}, "moe_expert_capacity_factor=0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny_config(**changes)
    with pytest.raises(lm.DataError, match="longer than max_position_embeddings=16"):
        make().prepare_batch({"input_ids": torch.zeros(1, 17, dtype=torch.long)})
    with pytest.raises(lm.DataError, match="span 128 to 128, but vocab_size=128"):
        make().prepare_batch({"input_ids": torch.full((1, 4), VOCAB)})
    alibi = make(position_embedding_type="alibi")
    with pytest.raises(lm.DataError, match="knows no other positions"):
        alibi.prepare_batch(tokens(position_ids=torch.arange(SEQUENCE).expand(4, -1) * 2))
