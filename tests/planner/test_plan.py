"""The search: right answers on cases that can be enumerated, limits kept, failures explained, speed."""

import resource
import subprocess
import sys
from itertools import product

import pytest

from lightning_megatron.errors import LayoutError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner import (
    GIB,
    MODELS,
    Batch,
    Cluster,
    Constraints,
    Execution,
    Recompute,
    Runtime,
    estimate,
    plan,
)
from lightning_megatron.planner.plan import divisors


def test_no_enumerated_execution_beats_the_best() -> None:
    model, cluster = GPTConfig.gpt2("medium"), Cluster.of("a100_pcie", 8)
    batch = Batch(global_batch_size=64, seq_length=1024)
    best = plan(model, cluster, batch).best
    seconds = []
    for tp, pp, micro in product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if tp * pp > 8 or 64 * tp * pp // 8 % micro:
            continue
        layout = ParallelLayout(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=tp > 1
        )
        got = estimate(model, cluster, batch, Execution.of(layout, batch, 8, micro_batch_size=micro))
        if got.peak_memory <= cluster.accelerator.memory * 0.97:
            seconds.append(got.time.total)
    assert len(seconds) > 25
    assert best.time.total <= min(seconds) * 1.001


@pytest.mark.parametrize(
    ("name", "gpu", "gpus", "batch", "seq"),
    [
        ("gpt2_large", "h100", 64, 512, 1024),
        ("llama_70b", "h100", 512, 1024, 4096),
        ("gpt3_175b", "a100", 1024, 1536, 2048),
        ("llama_13b", "a100_40gb", 64, 256, 4096),
        ("llama3_8b", "l40s", 16, 64, 8192),
    ],
)
def test_every_estimate_fits_and_divides(name: str, gpu: str, gpus: int, batch: int, seq: int) -> None:
    model, cluster = MODELS[name], Cluster.of(gpu, gpus)
    result = plan(model, cluster, Batch(global_batch_size=batch, seq_length=seq))
    times = [candidate.time.total for candidate in result.estimates]
    assert times == sorted(times)
    for candidate in result.estimates:
        execution, layout = candidate.execution, candidate.layout
        assert candidate.peak_memory <= cluster.accelerator.memory * 0.97
        assert layout.check_global_batch(batch, execution.micro_batch_size, gpus) == execution.num_microbatches
        layout.check_sequence(seq)
        layout.check_model(num_layers=model.num_layers, num_attention_heads=model.num_attention_heads)
        assert len(candidate.memory) == layout.pipeline_model_parallel_size
        assert 0 < candidate.mfu <= candidate.hfu < 1
        assert candidate.assumptions
    assert result.assumptions


def test_small_models_are_data_parallel_and_large_ones_are_not() -> None:
    small = plan(MODELS["gpt2_large"], Cluster.of("h100", 64), Batch(global_batch_size=512, seq_length=1024)).best
    assert (str(small.layout), small.execution.data_parallel_size) == ("tp1", 64)
    large = plan(MODELS["llama_70b"], Cluster.of("h100", 512), Batch(global_batch_size=1024, seq_length=4096)).best
    assert large.layout.model_parallel_size >= 16
    assert large.layout.tensor_model_parallel_size <= 8


def test_llama3_405b_gets_the_layout_it_was_trained_with() -> None:
    """TP 8 x PP 16 (arXiv:2407.21783, table 4); 126 layers only come out even with embedding and loss counted."""
    best = plan(MODELS["llama3_405b"], Cluster.of("h100", 16384), Batch(global_batch_size=2048, seq_length=8192)).best
    assert best.layout.tensor_model_parallel_size == 8
    assert best.layout.pipeline_model_parallel_size == 16
    assert best.layout.pipeline_model_parallel_layout is not None


def test_constraints_are_kept() -> None:
    model, cluster, batch = MODELS["gpt2_large"], Cluster.of("h100", 16), Batch(global_batch_size=64, seq_length=1024)
    uniform = Recompute(granularity="full", method="uniform", num_layers=1)
    constraints = Constraints(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=3,
        sequence_parallel=False,
        micro_batch_size=2,
        use_distributed_optimizer=False,
        recompute=uniform,
    )
    result = plan(model, cluster, batch, constraints=constraints)
    execution = result.best.execution
    assert len(result.estimates) == 1
    assert str(execution.layout) == "tp2_pp4_vpp3"
    assert (execution.micro_batch_size, execution.num_microbatches) == (2, 16)
    assert not execution.use_distributed_optimizer
    assert execution.recompute == uniform
    whole = plan(model, cluster, batch, constraints=Constraints.of_layout(ParallelLayout.parse("tp4_pp2_sp")))
    assert {str(candidate.layout) for candidate in whole.estimates} == {"tp4_pp2_sp"}


def test_recompute_is_the_least_that_fits() -> None:
    model, batch = MODELS["gpt2_xl"], Batch(global_batch_size=24, seq_length=1024)
    constraints = Constraints(micro_batch_size=24)
    cluster = Cluster.of("h100", 1)
    best = plan(model, cluster, batch, constraints=constraints).best
    recompute = best.execution.recompute
    assert recompute.method == "block"
    assert recompute.num_layers is not None
    fewer = Recompute(granularity="full", method="block", num_layers=recompute.num_layers - 1)
    execution = Execution.of(best.layout, batch, 1, micro_batch_size=24, recompute=fewer)
    assert estimate(model, cluster, batch, execution).peak_memory > cluster.accelerator.memory * 0.97
    # Where the scores are stored, dropping them alone comes first.
    eight = Constraints(micro_batch_size=8)
    unfused = plan(model, cluster, batch, constraints=eight, runtime=Runtime(attention="fused_softmax")).best
    assert unfused.execution.recompute.granularity == "selective"


def test_failures_say_what_would_help() -> None:
    model = MODELS["llama_70b"]
    with pytest.raises(LayoutError, match=r"the smallest of \d+ executions, tp8_sp.*gpus=32 would be enough"):
        plan(model, Cluster.of("h100", 8), Batch(global_batch_size=64, seq_length=4096))
    with pytest.raises(LayoutError, match=r"global_batch_size=2048 does not divide.*: 1875, 2500\."):
        plan(MODELS["llama_7b"], Cluster.of("h100", 10000), Batch(global_batch_size=2048, seq_length=4096))
    with pytest.raises(LayoutError, match=r"No layout with tensor_model_parallel_size=3 divides gpus=8"):
        plan(
            model,
            Cluster.of("h100", 8),
            Batch(global_batch_size=64, seq_length=4096),
            constraints=Constraints(tensor_model_parallel_size=3),
        )
    with pytest.raises(ValueError, match=r"gpu=h1000 is not known\. Did you mean h100"):
        Cluster.of("h1000", 8)
    with pytest.raises(ValueError, match=r"gpus=12 do not fill .* gpus=8 or gpus=16"):
        Cluster.of("h100", 12)
    with pytest.raises(LayoutError, match="expert_model_parallel_size=2"):
        Constraints.of_layout(ParallelLayout(expert_model_parallel_size=2))


def test_more_memory_or_a_faster_network_is_never_slower() -> None:
    model, batch = MODELS["llama_13b"], Batch(global_batch_size=256, seq_length=4096)

    def seconds(**changes: object) -> float:
        gib = changes.pop("gib", 79.1)
        cluster = Cluster.of("h100", 64, **changes).with_memory(gib)  # type: ignore[arg-type]
        return plan(model, cluster, batch).best.time.total

    base = seconds()
    assert seconds(gib=40.0) >= base * 0.999
    assert seconds(inter_node="ethernet_10g") > base
    assert seconds(intra_node="pcie4") >= base


def test_ten_thousand_gpus_in_under_two_seconds_interpreter_included() -> None:
    code = (
        "from lightning_megatron import planner as p\n"
        "r = p.plan(p.model_preset('llama_70b'), p.Cluster.of('h100', 10240), "
        "p.Batch(global_batch_size=10240, seq_length=4096))\n"
        "print(r.num_considered)"
    )
    # Processor time, which is the wall clock's where nothing else runs, and does not depend on what else does.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert int(done.stdout) > 200


def test_planning_imports_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "import lightning_megatron.layout, lightning_megatron.planner.request, lightning_megatron.planner.plots\n"
        "from lightning_megatron.cli import plan\n"
        "heavy = {'torch', 'lightning', 'megatron', 'numpy', 'matplotlib', 'transformers', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert [d for d in range(1, 10241) if 10240 % d == 0] == divisors(10240)


def test_memory_is_what_decides_what_fits() -> None:
    """On the edge: a little less memory than the best needs, and another execution is chosen."""
    model, batch = MODELS["gpt2_large"], Batch(global_batch_size=32, seq_length=1024)
    best = plan(model, Cluster.of("h100", 1), batch).best
    smaller = Cluster.of("h100", 1).with_memory((best.peak_memory / 0.97 - 1) / GIB)
    other = plan(model, smaller, batch).best
    assert other.execution != best.execution
    assert other.peak_memory < best.peak_memory
