"""What the package is measured against on one GPU: a plain compiled GPT, and Hugging Face's under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import Batch, Workload
from lightning_megatron.models.config import GPTConfig

Step = Callable[..., Tensor]
"""One optimizer step on a batch's tensors by name; returns the loss, still on the device."""


class _Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, config.ffn_size), nn.Linear(config.ffn_size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, sequence, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, sequence, hidden)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Nano(nn.Module):
    """A GPT-2 as one writes it in plain torch."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.padded_vocab_size(1), config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _trainer(model: nn.Module, loss_of: Callable[..., Tensor]) -> Step:
    """bf16 autocast over fp32 weights, fused AdamW, clip 1.0: float32 master weights, as the package has."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(**batch: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(**batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def nano(workload: Workload) -> Callable[[Batch], Tensor]:
    """The plain GPT under torch.compile."""
    assert isinstance(workload.config, GPTConfig)
    model = Nano(workload.config).cuda()
    step = _trainer(model, torch.compile(model, dynamic=False))
    return lambda batch: step(**batch)


def huggingface(workload: Workload) -> Callable[[Batch], Tensor]:
    """The workload's model of ``transformers`` with SDPA, under torch.compile."""
    model = workload.hugging_face().cuda()
    compiled: Any = torch.compile(model, dynamic=False)
    step = _trainer(model, lambda **batch: compiled(**batch).loss)
    return lambda batch: step(**workload.hugging_face_batch(batch))
