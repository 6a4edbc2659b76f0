"""Parameters against numbers that others published."""

import pytest

from lightning_megatron.errors import LayoutError
from lightning_megatron.layout import ParallelLayout
from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner import MODELS, model_parameters, stage_parameters
from lightning_megatron.planner.parameters import balanced_stages, layers_per_chunk


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Hugging Face's num_parameters() of the checkpoints.
        ("gpt2_small", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
        ("tinyllama_1b", 1_100_048_384),
        ("llama_7b", 6_738_415_616),
        ("llama_13b", 13_015_864_320),
        ("llama_70b", 68_976_648_192),
        ("llama3_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("llama3_405b", 405_853_388_800),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert model_parameters(MODELS[name]) == parameters


def test_gpt2_large_per_rank_as_the_accelerate_guide_prints_it() -> None:
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    model = GPTConfig.gpt2("large")
    assert model.padded_vocab_size(2) == 50432
    assert [stage_parameters(model, layout, stage) for stage in (0, 1)] == [210_753_280, 209_445_120]


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "billions"),
    [  # arXiv:2104.04473, table 1
        (24, 2304, 24, 1.7),
        (30, 3072, 32, 3.6),
        (36, 4096, 32, 7.5),
        (40, 6144, 48, 18.4),
        (48, 8192, 64, 39.1),
        (60, 10240, 80, 76.1),
        (80, 12288, 96, 145.6),
        (96, 16384, 128, 310.1),
        (105, 20480, 128, 529.6),
        (128, 25600, 160, 1008.0),
    ],
)
def test_equation_2_of_narayanan_et_al(layers: int, hidden: int, heads: int, billions: float) -> None:
    vocab, positions = 51200, 2048
    model = GPTConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=positions,
    )
    # 12 l h^2 (1 + 13/(12h) + (V+s)/(12 l h)), in whole numbers; the final LayerNorm's 2h is not in it.
    formula = 12 * layers * hidden**2 + 13 * layers * hidden + (vocab + positions) * hidden
    assert model_parameters(model) - 2 * hidden == formula
    assert round(model_parameters(model) / 1e9, 1) == billions


def test_untied_output_and_gqa_are_split_over_tensor_parallel_ranks() -> None:
    model = MODELS["llama_70b"].replace(make_vocab_size_divisible_by=1)
    whole = model_parameters(model)
    norms = (2 * model.num_layers + 1) * model.hidden_size
    layout = ParallelLayout(tensor_model_parallel_size=8)
    assert stage_parameters(model, layout, 0) == (whole - norms) // 8 + norms
    # 16 ranks share 8 groups of keys and values: every group is on two ranks.
    wide = ParallelLayout(tensor_model_parallel_size=16)
    keys = 2 * 128 * model.hidden_size * model.num_layers
    assert stage_parameters(model, wide, 0) == (whole - norms - 8 * keys) // 16 + keys + norms


def test_layers_are_spread_as_megatron_core_spreads_them() -> None:
    def spread(layers: int, **sizes: object) -> tuple[tuple[int, ...], ...]:
        return layers_per_chunk(layers, ParallelLayout(**sizes))  # type: ignore[arg-type]

    assert spread(16, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=4) == ((2,) * 4, (2,) * 4)
    uneven = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}
    assert spread(12, pipeline_model_parallel_size=4, **uneven) == ((3,), (4,), (4,), (1,))
    # Virtual stages go round the ranks: 0, 1, 0, 1.
    text = "E,t|t*2|(tt|)*1t*3,L"
    explicit = {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": text}
    assert spread(8, pipeline_model_parallel_size=2, **explicit) == ((1, 2), (2, 3))
    with pytest.raises(LayoutError, match="7 layers for"):
        spread(7, pipeline_model_parallel_size=2, **explicit)
    with pytest.raises(LayoutError, match="num_layers=10 do not spread"):
        spread(10, pipeline_model_parallel_size=4)


def test_balanced_stages_count_embedding_and_loss_as_layers() -> None:
    assert balanced_stages(126, 32) == "Et*3|(t*4|)*30t*3L"
    layout = ParallelLayout(
        pipeline_model_parallel_size=16,
        virtual_pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout=balanced_stages(126, 32),
    )
    chunks = layers_per_chunk(126, layout)
    assert chunks[0] == (3, 4)
    assert chunks[-1] == (4, 3)
    assert chunks[7] == (4, 4)
    assert balanced_stages(6, 2) == "Et*3|t*3L"
    assert balanced_stages(126, 128) is None
    assert balanced_stages(12, 5) is None
