"""Model configurations: frozen, standard library only, in megatron-core's field names."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

PositionEmbedding = Literal["learned_absolute", "rope", "none"]
POSITION_EMBEDDINGS = ("learned_absolute", "rope", "none")
Normalization = Literal["LayerNorm", "RMSNorm"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.{hint}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerModelConfig:
    """Sizes and choices that GPT, BERT and T5 share.

    Raises:
        ValueError: a size below one, a choice that does not exist, heads that do not divide the hidden size.
    """

    num_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    num_query_groups: int | None = None
    """Groups of grouped-query attention (arXiv:2305.13245); 1 is multi-query; ``None`` is multi-head."""
    kv_channels: int | None = None
    """Width of one head; ``None`` is ``hidden_size // num_attention_heads``."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; ``None`` is ``4 * hidden_size``."""
    vocab_size: int = 50257
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size; the loss never sees the padding."""
    max_position_embeddings: int = 1024
    """Longest sequence, in tokens."""
    normalization: Normalization = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    activation: Activation = "gelu_tanh"
    gated_linear_unit: bool = False
    """Gate the MLP (GLU, arXiv:2002.05202): ``silu`` gated is SwiGLU, ``gelu_tanh`` gated is GEGLU."""
    add_bias_linear: bool = True
    add_qkv_bias: bool | None = None
    """Biases on the query, key and value projections; ``None`` follows ``add_bias_linear``."""
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_method_std: float = 0.02
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute activations in the backward: only attention's core (``selective``), or whole layers (``full``)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With ``full``: checkpoint every ``recompute_num_layers`` layers, or only the first ``recompute_num_layers``."""
    recompute_num_layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}, but must be a whole number of at least 1.")
        _choice("normalization", self.normalization, ("LayerNorm", "RMSNorm"))
        _choice("activation", self.activation, ACTIVATIONS)
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}. "
                "Change one of them, or give kv_channels, the width of one head."
            )
        if self.num_query_groups is not None and (
            self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups
        ):
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_query_groups={self.num_query_groups}."
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not in [0, 1).")
        self._check_recompute()

    def _check_recompute(self) -> None:
        if self.recompute_granularity is not None:
            _choice("recompute_granularity", self.recompute_granularity, ("selective", "full"))
        if self.recompute_method is not None:
            _choice("recompute_method", self.recompute_method, ("uniform", "block"))
        if self.recompute_granularity == "full" and not (self.recompute_method and self.recompute_num_layers):
            raise ValueError(
                "recompute_granularity='full' needs recompute_method ('uniform' or 'block') and recompute_num_layers."
            )
        if self.recompute_granularity != "full" and (self.recompute_method or self.recompute_num_layers):
            raise ValueError(
                f"recompute_method={self.recompute_method!r} and recompute_num_layers={self.recompute_num_layers!r} "
                f"belong to recompute_granularity='full', but it is {self.recompute_granularity!r}."
            )

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of the embedding over all tensor-parallel ranks: 50257 at TP=2 is 50432."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """All fields by name, for metadata and logs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig(TransformerModelConfig):
    """A decoder-only language model: GPT-2 by default, Llama-style through :meth:`llama`."""

    position_embedding_type: PositionEmbedding = "learned_absolute"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    share_embeddings_and_output_weights: bool = True
    """Tie the output projection to the token embedding."""

    def __post_init__(self) -> None:
        super(GPTConfig, self).__post_init__()
        _choice("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDINGS)
        if not 0.0 < self.rotary_percent <= 1.0:
            raise ValueError(f"rotary_percent={self.rotary_percent!r} is not in (0, 1].")

    @classmethod
    def gpt2(cls, size: Literal["small", "medium", "large", "xl"] = "small", **changes: Any) -> GPTConfig:
        """The four GPT-2 sizes of Radford et al. 2019."""
        sizes = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20), "xl": (48, 1600, 25)}
        _choice("size", size, tuple(sizes))
        layers, hidden, heads = sizes[size]
        return cls(num_layers=layers, hidden_size=hidden, num_attention_heads=heads).replace(**changes)

    @classmethod
    def llama(cls, **changes: Any) -> GPTConfig:
        """Llama-style choices (arXiv:2302.13971): RMSNorm, SwiGLU, RoPE, no biases, no dropout, untied embeddings."""
        base = cls(
            normalization="RMSNorm",
            activation="silu",
            gated_linear_unit=True,
            add_bias_linear=False,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
        return base.replace(**changes)
