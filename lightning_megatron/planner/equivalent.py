"""Any model as the dense decoder of the same sizes, which is what the planner's formulas are for."""

from __future__ import annotations

from lightning_megatron.models.config import BertConfig, GPTConfig, T5Config, TransformerModelConfig

_SHARED = tuple(name for name in TransformerModelConfig.__dataclass_fields__)


def dense_equivalent(config: TransformerModelConfig, *, active_experts_only: bool = False) -> GPTConfig:
    """A dense :class:`GPTConfig` of the sizes of ``config``.

    A BERT is a decoder of its sizes, without its small heads. A T5 is a decoder of the layers of both sides, without
    cross attention. Experts are one wide MLP.

    Args:
        config: Any of the package's model configurations.
        active_experts_only: Count only the experts that a token goes to, as FLOPs do; else all, as memory does.
    """
    if isinstance(config, GPTConfig):
        if config.num_moe_experts is None:
            return config
        experts = config.moe_router_topk if active_experts_only else config.num_moe_experts
        width = config.moe_ffn_hidden_size or config.ffn_size
        return config.replace(num_moe_experts=None, ffn_hidden_size=experts * width)
    shared = {name: getattr(config, name) for name in _SHARED}
    if isinstance(config, T5Config):
        shared["num_layers"] = config.num_layers + config.decoder_layers
        shared["position_embedding_type"] = (
            "none" if config.position_embedding_type == "relative" else "learned_absolute"
        )
        shared["share_embeddings_and_output_weights"] = config.share_embeddings_and_output_weights
    if isinstance(config, BertConfig):
        shared["position_embedding_type"] = config.position_embedding_type
        shared["share_embeddings_and_output_weights"] = config.share_embeddings_and_output_weights
    return GPTConfig(**shared)
