"""Floating-point operations of one optimizer step, and the two utilisations made of them.

*Model* FLOPs are what the mathematics needs: MFU (arXiv:2204.02311) divides them by the peak. *Hardware* FLOPs add what
recomputation repeats: HFU. Both count causal attention as the full square, as the Megatron papers do, so a kernel that
skips the masked half reports a slightly flattering MFU.
"""

from __future__ import annotations

from lightning_megatron.models.config import GPTConfig
from lightning_megatron.planner.parameters import layer_widths
from lightning_megatron.planner.settings import NO_RECOMPUTE, Recompute


def layer_forward_flops(model: GPTConfig, seq_length: int) -> float:
    """FLOPs per token of one layer's forward; ``24 h^2 + 4 s h`` for GPT-2's architecture."""
    return _layer_matmul_flops(model) + attention_core_flops(model, seq_length)


def attention_core_flops(model: GPTConfig, seq_length: int) -> float:
    """FLOPs per token of scores and values in one layer's forward, ``4 s h``: what selective recompute repeats."""
    return 4 * seq_length * layer_widths(model).query


def _layer_matmul_flops(model: GPTConfig) -> float:
    w = layer_widths(model)
    weights = w.hidden * (w.query + 2 * w.key) + w.query * w.hidden + w.hidden * w.ffn_up + w.ffn * w.hidden
    return 2 * weights


def model_flops_per_token(model: GPTConfig, seq_length: int) -> float:
    """FLOPs per token of forward and backward, without recomputation.

    For GPT-2's architecture times the batch's tokens this is ``72 B L s h^2 (1 + s/(6h) + V/(12 h L))``
    (arXiv:2205.05198, appendix A, equation 7). The backward takes twice the forward.
    """
    logits = 2 * model.hidden_size * model.vocab_size
    return 3 * (model.num_layers * layer_forward_flops(model, seq_length) + logits)


def hardware_flops_per_token(
    model: GPTConfig, seq_length: int, recompute: Recompute = NO_RECOMPUTE, chunk_layers: tuple[int, ...] | None = None
) -> float:
    """FLOPs per token of forward and backward, with what ``recompute`` repeats.

    Selective recomputation repeats the ``4 s h`` of attention's core once. The paper's own tables count it three times:
    ``72 B L s h^2 (1 + s/(3h) + V/(12 h L))`` (arXiv:2205.05198, appendix A), so its HFU and its 2.7% overhead for
    GPT-3 are higher than what this returns.

    Args:
        model: Sizes of the Transformer.
        seq_length: Tokens per sequence.
        recompute: What the backward recomputes.
        chunk_layers: Layers of every chunk of the pipeline, since ``block`` counts per chunk; by default one chunk.
    """
    flops = model_flops_per_token(model, seq_length)
    if recompute.granularity == "selective":
        return flops + model.num_layers * attention_core_flops(model, seq_length)
    repeated = sum(recompute.recomputed_layers(layers) for layers in chunk_layers or (model.num_layers,))
    return flops + repeated * layer_forward_flops(model, seq_length)


def utilization(flops_per_token: float, tokens_per_second: float, num_gpus: int, peak_flops: float) -> float:
    """MFU or HFU, a fraction of the peak, at ``tokens_per_second`` over ``num_gpus`` GPUs of ``peak_flops`` each."""
    return flops_per_token * tokens_per_second / (num_gpus * peak_flops)
