"""The models that :mod:`benchmarks.gpu` trains, with random batches and their Hugging Face counterparts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning_megatron as lm
from lightning_megatron.models.config import TransformerModelConfig

Batch = dict[str, Tensor]
_OFF: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_OPTIMIZER = lm.OptimizerConfig(lr=1e-4, weight_decay=0.1, lr_decay_style="constant")
_BERT_SEQUENCE, _T5_ENCODER, _T5_DECODER = 512, 512, 128


@dataclass(frozen=True, slots=True)
class Workload:
    """One model to measure, without dropout."""

    config: TransformerModelConfig
    module: Callable[[], Any]
    """The package's LightningModule."""
    batch: Callable[[int, torch.Generator], Batch]
    """Random tokens of so many samples, on the host."""
    tokens_per_sample: int
    flops_per_sample: float
    """Of one forward and backward, without recomputation; attention counts in full."""
    hugging_face: Callable[[], nn.Module]
    """The same model of ``transformers``."""

    def hugging_face_batch(self, batch: Batch) -> Batch:
        """The batch under Hugging Face's names; labels are not shifted there."""
        return {"input_ids": batch["tokens"], "labels": batch["tokens"]} if "tokens" in batch else batch


def _gpt(config: lm.GPTConfig, hugging_face: Callable[[], nn.Module]) -> Workload:
    hidden, layers, sequence = config.hidden_size, config.num_layers, config.max_position_embeddings
    mlp = (3 if config.gated_linear_unit else 2) * hidden * config.ffn_size
    groups = config.num_query_groups or config.num_attention_heads
    attention = hidden * hidden * (2 + 2 * groups / config.num_attention_heads)
    weights = layers * (mlp + attention) + config.padded_vocab_size(1) * hidden

    def batch(samples: int, generator: torch.Generator) -> Batch:
        text = torch.randint(0, config.vocab_size, (samples, sequence + 1), generator=generator)
        return {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}

    return Workload(
        config=config,
        module=lambda: lm.GPTModule(config, _OPTIMIZER),
        batch=batch,
        tokens_per_sample=sequence,
        flops_per_sample=sequence * (6 * weights + 12 * layers * hidden * sequence),
        hugging_face=hugging_face,
    )


def gpt2(size: str, **changes: Any) -> Workload:
    """GPT-2 at sequence 1024, unless changed."""
    config = lm.GPTConfig.gpt2(size, **{**_OFF, **changes})  # type: ignore[arg-type]

    def hugging_face() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.padded_vocab_size(1),
                n_positions=config.max_position_embeddings,
                n_embd=config.hidden_size,
                n_layer=config.num_layers,
                n_head=config.num_attention_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )

    return _gpt(config, hugging_face)


def llama(**changes: Any) -> Workload:
    """A Llama, of a billion parameters and at sequence 4096 unless changed: RMSNorm, SwiGLU, grouped queries, RoPE."""
    sizes = {
        "num_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 8192,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    config = lm.GPTConfig.llama(**{**sizes, **changes})

    def hugging_face() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.padded_vocab_size(1),
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_query_groups,
                max_position_embeddings=config.max_position_embeddings,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )

    return _gpt(config, hugging_face)


def bert() -> Workload:
    """BERT-large's masked-token objective at sequence 512, a seventh of the tokens masked, none of them padding."""
    config = lm.BertConfig.megatron("345m", add_binary_head=False, **_OFF)
    hidden, layers, sequence = config.hidden_size, config.num_layers, _BERT_SEQUENCE
    head = 0.15 * (config.padded_vocab_size(1) + hidden) * hidden  # masked tokens alone have a loss
    weights = 12 * layers * hidden**2 + head

    def batch(samples: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(0, config.vocab_size, (samples, sequence), generator=generator)
        masked = torch.rand(samples, sequence, generator=generator) < 0.15
        return {
            "input_ids": tokens,
            "labels": tokens.masked_fill(~masked, -100),
            "attention_mask": torch.ones_like(tokens),
        }

    def hugging_face() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        return BertForMaskedLM(
            BertConfig(
                vocab_size=config.padded_vocab_size(1),
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.ffn_size,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            )
        )

    return Workload(
        config=config,
        module=lambda: lm.BertModule(config, _OPTIMIZER),
        batch=batch,
        tokens_per_sample=sequence,
        flops_per_sample=sequence * (6 * weights + 12 * layers * hidden * sequence),
        hugging_face=hugging_face,
    )


def t5() -> Workload:
    """T5-large v1.0 with 512 tokens in and 128 out."""
    config = lm.T5Config(num_layers=24, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=4096, **_OFF)
    hidden, layers = config.hidden_size, config.num_layers
    encoder = _T5_ENCODER * (6 * 12 * layers * hidden**2 + 12 * layers * hidden * _T5_ENCODER)
    # The cross attention's keys and values are projections of the encoder's tokens.
    decoder = _T5_DECODER * (6 * 14 * layers * hidden**2 + 12 * layers * hidden * (_T5_DECODER + _T5_ENCODER))
    crossing = _T5_ENCODER * 6 * 2 * layers * hidden**2
    output = _T5_DECODER * 6 * config.padded_vocab_size(1) * hidden

    def batch(samples: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(2, config.vocab_size, (samples, _T5_ENCODER + _T5_DECODER), generator=generator)
        source, target = tokens.split((_T5_ENCODER, _T5_DECODER), dim=1)
        return {
            "input_ids": source.contiguous(),
            "labels": target.contiguous(),
            "attention_mask": torch.ones_like(source),
        }

    def hugging_face() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=config.padded_vocab_size(1),
                d_model=hidden,
                d_kv=hidden // config.num_attention_heads,
                d_ff=config.ffn_size,
                num_layers=layers,
                num_heads=config.num_attention_heads,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                use_cache=False,
            )
        )

    return Workload(
        config=config,
        module=lambda: lm.T5Module(config, _OPTIMIZER),
        batch=batch,
        tokens_per_sample=_T5_ENCODER + _T5_DECODER,
        flops_per_sample=encoder + decoder + crossing + output,
        hugging_face=hugging_face,
    )


_LLAMA_7B: dict[str, Any] = {"hidden_size": 4096, "num_query_groups": 32, "ffn_hidden_size": 11008}
_FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
_TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 32,
}

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "gpt2-medium": lambda: gpt2("medium"),
    "gpt2-large": lambda: gpt2("large"),
    "gpt2-large, recomputed": lambda: gpt2("large", **_FULL),
    "gpt2-large, attention recomputed": lambda: gpt2("large", recompute_granularity="selective"),
    "gpt2-large, attention dropout": lambda: gpt2("large", attention_dropout=0.1),
    "gpt2-large, 4096": lambda: gpt2("large", max_position_embeddings=4096),
    "llama-1b": llama,
    "llama-1b-alibi": lambda: llama(position_embedding_type="alibi"),
    "llama-7b-slice": lambda: llama(num_layers=8, **_LLAMA_7B),
    "tiny-gpt2": lambda: gpt2("small", **_TINY),
    "tiny-llama": lambda: llama(num_query_groups=2, ffn_hidden_size=128, **_TINY),
    "bert-large": bert,
    "t5-large": t5,
}
