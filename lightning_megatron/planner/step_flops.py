"""Floating-point operations of one batch of any of the package's models, forward and backward."""

from __future__ import annotations

from lightning_megatron.models.config import T5Config, TransformerModelConfig
from lightning_megatron.planner.equivalent import dense_equivalent
from lightning_megatron.planner.flops import layer_forward_flops, model_flops_per_token
from lightning_megatron.planner.parameters import layer_widths


def batch_flops(config: TransformerModelConfig, samples: int, *lengths: int) -> float:
    """FLOPs of ``samples`` sequences; of a T5 ``lengths`` are the encoder's and the decoder's tokens.

    Of experts only those count that a token goes to. Small heads and recomputation do not count.
    """
    if isinstance(config, T5Config) and len(lengths) == 2:
        return samples * _t5_flops(config, *lengths)
    model = dense_equivalent(config, active_experts_only=True)
    return samples * lengths[0] * model_flops_per_token(model, lengths[0])


def _t5_flops(config: T5Config, source: int, target: int) -> float:
    model = dense_equivalent(config)
    w = layer_widths(model)
    encoder = config.num_layers * source * layer_forward_flops(model, source)
    queries = target * (2 * w.hidden * w.query + 2 * w.query * w.hidden + 4 * source * w.query)
    keys = source * 2 * w.hidden * 2 * w.key
    decoder = config.decoder_layers * (target * layer_forward_flops(model, target) + queries + keys)
    return 3 * (encoder + decoder + target * 2 * config.hidden_size * config.vocab_size)
