"""Callbacks that measure: the numbers are the model's, at any layout, and every logger and progress bar gets them."""

from __future__ import annotations

import csv
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lightning_megatron as lm
from lightning_megatron.callbacks.throughput import peak_flops, sizes
from lightning_megatron.planner import model_flops_per_token, model_parameters
from lightning_megatron.planner.step_flops import batch_flops
from tests.helpers import SEQUENCE, SharedLoader, quiet_trainer, tiny_config

TP2_PP2 = "tp2_pp2_sp"
TIMES = ("data_time", "schedule_time", "optimizer_time")


def everything() -> list[Any]:
    callbacks = lm.callbacks
    return [
        callbacks.Throughput(peak_flops=1e12),
        callbacks.MemoryByRank(),
        callbacks.Norms(),
        callbacks.ExpertBalance(),
        callbacks.ParametersByRank(),
    ]


def measure(layout: str, distributed: bool = False, experts: int | None = None, ep: int = 1) -> dict[str, Any]:
    config = tiny_config() if experts is None else moe(experts)
    module = lm.GPTModule(config, lm.OptimizerConfig(lr=1e-2, lr_decay_style="constant"))
    sizes = lm.ParallelLayout.parse(layout).as_dict() | {"expert_model_parallel_size": ep}
    strategy = lm.MegatronStrategy(**sizes, micro_batch_size=2, use_distributed_optimizer=distributed, seed=3)  # type: ignore[arg-type]
    callbacks = everything()
    devices = 4 if layout != "tp1" or ep > 1 or distributed else 1
    trainer = quiet_trainer(strategy, devices, max_steps=2, log_every_n_steps=1, callbacks=callbacks)
    trainer.fit(module, SharedLoader(module))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    parameters = callbacks[-1]
    return {"metrics": found, "lines": parameters.lines, "total": parameters.total, "memory": callbacks[1].by_rank}


def moe(experts: int) -> lm.GPTConfig:
    return lm.GPTConfig.llama(
        num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=128, make_vocab_size_divisible_by=32,
        max_position_embeddings=SEQUENCE, num_moe_experts=experts, moe_ffn_hidden_size=32, moe_aux_loss_coeff=0.0,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- any layout


@pytest.fixture(scope="module")
def alone(ranks: Any) -> dict[str, Any]:
    (result,) = ranks.run(measure, 1, "tp1")
    return result


def test_numbers_of_one_process(alone: dict[str, Any]) -> None:
    metrics = alone["metrics"]
    assert alone["total"] == model_parameters(tiny_config())
    assert alone["lines"] == [
        f" > number of parameters on (tensor, pipeline) model parallel rank (0, 0): {alone['total']}"
    ]
    parts = [value for name, value in metrics.items() if name.startswith("param_norms/")]
    assert math.sqrt(sum(part**2 for part in parts)) == pytest.approx(metrics["param_norm"], rel=1e-6)
    assert sum(metrics[name] for name in TIMES) == pytest.approx(metrics["step_time"], rel=1e-6)
    flops = model_flops_per_token(tiny_config(), SEQUENCE) * metrics["tokens_per_s"]
    assert metrics["tflops_per_device"] == pytest.approx(flops / 1e12, rel=1e-5)
    assert metrics["mfu"] == pytest.approx(flops / 1e12, rel=1e-5)
    assert metrics["memory/rank_0"] == metrics["memory/max"] == pytest.approx(alone["memory"][0], rel=1e-6)
    assert not any(name.startswith("experts/") for name in metrics)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "distributed"),
    [
        (TP2_PP2, False),
        ("pp2", True),
        pytest.param("tp1", True, marks=SLOW),
        pytest.param("cp2", True, marks=SLOW),
    ],
)
def test_numbers_do_not_depend_on_the_layout(ranks: Any, alone: dict[str, Any], layout: str, distributed: bool) -> None:
    results = ranks.run(measure, 4, layout, distributed)
    for result in results:
        metrics = result["metrics"]
        for name, value in alone["metrics"].items():
            if name.startswith("param_norm") or name in ("grad_norm", "train_loss"):
                assert metrics[name] == pytest.approx(value, rel=1e-4), name
        assert result["total"] == alone["total"]
        assert len(result["memory"]) == 4
        assert metrics["memory/rank_3"] == results[0]["metrics"]["memory/rank_3"]
    places = [line.partition(" rank ")[2].partition(":")[0] for line in results[0]["lines"]]
    if layout == TP2_PP2:  # as Megatron-LM and the guide of Accelerate print them
        assert places == ["(0, 0)", "(1, 0)", "(0, 1)", "(1, 1)"]
    mine = results[0]["metrics"]
    flops = model_flops_per_token(tiny_config(), SEQUENCE) * mine["tokens_per_s"] / 4
    assert mine["tflops_per_device"] == pytest.approx(flops / 1e12, rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "ep"), [("pp2", 2), pytest.param("tp2_pp2_sp", 1, marks=SLOW), pytest.param("tp1", 4, marks=SLOW)]
)
def test_balance_of_experts_at_any_layout(ranks: Any, layout: str, ep: int) -> None:
    (one,) = ranks.run(measure, 1, "tp1", False, 4)
    metrics = one["metrics"]
    assert 1 <= metrics["experts/max"] <= 4
    assert 0 <= metrics["experts/min"] <= 1
    assert 0 < metrics["experts/entropy"] <= 1
    for result in ranks.run(measure, 4, layout, False, 4, ep):
        for name in ("experts/max", "experts/min", "experts/entropy", "param_norm", "param_norms/mlp"):
            assert result["metrics"][name] == pytest.approx(metrics[name], rel=2e-3), name
        assert result["total"] == one["total"]


# ------------------------------------------------------------------------------------------------------------- timing


class Slow:
    """A loader that takes its time."""

    def __init__(self, loader: Any, seconds: float) -> None:
        self.loader, self.seconds = loader, seconds

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for batch in self.loader:
            time.sleep(self.seconds)
            yield batch


class SlowValidation(lm.callbacks.SampleText):
    """Sleeps where nothing is to be counted."""

    def __init__(self, seconds: float) -> None:
        super().__init__([])
        self.seconds = seconds

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        time.sleep(self.seconds)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        time.sleep(self.seconds)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        pass


def timed(slow_data: float, slow_between: float, directory: str, accumulate: int = 1) -> dict[str, float]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = lm.GPTModule(tiny_config())
    trainer = quiet_trainer(
        lm.MegatronStrategy(),
        1,
        max_steps=6,
        val_check_interval=2,
        limit_val_batches=1,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=True,
        callbacks=[
            lm.callbacks.Throughput(),
            SlowValidation(slow_between),
            ModelCheckpoint(directory, every_n_train_steps=2),
        ],
    )
    trainer.fit(module, Slow(SharedLoader(module, length=96), slow_data), SharedLoader(module))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_waiting_for_data_is_seen_and_validation_and_checkpoints_are_not(ranks: Any, tmp_path: Path) -> None:
    (slow,) = ranks.run(timed, 1, 0.1, 0.0, str(tmp_path / "1"))
    # Two of six batches follow a validation, whose gap is not counted, nor is the first one's.
    assert slow["data_time"] > 0.03
    (between,) = ranks.run(timed, 1, 0.0, 0.3, str(tmp_path / "2"))
    assert between["data_time"] < 0.15  # counted, six sleeps over six batches would be 0.3


def test_batches_that_only_accumulate_have_no_optimizer_time(ranks: Any, tmp_path: Path) -> None:
    (metrics,) = ranks.run(timed, 1, 0.0, 0.0, str(tmp_path), 2)
    assert metrics["optimizer_time"] < metrics["schedule_time"]
    assert sum(metrics[name] for name in TIMES) == pytest.approx(metrics["step_time"], rel=1e-6)


# ---------------------------------------------------------------------------------------------- loggers, progress bars


def logged(directory: str, bar: str) -> list[str]:
    module = lm.GPTModule(tiny_config())
    progress = {"rich": RichProgressBar, "tqdm": TQDMProgressBar}[bar]()
    trainer = quiet_trainer(
        lm.MegatronStrategy(TP2_PP2),
        4,
        max_steps=4,
        log_every_n_steps=2,
        enable_progress_bar=True,
        logger=[CSVLogger(directory, name="csv"), TensorBoardLogger(directory, name="tb")],
        callbacks=[progress, *everything()],
    )
    trainer.fit(module, SharedLoader(module))
    return sorted(progress.get_metrics(trainer, module))


@pytest.mark.parametrize("bar", ["rich", pytest.param("tqdm", marks=SLOW)])
def test_loggers_and_progress_bars(ranks: Any, tmp_path: Path, bar: str) -> None:
    shown = ranks.run(logged, 4, str(tmp_path), bar)
    assert {"loss", "tokens_per_s", "mfu"} <= set(shown[0])
    with (tmp_path / "csv/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3]
    expected = {"tokens_per_s", "mfu", "memory/rank_3", "param_norm", "param_norms/attention", "grad_norm", *TIMES}
    assert all(row[name] for row in rows for name in expected)
    assert not any(name.startswith(f"{other}/") for name in rows[0] for other in rows[0])  # files of MLflow's store
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["version_0"]  # one rank logs
    assert len(list((tmp_path / "tb").rglob("events.out.tfevents.*"))) == 1


def tracked(kind: str, directory: str) -> dict[str, float] | None:
    """What a logger that is not of this package's dependencies holds at the end, on the rank that logs."""
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    os.environ |= {"WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    logger: Any = (
        WandbLogger(save_dir=directory, offline=True)
        if kind == "wandb"
        else MLFlowLogger(tracking_uri=f"file:{directory}")
    )
    module = lm.GPTModule(tiny_config())
    trainer = quiet_trainer(
        lm.MegatronStrategy("tp2"), 2, max_steps=4, log_every_n_steps=2, logger=logger, callbacks=everything()
    )
    trainer.fit(module, SharedLoader(module))
    expected = {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "grad_norm", "param_norm")}
    if not trainer.is_global_zero:
        return None
    if kind == "wandb":
        found = dict(logger.experiment.summary)
        logger.experiment.finish()
    else:
        found = logger.experiment.get_run(logger.run_id).data.metrics
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_loggers_of_others(ranks: Any, tmp_path: Path, kind: str) -> None:
    """One of two tensor-parallel ranks logs; the other leaves no run behind."""
    pytest.importorskip(kind)
    found, nothing = ranks.run(tracked, 2, kind, str(tmp_path))
    assert nothing is None
    assert {"train_loss", "tokens_per_s", "mfu", "memory/rank_1", "param_norms/attention", *TIMES} <= set(found)
    runs = list((tmp_path / "wandb").glob("offline-run-*")) if kind == "wandb" else list(tmp_path.glob("*/*/metrics"))
    assert len(runs) == 1


def test_intervals_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        lm.callbacks.Norms(every_n_steps=0)


# -------------------------------------------------------------------------------------------------------------- sizes


def test_tokens_of_every_kind_of_batch() -> None:
    tokens = torch.zeros(2, 8, dtype=torch.long)
    mask = torch.zeros(2, 1, 8, 8)
    assert sizes({"tokens": tokens, "attention_mask": mask}) == (2, (8,))
    assert sizes({"encoder_tokens": tokens, "decoder_tokens": tokens[:, :4]}) == (2, (8, 4))
    assert sizes({"mine": tokens}) == (2, (8,))
    assert sizes({"image": torch.zeros(2, 3, 8, 8)}) == (0, ())
    assert sizes([1]) == (0, ())


def test_flops_of_every_model() -> None:
    gpt = lm.GPTConfig.gpt2("small")
    assert batch_flops(gpt, 2, 1024) == 2 * 1024 * model_flops_per_token(gpt, 1024)
    experts = moe(8)
    dense = experts.replace(num_moe_experts=None, ffn_hidden_size=2 * 32)
    assert batch_flops(experts, 1, 16) == batch_flops(dense, 1, 16)
    bert = lm.BertConfig.megatron("345m")
    assert batch_flops(bert, 1, 512) == pytest.approx(6 * 0.335e9 * 512, rel=0.2)  # 6 N a token, and attention
    t5 = lm.T5Config.v1_1(num_layers=12, hidden_size=768, num_attention_heads=12, ffn_hidden_size=2048)
    per_layer = 3 * 2 * (4 * 768 * 768 + 3 * 768 * 2048)
    enough = 12 * 512 * per_layer + 12 * 128 * per_layer
    assert enough < batch_flops(t5, 1, 512, 128) < 2 * enough


def test_peaks_that_are_not_known() -> None:
    assert peak_flops(torch.device("cpu"), "32-true") is None
