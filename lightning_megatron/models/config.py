"""Model configurations: frozen, standard library only, in megatron-core's field names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self, override

if TYPE_CHECKING:
    from lightning_megatron.layout import ParallelLayout

PositionEmbedding = Literal["learned_absolute", "rope", "alibi", "none"]
POSITION_EMBEDDINGS = ("learned_absolute", "rope", "alibi", "none")
Normalization = Literal["LayerNorm", "RMSNorm"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
_STD = 0.02


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
    init_method_std: float = _STD
    """Standard deviation of initial weights; those before a residual are divided by ``sqrt(2 * num_layers)``."""
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

    @classmethod
    def from_checkpoint(cls, told: Mapping[str, Any]) -> Self:
        """The configuration that a checkpoint tells, which may be older than some fields."""
        return cls(**told)

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def pipeline_layers(self) -> int:
        """Layers that pipeline stages share."""
        return self.num_layers

    def check_layout(self, layout: ParallelLayout) -> None:
        """Raise :class:`LayoutError` unless a model of these sizes can be split this way."""
        layout.check_model(
            num_layers=self.pipeline_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            ffn_hidden_size=self.ffn_size,
        )

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
    """A decoder-only language model: GPT-2 by default, Llama-style through :meth:`llama`, a mixture of experts with
    ``num_moe_experts``.

    Raises:
        ValueError: as for :class:`TransformerModelConfig`, and for rotary or expert fields that do not fit each other.
    """

    position_embedding_type: PositionEmbedding = "learned_absolute"
    """``alibi`` biases attention by distance (arXiv:2108.12409) and gives tokens no positions."""
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: bool = False
    """Stretch the slow frequencies of RoPE for longer contexts as Llama 3.1 does (arXiv:2407.21783)."""
    rope_scaling_factor: float = 8.0
    seq_len_interpolation_factor: float | None = None
    """Divide positions by this before RoPE (position interpolation, arXiv:2306.15595)."""
    share_embeddings_and_output_weights: bool = True
    """Tie the output projection to the token embedding."""
    num_moe_experts: int | None = None
    """Experts of each layer's MLP (arXiv:2101.03961); ``None`` is a dense MLP."""
    moe_router_topk: int = 2
    """Experts that each token goes to."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of one expert; ``None`` is that of the dense MLP."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss, which is logged unweighted as ``load_balancing_loss``."""
    moe_z_loss_coeff: float | None = None
    """Weight of the router's z-loss (arXiv:2202.08906), logged as ``z_loss``."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    moe_router_pre_softmax: bool | None = None
    """Weigh experts by a softmax over all of them, before the choice, instead of over the chosen; ``None`` does so with
    ``moe_router_topk=1`` (arXiv:2101.03961), where a softmax over one expert would be 1 and train no router."""
    moe_expert_capacity_factor: float | None = None
    """Each expert takes at most this times ``tokens * moe_router_topk / num_moe_experts`` of the tokens that a rank
    routes in a micro-batch, those with the highest weights, and passes the rest over; ``None`` drops nothing."""

    def __post_init__(self) -> None:
        super(GPTConfig, self).__post_init__()
        _choice("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDINGS)
        if not 0.0 < self.rotary_percent <= 1.0:
            raise ValueError(f"rotary_percent={self.rotary_percent!r} is not in (0, 1].")
        if (self.rope_scaling or self.seq_len_interpolation_factor) and self.position_embedding_type != "rope":
            raise ValueError(
                "rope_scaling and seq_len_interpolation_factor belong to position_embedding_type='rope', but it is "
                f"{self.position_embedding_type!r}."
            )
        if self.num_moe_experts is not None:
            _choice("moe_token_dispatcher_type", self.moe_token_dispatcher_type, ("alltoall", "allgather"))
            if self.num_moe_experts < 1 or not 1 <= self.moe_router_topk <= self.num_moe_experts:
                raise ValueError(
                    f"moe_router_topk={self.moe_router_topk} is not between 1 and "
                    f"num_moe_experts={self.num_moe_experts}."
                )
            self._check_router()

    def _check_router(self) -> None:
        if self.moe_router_topk == 1 and self.moe_router_pre_softmax is False:
            raise ValueError(
                "moe_router_pre_softmax=False with moe_router_topk=1 gives each token's only expert the weight 1, "
                "whatever the router says. Leave moe_router_pre_softmax out, or choose 2 experts or more."
            )
        factor = self.moe_expert_capacity_factor
        if factor is not None and not factor > 0.0:
            raise ValueError(f"moe_expert_capacity_factor={factor!r} must be above 0, or None to drop no tokens.")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig(TransformerModelConfig):
    """An encoder with a masked-token head, as Megatron-LM's BERT: layer norms before each block (arXiv:1909.08053).
    With ``post_layernorm`` the original BERT.

    Raises:
        ValueError: as for :class:`TransformerModelConfig`, and for a count of labels below one.
    """

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    activation: Activation = "gelu"
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    num_tokentypes: int = 2
    """Segments that a token can belong to; 0 for none."""
    add_binary_head: bool = True
    """Predict whether two segments are in order (or follow each other) from the first token."""
    post_layernorm: bool = False
    """Norms after each block's residual and after the embedding, as the original BERT has them (arXiv:1810.04805)."""
    share_embeddings_and_output_weights: bool = True
    num_labels: int | None = None
    """For fine-tuning: classes of a sequence, or 1 for regression, in place of the pre-training heads."""
    classifier_dropout: float = 0.1
    """Before the head of fine-tuning."""

    def __post_init__(self) -> None:
        super(BertConfig, self).__post_init__()
        _choice("position_embedding_type", self.position_embedding_type, ("learned_absolute", "rope"))
        if self.num_labels is not None and self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels!r}, but must be at least 1, or None for pre-training.")
        if self.num_tokentypes < 0:
            raise ValueError(f"num_tokentypes={self.num_tokentypes!r} is negative.")

    @classmethod
    def megatron(cls, size: Literal["345m", "1.3b", "3.9b"] = "345m", **changes: Any) -> BertConfig:
        """Sizes of Megatron-LM's BERT (Shoeybi et al. 2019, table 4)."""
        sizes = {"345m": (24, 1024, 16), "1.3b": (24, 2048, 32), "3.9b": (48, 2560, 40)}
        _choice("size", size, tuple(sizes))
        layers, hidden, heads = sizes[size]
        return cls(num_layers=layers, hidden_size=hidden, num_attention_heads=heads).replace(**changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config(TransformerModelConfig):
    """An encoder and a decoder (arXiv:1910.10683). The defaults are T5 v1.0 small's; see :meth:`v1_1`.

    ``num_layers`` counts the encoder's layers. ``max_position_embeddings`` bounds learned positions and the sequences
    of either side.

    Raises:
        ValueError: as for :class:`TransformerModelConfig`, and for buckets that T5's formula cannot divide.
    """

    num_layers: int = 6
    decoder_num_layers: int | None = None
    """``None`` is as many as the encoder has."""
    hidden_size: int = 512
    num_attention_heads: int = 8
    vocab_size: int = 32128
    max_position_embeddings: int = 512
    normalization: Normalization = "RMSNorm"
    layernorm_epsilon: float = 1e-6
    activation: Activation = "relu"
    add_bias_linear: bool = False
    position_embedding_type: Literal["relative", "learned_absolute"] = "relative"
    """``relative`` is T5's bias by bucketed distance; ``learned_absolute`` is what Megatron-LM's T5 had at first."""
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    scale_attention: bool = False
    """Divide scores by the root of the head's width. T5 does not; its initial weights make up for it."""
    initializer_factor: float | None = 1.0
    """Draw initial weights as T5 does, each matrix by the width of what it reads, times this; ``None`` draws them as
    Megatron-LM does, by ``init_method_std`` and the number of layers."""
    share_embeddings_and_output_weights: bool = True
    scale_decoder_output: bool = True
    """Scale the decoder's output by ``hidden_size ** -0.5`` before the vocabulary, as T5 v1.0 does."""
    decoder_start_token_id: int = 0
    """What the decoder reads first, in training (labels shifted right) and in generation."""
    pad_token_id: int = 0
    """What the decoder reads after a label that does not count, when labels are shifted right."""

    def __post_init__(self) -> None:
        super(T5Config, self).__post_init__()
        _choice("position_embedding_type", self.position_embedding_type, ("relative", "learned_absolute"))
        if self.num_query_groups not in (None, self.num_attention_heads):
            raise ValueError(
                f"num_query_groups={self.num_query_groups} groups queries, which the cross attention of a T5 cannot. "
                "Leave it out."
            )
        if self.initializer_factor is not None and self.init_method_std != _STD:
            raise ValueError(
                f"init_method_std={self.init_method_std!r} is of Megatron-LM's initial weights, but "
                f"initializer_factor={self.initializer_factor!r} asks for T5's own. Leave one out: "
                "initializer_factor=None uses init_method_std."
            )
        for name in ("decoder_start_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is no token of a vocabulary of vocab_size={self.vocab_size}."
                )
        if self.decoder_num_layers is not None and self.decoder_num_layers < 1:
            raise ValueError(f"decoder_num_layers={self.decoder_num_layers!r}, but must be at least 1, or None.")
        buckets, longest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or longest <= buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets={buckets} must be a multiple of 4, and "
                f"relative_attention_max_distance={longest} more than half of it."
            )

    @classmethod
    @override
    def from_checkpoint(cls, told: Mapping[str, Any]) -> Self:
        # Before this field there were Megatron-LM's initial weights alone.
        return cls(**{"initializer_factor": None, **told})

    @property
    def decoder_layers(self) -> int:
        """Layers of the decoder."""
        return self.decoder_num_layers or self.num_layers

    @property
    def pipeline_layers(self) -> int:
        return self.num_layers + self.decoder_layers

    @classmethod
    def v1_1(cls, **changes: Any) -> T5Config:
        """T5 v1.1 and mT5 (arXiv:2010.11934): gated GELU, an output layer of its own that is not scaled."""
        base = cls(
            activation="gelu_tanh",
            gated_linear_unit=True,
            ffn_hidden_size=1024,
            share_embeddings_and_output_weights=False,
            scale_decoder_output=False,
        )
        return base.replace(**changes)
