"""Predicted times against published and measured ones, and communication against its formulas."""

import pytest

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner import (
    MODELS,
    Batch,
    Cluster,
    Estimate,
    Execution,
    Recompute,
    Runtime,
    estimate,
    stage_parameters,
)
from lightning_megatron.planner.communication import all_reduce, gather
from lightning_megatron.planner.cost import Roofline, layer_seconds

SELECTIVE = Recompute(granularity="selective")
FULL = Recompute(granularity="full", method="uniform", num_layers=1)
# The papers' runs: fused softmax kernels, host far ahead of layers that take milliseconds.
PAPER = Runtime(attention="fused_softmax", host_seconds_per_layer=0, host_seconds_optimizer_per_layer=0)
CORE = Runtime(layers="megatron_core")


@pytest.mark.parametrize(
    ("name", "gpus", "batch", "micro", "layout", "full_seconds", "seconds"),
    [  # arXiv:2205.05198, tables 3 and 5: full recomputation without, selective with sequence parallelism
        ("megatron_22b", 8, 4, 4, "tp8_sp", 1.42, 1.10),
        ("gpt3_175b", 64, 64, 1, "tp8_pp8_vpp3_sp", 18.13, 13.75),
        ("megatron_530b", 280, 280, 1, "tp8_pp35_vpp3_sp", 49.05, 37.83),
        ("megatron_1t", 512, 512, 1, "tp8_pp64_sp", 94.42, 71.49),
    ],
)
def test_iteration_times_of_table_5(
    name: str, gpus: int, batch: int, micro: int, layout: str, full_seconds: float, seconds: float
) -> None:
    workload, cluster = Batch(global_batch_size=batch, seq_length=2048), Cluster.of("a100", gpus)

    def predict(text: str, recompute: Recompute) -> Estimate:
        execution = Execution.of(
            ParallelLayout.parse(text), workload, gpus, micro_batch_size=micro, recompute=recompute
        )
        return estimate(MODELS[name], cluster, workload, execution, PAPER)

    assert predict(layout, SELECTIVE).time.total == pytest.approx(seconds, rel=0.07)
    assert predict(layout.removesuffix("_sp"), FULL).time.total == pytest.approx(full_seconds, rel=0.07)


def single_h100(batch: int, runtime: Runtime) -> Estimate:
    model = GPTConfig.gpt2("large", hidden_dropout=0.0, attention_dropout=0.0)
    workload = Batch(global_batch_size=batch, seq_length=1024)
    execution = Execution.of(ParallelLayout(), workload, 1, micro_batch_size=batch)
    return estimate(model, Cluster.of("h100", 1), workload, execution, runtime)


@pytest.mark.parametrize(
    ("batch", "attention", "milliseconds", "tolerance"),
    [  # GPT-2 large in megatron-core's layers on one H100; the first two with foreach and fused optimizer kernels
        (24, "flash", 319.0, 0.05),
        (8, "flash", 159.6, 0.02),  # host_seconds_per_layer comes from this one, so it is no test of the kernels
        (8, "torch_softmax", 359.3, 0.12),
    ],
)
def test_step_times_measured_on_an_h100(batch: int, attention: str, milliseconds: float, tolerance: float) -> None:
    runtime = Runtime(layers="megatron_core", attention=attention, grad_reduce_in_fp32=False)  # type: ignore[arg-type]
    assert 1e3 * single_h100(batch, runtime).time.total == pytest.approx(milliseconds, rel=tolerance)


def test_small_batches_are_host_bound_and_say_so() -> None:
    eager = Runtime(layers="megatron_core")
    assert single_h100(8, eager).host_bound
    assert not single_h100(24, eager).host_bound
    assert not single_h100(8, Runtime(layers="megatron_core", host_seconds_per_layer=0)).host_bound
    assert not single_h100(8, Runtime()).host_bound  # CUDA graphs


def test_one_layer_of_the_22b_model() -> None:
    """arXiv:2205.05198, table 4: 19.6 ms for forward and backward with tensor, 19.0 with sequence parallelism."""
    batch, cluster = Batch(global_batch_size=4, seq_length=2048), Cluster.of("a100", 8)
    hidden = 4 * 2048 * 6144 * 2
    talk = 4 * all_reduce(cluster, hidden, size=8).seconds
    for text, milliseconds in (("tp8", 19.6), ("tp8_sp", 19.0)):
        layer = layer_seconds(
            MODELS["megatron_22b"],
            ParallelLayout.parse(text),
            cluster.accelerator,
            batch,
            micro_batch_size=4,
            runtime=PAPER,
        )
        assert 1e3 * (layer.forward + layer.backward + talk) == pytest.approx(milliseconds, rel=0.06)


def test_matmul_measured_on_an_h100() -> None:
    roof = Roofline(Cluster.of("h100", 1).accelerator, Batch(global_batch_size=1, seq_length=1), CORE)
    assert 2 * 8192**3 / roof.matmul(8192, 8192, 8192) == pytest.approx(798e12, rel=0.01)


def test_ring_volumes_and_the_links_they_take() -> None:
    cluster = Cluster.of("h100", 64)
    reduce = all_reduce(cluster, 8e9, size=8)
    assert reduce.bytes == 2 * 8e9 * 7 / 8
    assert reduce.seconds == pytest.approx(reduce.bytes / 360e9, rel=0.01)
    # Two ranks reach less of it.
    pair = all_reduce(cluster, 8e9, size=2)
    assert pair.bytes == 8e9
    assert pair.seconds == pytest.approx(8e9 / 130.5e9, rel=0.01)
    # One rank of every node: each of the eight rings has a network card of its own.
    between = gather(cluster, 8e9, size=8, stride=8)
    assert between.bytes == 7e9
    assert between.seconds == pytest.approx(7e9 / 42.5e9, rel=0.01)
    # All ranks in one ring: it enters and leaves a node over all eight cards.
    assert gather(cluster, 8e9, size=64).seconds == pytest.approx(8e9 * 63 / 64 / (8 * 42.5e9), rel=0.01)
    assert all_reduce(cluster, 8e9, size=1).seconds == 0


def test_bytes_sent_per_step() -> None:
    model, gpus = MODELS["gpt3_175b"], 128
    batch, cluster = Batch(global_batch_size=128, seq_length=2048), Cluster.of("a100", gpus)
    execution = Execution.of(ParallelLayout.parse("tp8_pp8_sp"), batch, gpus, micro_batch_size=1)
    got = estimate(model, cluster, batch, execution).traffic
    hidden = 2048 * 12288 * 2
    m, layers = 64, 12
    # Two reduces and two gathers in either direction, and two more gathers in the backward, of 7/8 of the states each.
    assert got.tensor == pytest.approx(m * layers * 10 * hidden * 7 / 8)
    assert got.pipeline == pytest.approx(m * hidden / 8)
    parameters = stage_parameters(model, execution.layout, 0)
    embedding = 51200 / 8 * 12288 * 4
    assert got.data == pytest.approx(parameters * (4 + 2) / 2 + embedding)
    assert got.context == 0


def test_parts_of_a_step_add_up_and_the_bubble_is_the_papers() -> None:
    model = GPTConfig(num_layers=32, hidden_size=2048, num_attention_heads=16, vocab_size=1000)
    batch, cluster = Batch(global_batch_size=32, seq_length=1024), Cluster.of("h100", 4)
    execution = Execution.of(ParallelLayout.parse("pp4"), batch, 4, micro_batch_size=2)
    got = estimate(model, cluster, batch, execution)
    assert sum(got.time.parts().values()) == pytest.approx(got.time.total)
    # A small vocabulary leaves the stages nearly equal: (p-1)/m, and hops.
    assert got.bubble_fraction == pytest.approx(3 / 16, rel=0.05)
    assert got.tokens_per_second == pytest.approx(32 * 1024 / got.time.total)
    assert got.timeline().num_microbatches == 16


def test_what_it_hands_to_the_strategy() -> None:
    batch = Batch(global_batch_size=64, seq_length=1024)
    execution = Execution.of(ParallelLayout.parse("tp2_pp2_vpp2_sp"), batch, 8, micro_batch_size=4, recompute=FULL)
    got = estimate(GPTConfig.gpt2("medium"), Cluster.of("h100", 8), batch, execution)
    assert got.strategy_arguments() == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "micro_batch_size": 4,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    assert GPTConfig.gpt2("medium", **got.model_arguments()).recompute_method == "uniform"
    alone = estimate(
        GPTConfig.gpt2("medium"),
        Cluster.of("h100", 1),
        batch,
        Execution.of(ParallelLayout(), batch, 1, micro_batch_size=4),
    )
    assert not alone.strategy_arguments()["overlap_grad_reduce"]


def test_data_parallel_communication_shows_what_computation_does_not_hide() -> None:
    model, cluster = GPTConfig.gpt2("xl"), Cluster.of("a100", 64, inter_node="ethernet_10g")
    batch = Batch(global_batch_size=64, seq_length=1024)
    execution = Execution.of(ParallelLayout(), batch, 64, micro_batch_size=1)
    parameters = stage_parameters(model, ParallelLayout(), 0)
    reduce, gathered = (gather(cluster, parameters * size, size=64).seconds for size in (4, 2))

    def exposed(**runtime: bool) -> tuple[float, Estimate]:
        got = estimate(model, cluster, batch, execution, Runtime(layers="megatron_core", **runtime))
        return got.time.data_parallel, got

    alone, _ = exposed(overlap_grad_reduce=False, overlap_param_gather=False)
    assert alone == pytest.approx(reduce + gathered)
    # Both take longer than the backward and the forward beside which they go on.
    hidden, got = exposed()
    assert hidden < 0.9 * alone
    assert alone - hidden == pytest.approx(got.stages[0].backward[0] + got.stages[0].forward[0])
