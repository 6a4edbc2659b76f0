"""Decoding on a GPU: recorded steps give the tokens that unrecorded ones give, and half precision runs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_megatron as lm
from lightning_megatron.generation import GenerationConfig
from lightning_megatron.generation.api import build_engine
from tests.gpu.test_fused import VOCAB, Batches, config

POSITIONS = 320


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def module(request: Any) -> Any:
    module = lm.GPTModule(config(request.param, max_position_embeddings=POSITIONS))
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, strategy=lm.MegatronStrategy(seed=3), precision="32-true", limit_val_batches=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.validate(module, Batches(1), verbose=False)
    return module


@pytest.mark.parametrize("lengths", [(7, 7), (3, 90, 1)], ids=["aligned", "unequal"])
@pytest.mark.parametrize("beams", [1, 3])
def test_recorded_steps_equal_unrecorded(module: Any, lengths: tuple[int, ...], beams: int) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
    # Past 128 keys, where another recording takes over.
    wanted = GenerationConfig(max_new_tokens=150, num_beams=beams)
    expected = build_engine(module, cuda_graphs=False).generate(prompts, wanted)
    engine = build_engine(module, cuda_graphs=True)
    for _ in range(2):  # the second time, all steps are replays
        actual = engine.generate(prompts, wanted)
        assert [row.tokens for row in actual] == [row.tokens for row in expected]
