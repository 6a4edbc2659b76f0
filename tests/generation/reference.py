"""Hugging Face models with random weights, and their weights in this package's modules."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lightning_megatron as lm
from lightning_megatron.models.config import T5Config
from lightning_megatron.models.t5_module import T5Module
from tests.helpers import quiet_trainer

VOCAB = 120
POSITIONS = 64
Weights = dict[str, np.ndarray]


def gpt2(seed: int = 0) -> Any:
    """A GPT-2 whose text is not one token over and over."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=4,
        n_head=4,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def llama(seed: int = 0, key_value_heads: int = 2) -> Any:
    """A Llama with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def t5(*, v1_1: bool = False, seed: int = 0) -> Any:
    """A T5 of two layers each side, as published (ReLU, scaled output) or as of version 1.1 (gated GELU)."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        dropout_rate=0.0,
        initializer_factor=1.0,
        feed_forward_proj="gated-gelu" if v1_1 else "relu",
        tie_word_embeddings=not v1_1,
        eos_token_id=None,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():  # T5's own draws give one token over and over
        if "layer_norm" not in name:
            torch.nn.init.normal_(parameter, std=1.0 if "shared" in name or "bias" in name else 0.4)
    return model


def t5_config(model: Any) -> T5Config:
    """The configuration of the same T5 here."""
    config = model.config
    base = T5Config.v1_1() if config.is_gated_act else T5Config()
    return base.replace(
        # Hugging Face ties the embeddings of every T5 that it makes itself.
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        scale_decoder_output=config.scale_decoder_outputs,
        num_layers=config.num_layers,
        hidden_size=config.d_model,
        num_attention_heads=config.num_heads,
        kv_channels=config.d_kv,
        ffn_hidden_size=config.d_ff,
        vocab_size=config.vocab_size,
        make_vocab_size_divisible_by=32,
        max_position_embeddings=POSITIONS,
        relative_attention_num_buckets=config.relative_attention_num_buckets,
        relative_attention_max_distance=config.relative_attention_max_distance,
    )


def gpt_config(model: Any, **changes: Any) -> lm.GPTConfig:
    """The configuration of the same model here."""
    config = model.config
    if config.model_type == "gpt2":
        base = lm.GPTConfig(
            num_layers=config.n_layer,
            hidden_size=config.n_embd,
            num_attention_heads=config.n_head,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.n_positions,
            hidden_dropout=0.1,
            attention_dropout=0.1,
        )
    else:
        base = lm.GPTConfig.llama(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads,
            ffn_hidden_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            layernorm_epsilon=config.rms_norm_eps,
            rotary_base=config.rope_parameters["rope_theta"],
        )
    return base.replace(make_vocab_size_divisible_by=32, **changes)


def weights(model: Any) -> Weights:
    """All weights in megatron-core's names, whole, layers numbered over the model."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    kind = model.config.model_type
    whole = (
        _gpt2(state) if kind == "gpt2" else _llama(state, model.config) if kind == "llama" else _t5(state, model.config)
    )
    return {name: value.numpy() for name, value in whole.items()}  # numpy crosses processes without shared memory


def _gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {
        "embedding.word_embeddings.weight": state["transformer.wte.weight"],
        "embedding.position_embeddings.weight": state["transformer.wpe.weight"],
        "decoder.final_layernorm.weight": state["transformer.ln_f.weight"],
        "decoder.final_layernorm.bias": state["transformer.ln_f.bias"],
    }
    names = {
        "ln_1": "input_layernorm",
        "attn.c_attn": "self_attention.linear_qkv",
        "attn.c_proj": "self_attention.linear_proj",
        "ln_2": "pre_mlp_layernorm",
        "mlp.c_fc": "mlp.linear_fc1",
        "mlp.c_proj": "mlp.linear_fc2",
    }
    for name, value in state.items():
        parts = name.split(".")
        if parts[1] != "h":
            continue
        module, kind = ".".join(parts[3:-1]), parts[-1]
        if module not in names:
            continue
        weight = value.t() if value.dim() == 2 else value
        if module == "attn.c_attn":  # q q q q k k k k v v v v -> q k v, head by head
            weight = weight.unflatten(0, (3, 4, -1)).transpose(0, 1).flatten(0, 2)
        whole[f"decoder.layers.{parts[2]}.{names[module]}.{kind}"] = weight.contiguous()
    return whole


def _llama(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    whole = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    groups = config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        query, key, value = (state[f"{there}self_attn.{name}_proj.weight"].unflatten(0, (groups, -1)) for name in "qkv")
        whole[here + "self_attention.linear_qkv.weight"] = torch.cat((query, key, value), dim=1).flatten(0, 1)
        whole[here + "self_attention.linear_proj.weight"] = state[there + "self_attn.o_proj.weight"]
        gate, up = state[there + "mlp.gate_proj.weight"], state[there + "mlp.up_proj.weight"]
        whole[here + "mlp.linear_fc1.weight"] = torch.stack((gate, up))
        whole[here + "mlp.linear_fc2.weight"] = state[there + "mlp.down_proj.weight"]
        whole[here + "input_layernorm.weight"] = state[there + "input_layernorm.weight"]
        whole[here + "pre_mlp_layernorm.weight"] = state[there + "post_attention_layernorm.weight"]
    return whole


def _t5(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    whole = {
        "embedding.word_embeddings.weight": state["shared.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    heads = config.num_heads
    for stack in ("encoder", "decoder"):
        bias = state[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        whole[f"{stack}_position_bias.weight"] = bias
        whole[f"{stack}.final_layernorm.weight"] = state[f"{stack}.final_layer_norm.weight"]
        for layer in range(config.num_layers):
            there = f"{stack}.block.{layer}.layer."
            # Numbered over both stacks, as our layers are.
            here = f"{stack}.layers.{layer + config.num_layers * (stack == 'decoder')}."
            parts = {name: state[f"{there}0.SelfAttention.{name}.weight"].unflatten(0, (heads, -1)) for name in "qkv"}
            whole[here + "self_attention.linear_qkv.weight"] = torch.cat(list(parts.values()), dim=1).flatten(0, 1)
            whole[here + "self_attention.linear_proj.weight"] = state[f"{there}0.SelfAttention.o.weight"]
            whole[here + "input_layernorm.weight"] = state[f"{there}0.layer_norm.weight"]
            if stack == "decoder":
                cross = there + "1.EncDecAttention."
                pair = [state[f"{cross}{name}.weight"].unflatten(0, (heads, -1)) for name in "kv"]
                whole[here + "cross_attention.linear_q.weight"] = state[cross + "q.weight"]
                whole[here + "cross_attention.linear_kv.weight"] = torch.cat(pair, dim=1).flatten(0, 1)
                whole[here + "cross_attention.linear_proj.weight"] = state[cross + "o.weight"]
                whole[here + "pre_cross_attn_layernorm.weight"] = state[there + "1.layer_norm.weight"]
            last = there + ("2." if stack == "decoder" else "1.")
            dense = last + "DenseReluDense."
            if dense + "wi.weight" in state:
                whole[here + "mlp.linear_fc1.weight"] = state[dense + "wi.weight"]
            else:
                pair = [state[dense + "wi_0.weight"], state[dense + "wi_1.weight"]]
                whole[here + "mlp.linear_fc1.weight"] = torch.stack(pair)
            whole[here + "mlp.linear_fc2.weight"] = state[dense + "wo.weight"]
            whole[here + "pre_mlp_layernorm.weight"] = state[last + "layer_norm.weight"]
    return whole


def load(module: lm.GPTModule, whole: Weights) -> None:
    """Fill this rank's chunks."""
    tp = module.strategy.build_context.groups.tp
    for chunk in module.chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(getattr(chunk, parts[0]).layers[int(parts[2])].layer_number - 1)
            source = "embedding.word_embeddings.weight" if name == "output_layer.weight" else ".".join(parts)
            source = ".".join(parts) if ".".join(parts) in whole else source
            value = torch.from_numpy(whole[source])
            if value.dim() == 3:  # gate and up are cut one by one
                value = value.chunk(tp.size(), dim=1)[tp.rank()].flatten(0, 1)
            elif getattr(parameter, "tensor_model_parallel", False):
                dim = parameter.partition_dim
                missing = parameter.size(dim) * tp.size() - value.size(dim)
                padding = torch.full((missing, *value.shape[1:]), 9.0)  # padded rows must not matter
                value = torch.cat((value, padding)) if missing else value
                value = value.chunk(tp.size(), dim=dim)[tp.rank()]
            with torch.no_grad():
                parameter.copy_(value)


class Loader:
    """One batch of training data, so that a fit can build the model."""

    def __init__(self, sequence: int = 16) -> None:
        self.sequence = sequence

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        tokens = torch.arange(self.sequence + 1).expand(4, -1)
        yield {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def build(config: Any, whole: Weights, strategy: dict[str, Any], *, fit: bool = False) -> Any:
    """A module on this rank with these weights, after a validation, or after a training step undone."""
    module = lm.GPTModule(config) if isinstance(config, lm.GPTConfig) else T5Module(config)
    trainer = quiet_trainer(
        lm.MegatronStrategy(**strategy), int(os.environ["WORLD_SIZE"]), max_steps=1, limit_train_batches=1
    )
    if fit:
        trainer.fit(module, Loader())
        module.train()
    else:
        trainer.validate(module, Loader(), verbose=False)
    load(module, whole)
    return module
