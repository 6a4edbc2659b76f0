"""What the package is measured against on several GPUs: a plain torch GPT as torchtitan parallelises it.

    torchrun --nproc-per-node 2 -m benchmarks.multi_gpu_peers
    torchrun --nproc-per-node 2 -m benchmarks.multi_gpu_peers --models llama-1b --ways tp async-tp

"tp" is tensor and sequence parallelism by DTensor under torch.compile, "async-tp" the same with torch's asynchronous
tensor parallelism, "fsdp" data parallelism by FSDP2 under torch.compile. Weights are float32 and are cast to bf16 by
FSDP2's mixed precision, over one rank where there is only tensor parallelism, as torchtitan has it. Batches, models
and timing are those of :mod:`benchmarks.multi_gpu`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.workloads import WORKLOADS
from lightning_megatron.models.config import GPTConfig

WAYS = ("tp", "async-tp", "fsdp")
MICRO_BATCHES = {"gpt2-large": 8, "llama-1b": 2, "llama-7b-slice": 1, "tiny-gpt2": 2, "tiny-llama": 2}
"""Of one GPU; tensor parallelism gets twice as much, so that a GPU has as many tokens."""
WARM_UP, TIMED = 5, 8


class Block(nn.Module):
    """A layer of a GPT-2 or a Llama."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.add_bias_linear
        self.width, self.gated, self.rotary = (
            config.head_size,
            config.gated_linear_unit,
            config.position_embedding_type == "rope",
        )
        self.queries = config.num_attention_heads // (config.num_query_groups or config.num_attention_heads)
        groups = config.num_query_groups or config.num_attention_heads
        norm = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        self.norm1, self.norm2 = norm(hidden), norm(hidden)
        self.qkv = nn.Linear(hidden, groups * (self.queries + 2) * self.width, bias=bias)
        self.proj = nn.Linear(hidden, hidden, bias=bias)
        self.fc1 = nn.Linear(hidden, config.ffn_size * (2 if self.gated else 1), bias=bias)
        self.fc2 = nn.Linear(config.ffn_size, hidden, bias=bias)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """``[batch, sequence, hidden]``, or this rank's part of the sequence between the linears."""
        mixed = self.qkv(self.norm1(x))
        batch, sequence = mixed.shape[:2]
        mixed = mixed.view(batch, sequence, -1, self.queries + 2, self.width)
        q, k, v = mixed.split((self.queries, 1, 1), dim=3)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        if self.rotary:
            q, k = turn(q, angles), turn(k, angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.queries > 1)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        inner = self.fc1(self.norm2(x))
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            return x + self.fc2(F.silu(gate) * up)
        return x + self.fc2(F.gelu(inner, approximate="tanh"))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of ``[batch, heads, sequence, width]``."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Model(nn.Module):
    """A GPT-2 or a Llama in plain torch."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        vocabulary, self.tied = config.padded_vocab_size(2), config.share_embeddings_and_output_weights
        self.learned = config.position_embedding_type == "learned_absolute"
        self.tokens = nn.Embedding(vocabulary, config.hidden_size)
        if self.learned:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm: nn.Module = type(self.blocks[0].norm1)(config.hidden_size)  # type: ignore[assignment]
        self.output = nn.Linear(config.hidden_size, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.tie()
        frequency = 10000.0 ** (-torch.arange(0, config.head_size, 2) / config.head_size)
        self.register_buffer("angles", torch.outer(torch.arange(config.max_position_embeddings), frequency))

    def tie(self) -> None:
        """Let the output be the embedding, which a distribution of both undoes."""
        if self.tied:
            self.output.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.tokens(tokens)
        if self.learned:
            x = x + self.positions(torch.arange(tokens.size(1), device=tokens.device)[None])
        for block in self.blocks:
            x = block(x, self.angles)
        logits: Tensor = self.output(self.norm(x))
        return logits


def distribute(model: Model, mesh: DeviceMesh) -> None:
    """Tensor and sequence parallelism, as torchtitan's plans have it."""
    sharded = Shard(1)
    plan: dict[str, object] = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=sharded),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=sharded, output_layouts=Shard(-1), use_local_output=False),
    }
    if model.learned:
        plan["positions"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=sharded)
    parallelize_module(model, mesh, plan)  # type: ignore[arg-type]
    model.tie()
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "norm1": SequenceParallel(),
                "norm2": SequenceParallel(),
                "qkv": ColwiseParallel(input_layouts=sharded),
                "proj": RowwiseParallel(output_layouts=sharded),
                "fc1": ColwiseParallel(input_layouts=sharded),
                "fc2": RowwiseParallel(output_layouts=sharded),
            },
        )


def step_of(model: Model, way: str, mesh: DeviceMesh) -> Callable[[Tensor, Tensor], Tensor]:
    """One optimizer step: AdamW with float32 states, clipping at 1.0."""
    vocabulary_split = way != "fsdp"
    if vocabulary_split:
        distribute(model, mesh["tp"])
    if way == "async-tp":
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        torch._inductor.config._micro_pipeline_tp = True
        enable_symm_mem_for_group(mesh["tp"].get_group().group_name)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_of = torch.compile(lambda logits, labels: F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()))

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(tokens)
        if vocabulary_split:
            with loss_parallel():
                loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
                del logits
                loss.backward()
        else:
            loss = loss_of(logits, labels)
            del logits
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(name: str, way: str, ranks: int) -> dict[str, object]:
    """Milliseconds a step and tokens per second and GPU."""
    workload = WORKLOADS[name]()
    assert isinstance(workload.config, GPTConfig)
    torch.manual_seed(0)
    tensor = 1 if way == "fsdp" else ranks
    mesh = init_device_mesh("cuda", (ranks // tensor, tensor), mesh_dim_names=("dp", "tp"))
    with torch.device("cuda"):
        model = Model(workload.config)
    step = step_of(model, way, mesh)
    generator = torch.Generator().manual_seed(dist.get_rank() if way == "fsdp" else 0)
    samples = MICRO_BATCHES[name] * tensor
    batch = {key: value.cuda() for key, value in workload.batch(samples, generator).items()}
    torch.cuda.reset_peak_memory_stats()
    moments = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + TIMED + 1)]
    losses = []
    for moment in moments:
        moment.record()
        losses.append(step(batch["tokens"], batch["labels"]))
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(moments[WARM_UP:], moments[WARM_UP + 1 :], strict=False)]
    first, last = (float(getattr(loss, "full_tensor", lambda loss=loss: loss)()) for loss in (losses[0], losses[-1]))
    return {
        "model": name,
        "way": way,
        "ms": round(median(times), 2),
        "fastest_ms": round(min(times), 2),
        "slowest_ms": round(max(times), 2),
        "tokens_per_s_per_gpu": round(MICRO_BATCHES[name] * workload.tokens_per_sample / median(times) * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [round(first, 4), round(last, 4)],
    }


def main() -> None:
    """Measure each way with each model in turn, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2-large"], choices=tuple(MICRO_BATCHES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    for name in options.models:
        for way in options.ways:
            try:
                found = measure(name, way, dist.get_world_size())
            except Exception as error:  # one way that torch cannot run here must not hide the others
                found = {"model": name, "way": way, "error": f"{type(error).__name__}: {error}"[:600]}
            if dist.get_rank() == 0:
                print(json.dumps(found), flush=True)
            torch._dynamo.reset()
            torch._inductor.config._micro_pipeline_tp = False
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
