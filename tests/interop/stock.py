"""megatron-core's own models, saving and loading by themselves; runs on ranks."""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_megatron.backends import core, rng


def _groups(tensor: int, pipeline: int) -> None:
    dist.init_process_group("gloo")
    core.use_device(torch.device("cpu"))
    core.parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    rng.seed(1 + int(os.environ["RANK"]), 0)


def build(kind: str, args: Any, tensor: int, pipeline: int) -> Any:
    """A stock model of the sizes in Megatron-LM's arguments."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.models.T5.t5_spec import (
        get_t5_decoder_with_local_block_spec,
        get_t5_encoder_with_local_block_spec,
    )
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    _groups(tensor, pipeline)
    state = core.parallel_state
    config = core.TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        ffn_hidden_size=args.ffn_hidden_size,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu or kind == "t5_gated",
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_bias_linear or args.add_qkv_bias,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
    )
    stages = {
        "pre_process": state.is_pipeline_first_stage(),
        "post_process": state.is_pipeline_last_stage(),
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
    }
    if kind == "gpt":
        spec = core.get_gpt_layer_local_spec(normalization=args.normalization)
        positions = {"position_embedding_type": args.position_embedding_type, "rotary_base": args.rotary_base}
        sizes = (args.padded_vocab_size, args.max_position_embeddings)
        return core.GPTModel(config, spec, *sizes, **positions, **stages).eval()
    if kind == "bert":
        return BertModel(
            config,
            args.bert_binary_head * 2,
            bert_layer_local_spec,
            args.padded_vocab_size,
            args.max_position_embeddings,
            add_binary_head=args.bert_binary_head,
            **stages,
        ).eval()
    encoder = get_t5_encoder_with_local_block_spec(args.num_layers)
    decoder = get_t5_decoder_with_local_block_spec(args.decoder_num_layers)
    encoder.layer_norm = decoder.layer_norm = WrappedTorchNorm  # which is nothing without TransformerEngine
    return T5Model(
        config,
        config,
        encoder,
        decoder,
        args.padded_vocab_size,
        args.max_position_embeddings,
        position_embedding_type="relative",
        relative_attention_num_buckets=args.relative_attention_num_buckets,
        relative_attention_max_distance=args.relative_attention_max_distance,
        **stages,
    ).eval()


def load(kind: str, args: Any, directory: str, tensor: int, pipeline: int) -> dict[str, torch.Tensor]:
    """Load a ``torch_dist`` directory as Megatron-LM does; what this rank then holds."""
    model = build(kind, args, tensor, pipeline)
    loaded = core.dist_checkpointing.load({"model": model.sharded_state_dict()}, directory)
    model.load_state_dict(loaded["model"])
    return {name: tensor for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}


def save(kind: str, args: Any, directory: str, tensor: int, pipeline: int) -> Any:
    """Save a model of random weights as Megatron-LM does; logits of a GPT on one stage, or ``None``."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # else a process is spawned, which imports everything
    model = build(kind, args, tensor, pipeline)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.arange(parameter.numel()) * 0.001
    Path(directory).mkdir(parents=True, exist_ok=True)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
    core.dist_checkpointing.save({"model": model.sharded_state_dict(), **common}, directory)
    if kind != "gpt" or pipeline > 1:
        return None
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(tokens, tokens, None)
    return core.tensor_parallel.gather_from_tensor_model_parallel_region(logits)
