"""Names of megatron-core's tensors in files, and which ranks share them."""

from __future__ import annotations

import re

# TransformerEngine's layers hold a norm together with the linear layer after it, and megatron-core writes its own
# layers' norms by the same names. Its T5 calls the tables of relative positions, and the output layer, otherwise.
_STORED = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
_STORED_BY_MEGATRON = (
    ("encoder_relative_pos_emb.relative_attention_bias.", "encoder_position_bias."),
    ("decoder_relative_pos_emb.relative_attention_bias.", "decoder_position_bias."),
    ("lm_head.output_layer.", "output_layer."),
)
_STACKED = re.compile(r"^(.*\.layers)\.(?!\d)(.+)$")
_NUMBERED = re.compile(r"^(.*\.layers)\.(\d+)\.(.+)$")
_NO_WEIGHTS = ("optimizer", "rng", "opt_param_scheduler", "rerun_state", "lr_scheduler")

_BY_ROWS = (".linear_qkv.", ".linear_fc1.", ".linear_q.", ".linear_kv.", "word_embeddings.", "output_layer.")
_BY_COLUMNS = (".linear_proj.weight", ".linear_fc2.weight")


def is_weight(stored: str) -> bool:
    """Whether a name in a file is that of a weight, not of an optimizer's state or TransformerEngine's remarks."""
    return not stored.startswith(_NO_WEIGHTS) and "_extra_state" not in stored


def core_name(stored: str) -> str:
    """The name in ``chunk.state_dict()`` of a name in a file."""
    for old, new in (*_STORED, *_STORED_BY_MEGATRON):
        stored = stored.replace(old, new)
    return stored


def stored_name(core: str, *, megatron: bool, relative_positions: bool = False) -> str:
    """The name in a checkpoint of megatron-core's, with the layer's number.

    Args:
        megatron: whether Megatron-LM is to read it, rather than this package.
        relative_positions: whether the model is a T5.
    """
    pairs = _STORED + (_STORED_BY_MEGATRON if megatron and relative_positions else ())
    for old, new in pairs:
        core = re.sub(rf"(^|\.){re.escape(new)}", rf"\g<1>{old}", core)
    return core


def stacked(stored: str) -> tuple[str, str] | None:
    """``decoder.layers`` and the rest of the name of a tensor that holds all layers, or ``None``."""
    match = _STACKED.match(stored)
    return None if match is None else (match[1], match[2])


def numbered(name: str) -> tuple[str, int, str] | None:
    """``decoder.layers``, the number and the rest of the name of a layer's tensor, or ``None``."""
    match = _NUMBERED.match(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def partition_dim(core: str) -> int | None:
    """Along which dimension tensor-parallel ranks cut a tensor of Megatron-LM's; ``None`` if all hold it whole."""
    if core.endswith(_BY_COLUMNS):
        return 1
    return 0 if any(part in core for part in _BY_ROWS) else None
