"""`MegatronStrategy("auto")`: the planner's layout, in one line, on any machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lightning_megatron as lm
from lightning_megatron.auto import Devices, Work, choose
from lightning_megatron.planner import GIB, Constraints
from tests.helpers import SEQUENCE, VOCAB, SharedLoader, plain_loader, quiet_trainer, tiny_config

LLAMA = lm.GPTConfig.llama(
    num_layers=40, hidden_size=5120, num_attention_heads=40, ffn_hidden_size=13824, vocab_size=32000,
    max_position_embeddings=4096,
)  # fmt: skip
H100 = Devices(name="NVIDIA H100 80GB HBM3", memory=79.1 * GIB, count=8, per_node=8)
CPU = Devices(name="cpu", memory=4 * GIB, count=4, per_node=4)


def work(model: Any, **changes: Any) -> Work:
    settings = {"precision": "bf16-mixed", "global_batch_size": 128, "seq_length": model.max_position_embeddings}
    return Work(model=model, **{**settings, **changes})


# ----------------------------------------------------------------------------------------------------------- choosing


def test_a_model_that_fits_is_data_parallel() -> None:
    choice = choose(work(lm.GPTConfig.gpt2("small")), H100, Constraints())
    assert choice.layout == lm.ParallelLayout()
    assert choice.use_distributed_optimizer
    assert "all of which fit" in choice.reason
    assert "8 x h100" in choice.reason
    assert "\n" not in choice.reason


def test_a_model_that_does_not_fit_is_split_and_the_reason_says_so() -> None:
    choice = choose(work(LLAMA, context_parallel=True), H100, Constraints())
    assert choice.layout.model_parallel_size > 1
    assert "data parallelism alone needs" in choice.reason
    assert "of which do not fit" in choice.reason
    assert "MFU" in choice.reason


def test_more_memory_means_less_splitting() -> None:
    h200 = Devices(name="NVIDIA H200", memory=139.8 * GIB, count=8, per_node=8)
    small, large = (choose(work(LLAMA), devices, Constraints()).layout for devices in (H100, h200))
    assert large.model_parallel_size <= small.model_parallel_size


def test_given_sizes_are_kept() -> None:
    constraints = Constraints(tensor_model_parallel_size=4, micro_batch_size=1)
    choice = choose(work(lm.GPTConfig.gpt2("small")), H100, constraints)
    assert choice.layout.tensor_model_parallel_size == 4
    assert choice.micro_batch_size == 1


def test_recomputation_is_the_models_and_an_error_says_what_it_would_help() -> None:
    one = Devices(name="NVIDIA A100-SXM4-40GB", memory=39.4 * GIB, count=1, per_node=1)
    model = lm.GPTConfig.gpt2("xl", max_position_embeddings=8192, vocab_size=256)
    with pytest.raises(lm.LayoutError, match="recompute_granularity='full'"):
        choose(work(model, global_batch_size=1), one, Constraints())
    recomputing = model.replace(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    choose(work(recomputing, global_batch_size=1), one, Constraints())


def test_what_fits_nowhere_is_an_error_with_a_remedy() -> None:
    one = Devices(name="Tesla T4", memory=14.6 * GIB, count=1, per_node=1)
    with pytest.raises(lm.LayoutError, match=r"Nothing.*fits.*would be enough"):
        choose(work(LLAMA, global_batch_size=8), one, Constraints())


def test_an_unknown_gpu_is_guessed_and_told() -> None:
    choice = choose(
        work(lm.GPTConfig.gpt2("small")), Devices(name="X1", memory=8 * GIB, count=2, per_node=2), Constraints()
    )
    assert "X1 is unknown" in choice.reason


def test_a_batch_that_is_not_known_is_assumed_and_told() -> None:
    choice = choose(work(tiny_config(), global_batch_size=None, seq_length=None), CPU, Constraints())
    assert choice.layout.num_chunks == 1
    assert "assumed" in choice.reason


@pytest.mark.parametrize(
    "model",
    [
        lm.BertConfig.megatron("345m"),
        lm.T5Config(),
        lm.GPTConfig.llama(num_layers=4, hidden_size=256, num_attention_heads=4, num_moe_experts=8),
    ],
)
def test_every_model_of_the_package(model: Any) -> None:
    choice = choose(work(model), H100, Constraints())
    assert choice.layout == lm.ParallelLayout()
    assert choice.micro_batch_size == 16  # 128 samples over 8 replicas


def test_stages_are_uneven_for_decoders_alone() -> None:
    """26 layers over 4 stages, with embedding and loss as a layer each: 6, 7, 7, 6."""
    four = Constraints(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=1)
    assert choose(work(lm.GPTConfig.gpt2("medium", num_layers=26)), H100, four).layout.pipeline_model_parallel_layout
    with pytest.raises(lm.LayoutError, match="No layout gives each pipeline stage the same number of the 26 layers"):
        choose(work(lm.BertConfig.megatron("345m", num_layers=26)), H100, four)


def test_on_a_cpu_nothing_overlaps_and_no_mfu_is_claimed() -> None:
    choice = choose(work(tiny_config(), precision="32-true", global_batch_size=8), CPU, Constraints())
    assert not choice.overlap_grad_reduce
    assert not choice.overlap_param_gather
    assert "MFU" not in choice.reason


# ----------------------------------------------------------------------------------------------------------- strategy


def test_a_layout_by_its_short_form() -> None:
    assert str(lm.MegatronStrategy("tp2_pp2_sp").layout) == "tp2_pp2_sp"
    assert (
        lm.MegatronStrategy(lm.ParallelLayout(pipeline_model_parallel_size=4)).layout.pipeline_model_parallel_size == 4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "atuo"}, "'atuo' is none of tpN"),
        ({"layout": "tp2", "pipeline_model_parallel_size": 2}, "already says every size"),
        ({"layout": "auto", "num_layers_in_first_pipeline_stage": 1, "pipeline_model_parallel_size": 2}, "Leave"),
    ],
)
def test_layouts_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(lm.LayoutError, match=message):
        lm.MegatronStrategy(**arguments)


@contextmanager
def said() -> Iterator[list[str]]:
    """What the strategy logs of its choice."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: record.getMessage().startswith("MegatronStrategy('auto')"))
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def fit_auto(strategy: Any, devices: int = 4, memory: float | None = None) -> dict[str, Any]:
    from lightning_megatron.backends import core

    original = core.device_name_and_memory
    if memory is not None:
        core.device_name_and_memory = lambda device: ("cpu", memory)
    try:
        module = lm.GPTModule(tiny_config())
        trainer = quiet_trainer(strategy() if callable(strategy) else strategy, devices, max_steps=2)
        with said() as lines:
            trainer.fit(module, SharedLoader(module))
            loss = float(trainer.callback_metrics["train_loss"])
            trainer.validate(module, SharedLoader(module))  # keeps what was decided
    finally:
        core.device_name_and_memory = original
    return {"layout": str(trainer.strategy.layout), "said": lines, "loss": loss, "step": trainer.global_step}


def auto() -> lm.MegatronStrategy:
    return lm.MegatronStrategy("auto")


def auto_tp2() -> lm.MegatronStrategy:
    return lm.MegatronStrategy("auto", tensor_model_parallel_size=2)


def test_training_in_a_chosen_layout(ranks: Any) -> None:
    named = ranks.run(fit_auto, 4, "megatron_auto")
    assert {(r["layout"], r["step"]) for r in named} == {("tp1", 2)}
    assert [len(r["said"]) for r in named] == [1, 0, 0, 0]
    kept = ranks.run(fit_auto, 4, auto_tp2)
    assert {r["layout"] for r in kept} == {"tp2_sp"}
    assert kept[0]["loss"] == pytest.approx(named[0]["loss"], abs=1e-5)


def fit_data(prefix: str) -> str:
    module = lm.GPTModule(tiny_config())
    trainer = quiet_trainer(lm.MegatronStrategy("auto"), 2, max_steps=1, limit_val_batches=0)
    data = lm.data.PretrainingData(prefix, seq_length=SEQUENCE, global_batch_size=4, split="1,0,0", num_workers=0)
    with said() as lines:
        trainer.fit(module, data)
    return "".join(lines)


def test_the_batch_is_the_data_modules(ranks: Any, tmp_path: Path) -> None:
    with lm.data.IndexedDatasetWriter(tmp_path / "corpus") as writer:
        writer.add_document([index % VOCAB for index in range(500)])
    first, _ = ranks.run(fit_data, 2, str(tmp_path / "corpus"))
    assert f"Batch: 4 x {SEQUENCE} tokens." in first


def too_small() -> str:
    try:
        fit_auto(auto, devices=2, memory=1e6)
    except lm.LayoutError as error:
        return str(error)
    return ""


def test_every_rank_hears_that_nothing_fits(ranks: Any) -> None:
    for message in ranks.run(too_small, 2):
        assert message.startswith("MegatronStrategy('auto'): Nothing")


class WithoutConfiguration(lm.GPTModule):
    """As a module of a user's may be."""

    def __init__(self) -> None:
        super().__init__(tiny_config())
        self.config = None  # type: ignore[assignment]


def without_configuration() -> str:
    try:
        quiet_trainer(lm.MegatronStrategy("auto"), 1, max_steps=1).fit(WithoutConfiguration(), plain_loader(2))
    except lm.LayoutError as error:
        return str(error)
    return ""


def test_a_module_without_a_configuration_is_told_to_give_sizes(ranks: Any) -> None:
    (message,) = ranks.run(without_configuration, 1)
    assert "has no `config` of a known kind" in message
