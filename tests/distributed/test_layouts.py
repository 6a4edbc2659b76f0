"""Every layout trains as one process does: the same losses and gradient norms from the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import lightning_megatron as lm
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
SP, DISTRIBUTED = "sequence_parallel", "use_distributed_optimizer"
OVERLAP = {DISTRIBUTED: True, "overlap_grad_reduce": True, "overlap_param_gather": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {TP: 2}),
    "pp2": (2, {PP: 2}),
    "pp2 interleaved": (2, {PP: 2, VPP: 2}),
    "tp2 sp": (2, {TP: 2, SP: True}),
    "dp2": (2, {}),
    "dp2 distributed optimizer": (2, {DISTRIBUTED: True}),
    "dp2 overlapped": (2, OVERLAP),
    "dp2 overlapped reduction": (2, {"overlap_grad_reduce": True}),
    "pp2 first stage of 1 layer": (2, {PP: 2, "num_layers_in_first_pipeline_stage": 1}),
    "pp2 last stage of 1 layer": (2, {PP: 2, "num_layers_in_last_pipeline_stage": 1}),
    "pp2 by notation": (2, {PP: 2, "pipeline_model_parallel_layout": "Et|tttL"}),
    "tp2 pp2": (4, {TP: 2, PP: 2}),
    "tp2 pp2 sp distributed optimizer": (4, {TP: 2, PP: 2, SP: True, DISTRIBUTED: True}),
    "tp2 pp2 interleaved sp": (4, {TP: 2, PP: 2, VPP: 2, SP: True}),
    "pp2 dp2 distributed optimizer": (4, {PP: 2, DISTRIBUTED: True}),
    "pp2 dp2 interleaved overlapped": (4, {PP: 2, VPP: 2, **OVERLAP}),
    "tp2 dp2 overlapped sp": (4, {TP: 2, SP: True, **OVERLAP}),
    "pp4": (4, {PP: 4}),
    "tp4": (4, {TP: 4}),
    "dp4 distributed optimizer": (4, {DISTRIBUTED: True}),
}


SLOW = {
    "dp2 overlapped reduction",
    "pp2 last stage of 1 layer",
    "tp2 dp2 overlapped sp",
    "tp4",
    "dp4 distributed optimizer",
}


def _params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names]


def train(
    world_size: int,
    strategy: dict[str, Any],
    model: dict[str, Any] | None = None,
    load: str | None = None,
    save: str | None = None,
    precision: str = "32-true",
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of five steps at a layout; with `save`, of one step that ends in a checkpoint."""
    record = Record()
    module = lm.GPTModule(tiny_config(**(model or {})), lm.OptimizerConfig(lr=5e-3, lr_warmup_steps=2))
    plugin = lm.MegatronPrecision(precision, lm.LossScaling(initial=2.0**6))
    trainer = quiet_trainer(
        lm.MegatronStrategy(micro_batch_size=2, precision_plugin=plugin, **strategy),
        world_size,
        max_steps=1 if save else 6 if load else 5,
        callbacks=[record],
    )
    trainer.fit(module, SharedLoader(module), ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    return record.losses, record.norms


@pytest.fixture(scope="module")
def initial(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one step, written by one process."""
    path = tmp_path_factory.mktemp("layouts") / "initial.ckpt"
    ranks.run(train, 1, 1, {}, None, None, str(path))
    return path


@pytest.fixture(scope="module")
def reference(ranks: Any, initial: Path) -> tuple[list[float], list[float]]:
    """What one process gets."""
    losses, norms = ranks.run(train, 1, 1, {}, None, str(initial))[0]
    assert len(losses) == 5
    assert losses[0] - losses[-1] > 0.003, "the reference does not train"
    return losses, norms


@pytest.fixture(scope="module")
def seeded(ranks: Any) -> tuple[list[float], list[float]]:
    """What one process gets from the seed alone."""
    return ranks.run(train, 1, 1, {})[0]


@pytest.mark.parametrize("name", _params(LAYOUTS))
def test_layout_equals_one_process(name: str, ranks: Any, initial: Path, reference: Any) -> None:
    world_size, strategy = LAYOUTS[name]
    results = ranks.run(train, world_size, world_size, strategy, None, str(initial))
    for losses, norms in results:  # every rank sees the same numbers
        assert losses == pytest.approx(reference[0], abs=1e-5)
        assert norms == pytest.approx(reference[1], abs=1e-4)


@pytest.mark.parametrize("name", ["tp2", "pp2 interleaved", "tp2 pp2 sp distributed optimizer"])
def test_a_seed_gives_the_same_model_at_any_layout(name: str, ranks: Any, seeded: Any) -> None:
    world_size, strategy = LAYOUTS[name]
    losses, _ = ranks.run(train, world_size, world_size, strategy)[0]
    assert losses == pytest.approx(seeded[0], abs=1e-5)


LLAMA = {
    "normalization": "RMSNorm",
    "activation": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "num_query_groups": 2,
}


@pytest.mark.parametrize("name", ["tp2 sp", "pp2", "tp2 pp2 interleaved sp"])
def test_llama_style(name: str, ranks: Any) -> None:
    expected, _ = ranks.run(train, 1, 1, {}, LLAMA)[0]
    world_size, strategy = LAYOUTS[name]
    losses, _ = ranks.run(train, world_size, world_size, strategy, LLAMA)[0]
    assert losses == pytest.approx(expected, abs=1e-5)


RECOMPUTE = {
    "selective": {"recompute_granularity": "selective"},
    "full uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.mark.parametrize(
    "mode", ["selective", *(pytest.param(f"full {how}", marks=pytest.mark.slow) for how in ("uniform", "block"))]
)
def test_recompute_changes_nothing_even_with_dropout(mode: str, ranks: Any) -> None:
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    layout = {TP: 2, PP: 2, SP: True}
    expected = ranks.run(train, 4, 4, layout, dropout)[0]
    assert ranks.run(train, 4, 4, layout, {**dropout, **RECOMPUTE[mode]})[0] == expected
    assert expected[0] != ranks.run(train, 4, 4, layout)[0][0], "dropout did nothing"


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 2e-3), ("bf16-true", 2e-3), ("16-mixed", 1e-3)])
@pytest.mark.parametrize(
    "name", ["tp2 sp", "pp2 dp2 distributed optimizer", pytest.param("pp2 interleaved", marks=pytest.mark.slow)]
)
def test_half_precision_stays_near_fp32(name: str, precision: str, tolerance: float, ranks: Any, seeded: Any) -> None:
    world_size, strategy = LAYOUTS[name]
    losses, norms = ranks.run(train, world_size, world_size, strategy, None, None, None, precision)[0]
    assert losses == pytest.approx(seeded[0], abs=tolerance * losses[0])
    assert norms == pytest.approx(seeded[1], rel=2e-2)
    assert losses != seeded[0], "nothing was computed in half precision"


def test_padding_of_the_vocabulary_is_not_predicted(ranks: Any) -> None:
    """128 real tokens padded to 144 at TP=1 and to 192 at TP=2 have the same losses, from near 128 equal chances."""
    model = {"vocab_size": 128, "make_vocab_size_divisible_by": 48}
    assert [tiny_config(**model).padded_vocab_size(tp) for tp in (1, 2)] == [144, 192]
    one, _ = ranks.run(train, 1, 1, {}, model)[0]
    two, _ = ranks.run(train, 2, 2, {TP: 2}, model)[0]
    assert one == pytest.approx(two, abs=1e-5)
    assert one[0] == pytest.approx(math.log(128), abs=2e-2)  # log(144) is 0.12 larger
