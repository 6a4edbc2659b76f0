"""The numbers of parameters that users of Megatron-LM know."""

from __future__ import annotations

import os

import torch

import lightning_megatron as lm
from lightning_megatron.models.gpt import GPTChunk, gpt_core_config
from lightning_megatron.models.parameters import count_parameters, parameter_report
from lightning_megatron.models.transformer_config import BuildContext
from tests.helpers import quiet_trainer
from tests.models.runs import strategy
from tests.models.test_gpt import make
from tests.ranks import RankPool


def _gpt2_large() -> tuple[int, str]:
    """Built without memory for the weights."""
    config = lm.GPTConfig.gpt2("large")
    module = make()
    spread = strategy(tp=2, pp=2)
    module.trainer = quiet_trainer(spread, int(os.environ["WORLD_SIZE"]))
    spread.connect(module)
    spread.setup_environment()
    context: BuildContext = spread.build_context
    core = gpt_core_config(config, context)
    core.init_model_with_meta_device, core.perform_initialization = True, False
    with torch.device("meta"):
        chunks = [GPTChunk(config, core, context, stage, fused=False) for stage in context.stages]
    counted = count_parameters(chunks), parameter_report(chunks, context.groups.tp.rank(), context.groups.pp.rank())
    spread.teardown()
    return counted


def test_gpt2_large_at_tp2_pp2(ranks: RankPool) -> None:
    assert lm.GPTConfig.gpt2("large").padded_vocab_size(2) == 50432
    results = ranks.run(_gpt2_large, 4)
    assert [count for count, _ in results] == [210753280, 210753280, 209445120, 209445120]
    assert results[3][1] == " > number of parameters on (tensor, pipeline) model parallel rank (1, 1): 209445120"
