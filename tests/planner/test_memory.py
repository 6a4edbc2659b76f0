"""Memory against the formulas of arXiv:2205.05198 and arXiv:1910.02054, and against a GPU."""

import pytest

from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner import GIB, MODELS, Batch, Recompute, Runtime, layer_activations, stage_memory
from lightning_megatron.planner.memory import StageMemory, chunk_activations, logits_bytes

GPT3 = MODELS["gpt3_175b"]
S, B, H, A = 2048, 1, 12288, 96
SBH = S * B * H
PAPER = Runtime(attention="fused_softmax")


def activations(**sizes: object):
    layout = ParallelLayout(**sizes)  # type: ignore[arg-type]
    return layer_activations(GPT3, layout, micro_batch_size=B, seq_length=S, attention="fused_softmax")


@pytest.mark.parametrize(
    ("sizes", "stored", "selective", "full"),
    [  # arXiv:2205.05198, table 2, and section 4.1 for t = 1
        ({}, 34 + 5 * A * S / H, 34, 2),
        ({"tensor_model_parallel_size": 8}, 10 + 24 / 8 + 5 * A * S / (H * 8), 10 + 24 / 8, 2),
        (
            {"tensor_model_parallel_size": 8, "sequence_parallel": True},
            (34 + 5 * A * S / H) / 8,
            34 / 8,
            2 / 8,
        ),
    ],
)
def test_activations_of_a_layer_are_those_of_table_2(
    sizes: dict[str, object], stored: float, selective: float, full: float
) -> None:
    layer = activations(**sizes)
    assert layer.stored == pytest.approx(SBH * stored, rel=1e-12)
    assert chunk_activations(layer, 1, Recompute(granularity="selective"))[0] == pytest.approx(SBH * selective)
    uniform = Recompute(granularity="full", method="uniform", num_layers=1)
    assert chunk_activations(layer, 1, uniform)[0] == pytest.approx(SBH * full)


@pytest.mark.parametrize(("name", "saved"), [("gpt3_175b", 0.70), ("megatron_530b", 0.65)])
def test_selective_recompute_saves_what_section_5_says(name: str, saved: float) -> None:
    layer = layer_activations(
        MODELS[name], ParallelLayout(), micro_batch_size=1, seq_length=2048, attention="fused_softmax"
    )
    assert round(layer.attention_core / layer.stored, 2) == saved


def test_full_recompute_keeps_inputs_and_one_working_set() -> None:
    layer = activations()
    kept, working = chunk_activations(layer, 12, Recompute(granularity="full", method="uniform", num_layers=4))
    assert (kept, working) == (3 * layer.input, 4 * layer.stored)
    kept, working = chunk_activations(layer, 12, Recompute(granularity="full", method="block", num_layers=5))
    assert kept == pytest.approx(5 * layer.input + 7 * layer.stored)
    assert working == layer.stored
    # More layers than a chunk has are all of them.
    assert (
        chunk_activations(layer, 3, Recompute(granularity="full", method="block", num_layers=9))[0] == 3 * layer.input
    )


def memory(model: GPTConfig, stage: int = 0, *, m: int = 64, dp: int = 1, **changes: object) -> StageMemory:
    layout = changes.pop("layout", ParallelLayout())
    batch = Batch(global_batch_size=m * dp, seq_length=2048, precision=changes.pop("precision", "bf16-mixed"))  # type: ignore[arg-type]
    return stage_memory(
        model,
        layout,  # type: ignore[arg-type]
        batch,
        stage=stage,
        micro_batch_size=1,
        num_microbatches=m,
        data_parallel_size=dp,
        **changes,  # type: ignore[arg-type]
    )


def test_first_stage_holds_the_whole_model_of_activations_whatever_the_pipeline() -> None:
    """Section 4.2.3: p micro-batches of L/p layers; interleaved, (1 + (p-1)/(p v)) of it; and s b h p dropout masks."""
    layer = activations(tensor_model_parallel_size=8, sequence_parallel=True)
    for pp, vpp, factor in [(8, None, 1.0), (16, None, 1.0), (8, 3, 1 + 7 / 24), (8, 4, 1 + 7 / 32)]:
        layout = ParallelLayout(
            tensor_model_parallel_size=8,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            sequence_parallel=True,
        )
        got = memory(GPT3, layout=layout, runtime=PAPER).activations
        layers = GPT3.num_layers * factor * layer.stored
        masks = got - layers
        assert masks == pytest.approx(SBH / 8 * pp * factor, rel=0.1)  # in whole micro-batches
    last = memory(GPT3, 7, layout=layout, runtime=PAPER)
    chunk = GPT3.num_layers / 32 * layer.stored
    assert last.activations == pytest.approx((3 * 8 + 1) * chunk + 4 * SBH / 8)


@pytest.mark.parametrize(
    ("changes", "per_parameter"),
    [  # megatron-core, docs/api-guide/dist_optimizer: 18, 6 + 12/d, 16, 8 + 8/d; 16-bit gradients save 2
        ({"use_distributed_optimizer": False}, 18),
        ({"dp": 64}, 6 + 12 / 64),
        ({"precision": "32-true", "use_distributed_optimizer": False}, 16),
        ({"precision": "32-true", "dp": 64}, 8 + 8 / 64),
        ({"runtime": Runtime(grad_reduce_in_fp32=False), "dp": 64}, 4 + 12 / 64),
        ({"precision": "bf16-true", "use_distributed_optimizer": False}, 8),
        ({"precision": "bf16-true", "dp": 64}, 4 + 12 / 64),
    ],
)
def test_bytes_per_parameter(changes: dict[str, object], per_parameter: float) -> None:
    got = memory(GPT3, **changes)
    assert got.static == pytest.approx(got.parameters * per_parameter)


def test_zero_stage_1_of_a_7_5b_model() -> None:
    """arXiv:1910.02054, figure 1: 120 GB without, 31.4 GB with optimizer states over 64 ranks; 2-byte gradients."""
    model = GPTConfig(
        num_layers=36, hidden_size=4096, num_attention_heads=32, vocab_size=51200, max_position_embeddings=2048
    )
    half = Runtime(grad_reduce_in_fp32=False)
    whole = memory(model, runtime=half, use_distributed_optimizer=False)
    sharded = memory(model, runtime=half, dp=64)
    assert whole.static / whole.parameters * 7.5 == pytest.approx(120)
    assert sharded.static / sharded.parameters * 7.5 == pytest.approx(31.4, abs=0.05)


@pytest.mark.parametrize(
    ("batch", "attention", "measured"),
    [  # GiB allocated on one H100 at the peak; GPT-2 large, 1024 tokens, megatron-core 0.19.2
        (8, "flash", 26.8),
        (24, "flash", 57.1),
        (8, "torch_softmax", 60.9),
    ],
)
def test_peak_memory_measured_on_an_h100(batch: int, attention: str, measured: float) -> None:
    model = GPTConfig.gpt2("large", hidden_dropout=0.0, attention_dropout=0.0)
    got = stage_memory(
        model,
        ParallelLayout(),
        Batch(global_batch_size=batch, seq_length=1024),
        stage=0,
        micro_batch_size=batch,
        num_microbatches=1,
        data_parallel_size=1,
        use_distributed_optimizer=False,
        runtime=Runtime(layers="megatron_core", attention=attention, grad_reduce_in_fp32=False),  # type: ignore[arg-type]
    )
    assert got.allocated / GIB == pytest.approx(measured, rel=0.03)


def test_parts_add_up_and_logits_are_on_the_last_stage() -> None:
    layout = ParallelLayout(tensor_model_parallel_size=8, pipeline_model_parallel_size=8, sequence_parallel=True)
    core = Runtime(layers="megatron_core")
    first, last = (memory(GPT3, stage, dp=2, layout=layout, runtime=core) for stage in (0, 7))
    for stage in (first, last):
        assert sum(stage.parts().values()) == pytest.approx(stage.total)
    assert first.logits == 0
    assert last.logits == 2048 * 51200 / 8 * 8
    assert last.logits == logits_bytes(GPT3, layout, Batch(global_batch_size=1, seq_length=2048), 1)
    # Context, three groups and those of tensor and pipeline parallelism, and the allocator's 5%.
    assert first.overhead == pytest.approx((0.85 + 5 * 0.4) * GIB + 0.05 * first.allocated)
    assert memory(GPT3).overhead == pytest.approx((0.85 + 3 * 0.4) * GIB + 0.05 * memory(GPT3).allocated)


def test_overhead_on_one_h100() -> None:
    """Measured: 2,111 MiB outside torch's allocator after a fit, where the context alone had 527."""
    got = memory(GPT3)
    assert (got.overhead - 0.05 * got.allocated) / GIB == pytest.approx(2111 / 1024, rel=0.02)


def test_optimizer_step_can_be_the_peak() -> None:
    """16-bit gradients are copied to 32 bits for the step; with hardly any activations that is the peak."""
    uniform = Recompute(granularity="full", method="uniform", num_layers=1)
    runtime = Runtime(grad_reduce_in_fp32=False)
    got = memory(GPT3, runtime=runtime, recompute=uniform, use_distributed_optimizer=False)
    assert got.optimizer_step == 4 * got.parameters
    assert got.allocated == pytest.approx(20 * got.parameters)


def test_gqa_glu_and_context_parallelism_change_only_their_items() -> None:
    model = MODELS["llama_70b"]
    h, kv, f = 8192, 8 * 128, 28672
    layer = layer_activations(model, ParallelLayout(), micro_batch_size=1, seq_length=4096)
    # Four inputs of h; query, key, value, output; gate and up, product; no dropout; flash output and log-sum-exp.
    expected = 4096 * (2 * (4 * h + 2 * h + 2 * kv + 3 * f) + 2 * h + 4 * 64)
    assert layer.stored == expected
    halved = layer_activations(model, ParallelLayout(context_parallel_size=2), micro_batch_size=1, seq_length=4096)
    assert halved.stored == expected / 2


def test_a_stage_under_full_recompute_holds_inputs_and_the_layer_at_work() -> None:
    layout = ParallelLayout(tensor_model_parallel_size=8, pipeline_model_parallel_size=8, sequence_parallel=True)
    uniform = Recompute(granularity="full", method="uniform", num_layers=1)
    got = memory(GPT3, 1, layout=layout, runtime=PAPER, recompute=uniform).activations
    layer = activations(tensor_model_parallel_size=8, sequence_parallel=True)
    assert got == pytest.approx(7 * 12 * layer.input + layer.stored)  # seven micro-batches in flight on stage 1
