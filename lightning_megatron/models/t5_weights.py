"""T5's own initial weights: each matrix by the width of what it reads.

As the authors draw them (Mesh TensorFlow and T5X, for arXiv:1910.10683) and Hugging Face does, with one exception: an
output layer of its own has a standard deviation of ``hidden_size ** -0.5`` as in T5X, where Hugging Face has 1, whose
first loss is that of a model which is sure of wrong words.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lightning_megatron.backends.core import CrossAttention
from lightning_megatron.models.config import T5Config


def deviation_fields(config: T5Config) -> dict[str, Any]:
    """megatron-core's fields for weights that :func:`scale_layer` scales afterwards; none for Megatron-LM's weights."""
    factor = config.initializer_factor
    if factor is None:
        # Small embeddings would begin with tied logits next to constant where their scale comes on top, and learn
        # slowly.
        return {"embedding_init_method_std": 1.0} if config.scale_decoder_output else {}
    small = config.share_embeddings_and_output_weights and not config.scale_decoder_output
    return {
        "init_method_std": factor,
        "output_layer_init_method": partial(torch.nn.init.normal_, std=factor),
        "embedding_init_method_std": factor * config.hidden_size**-0.5 if small else factor,
    }


def table_std(config: T5Config) -> float:
    """Standard deviation of a table of position biases, and of an output layer that is not the embedding."""
    factor = config.initializer_factor
    return config.init_method_std if factor is None else factor * config.hidden_size**-0.5


@torch.no_grad()
def scale_layer(layer: Any, config: T5Config) -> None:
    """Make T5's weights of those that a layer drew with one standard deviation for all."""
    hidden, head = config.hidden_size**-0.5, config.head_size**-0.5
    query = hidden if config.scale_attention else hidden * head
    attended = (config.num_attention_heads * config.head_size) ** -0.5
    # [heads of this rank, query and key and value, head size, hidden]
    mixed = layer.self_attention.linear_qkv.weight.view(-1, 3, config.head_size, config.hidden_size)
    mixed[:, 0] *= query
    mixed[:, 1:] *= hidden
    layer.self_attention.linear_proj.weight *= attended
    if isinstance(layer.cross_attention, CrossAttention):
        layer.cross_attention.linear_q.weight *= query
        layer.cross_attention.linear_kv.weight *= hidden
        layer.cross_attention.linear_proj.weight *= attended
    layer.mlp.linear_fc1.weight *= hidden
    layer.mlp.linear_fc2.weight *= config.ffn_size**-0.5
