"""Generation over tensor, pipeline and data parallel ranks: greedy, sampled, and by beam search.

    trainer.fit(module, data)
    [answer] = module.generate([[464, 2068, 7586]], max_new_tokens=32)
    answer.tokens                                    # the prompt and what follows

Every rank of the Trainer calls it with the same arguments, and every rank gets the same answer.
"""

from lightning_megatron.generation.config import GenerationConfig
from lightning_megatron.generation.engine import Engine, GenerationError
from lightning_megatron.generation.megatron import megatron_generate
from lightning_megatron.generation.protocol import Decoder, Step
from lightning_megatron.generation.result import Generation, NewTokens

__all__ = [
    "Decoder",
    "Engine",
    "Generation",
    "GenerationConfig",
    "GenerationError",
    "NewTokens",
    "Step",
    "megatron_generate",
]
