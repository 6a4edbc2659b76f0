"""Stand-ins for Apex in plain torch, which count their calls, and fits with and without them.

Run as a script with a directory made by :func:`write` on ``PYTHONPATH``, so that megatron-core imports them as it would
import Apex; prints what :func:`compare` found as JSON.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

_WEIGHT_GRADIENTS = """
calls = 0

def wgrad_gemm_accum_fp32(inputs, grad_outputs, main_grad):
    global calls
    calls += 1
    main_grad += grad_outputs.t().float() @ inputs.float()

wgrad_gemm_accum_fp16 = None
"""
_NORM = """
import torch

calls = 0

class FusedLayerNormAffineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shape, eps, memory_efficient=False):
        global calls
        calls += 1
        ctx.save_for_backward(x, weight, bias)
        ctx.shape, ctx.eps = shape, eps
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            y = torch.nn.functional.layer_norm(leaves[0], ctx.shape, leaves[1], leaves[2], ctx.eps)
        return *torch.autograd.grad(y, leaves, dy), None, None, None
"""


def write(directory: Path) -> None:
    """Lay down what an installation of Apex has, as far as this package uses it."""
    normalization = directory / "apex" / "normalization"
    normalization.mkdir(parents=True)
    (directory / "apex" / "__init__.py").touch()
    (normalization / "__init__.py").touch()
    (normalization / "fused_layer_norm.py").write_text(_NORM)
    (directory / "fused_weight_gradient_mlp_cuda.py").write_text(_WEIGHT_GRADIENTS)


def compare() -> dict[str, Any]:
    """Fits of small models with torch's operations and with the stand-ins: the largest difference, and their calls."""

    import lightning_megatron as lm
    from lightning_megatron.backends import extensions
    from tests.helpers import tiny_config
    from tests.models.test_bert import batch as bert_batch
    from tests.models.test_bert import make as make_bert
    from tests.models.test_gpt import tokens

    models = {
        "tied": (partial(lm.GPTModule, tiny_config(num_layers=2)), tokens()),
        "untied": (
            partial(lm.GPTModule, tiny_config(num_layers=1, share_embeddings_and_output_weights=False)),
            tokens(),
        ),
        # Experts run unfused also where fused layers are asked for.
        "experts": (partial(_fused, tiny_config(num_layers=2, num_moe_experts=4, add_bias_linear=False)), tokens()),
        # The gradient of a bias of keys is rounding alone, of which Adam makes steps: so none here.
        "post_layernorm": (partial(make_bert, post_layernorm=True, add_bias_linear=False), bert_batch()),
    }
    found: dict[str, Any] = {"report": [[k.part, k.choice, k.why] for k in lm.backends.report()]}
    for name, (make, batch) in models.items():
        with_torch, calls = _fit(make, batch)
        assert calls == [0, 0], calls
        extensions.DEVICE_TYPES = ("cuda", "cpu")
        with_stand_ins, calls = _fit(make, batch)
        extensions.DEVICE_TYPES = ("cuda",)
        pairs = zip(with_torch.values(), with_stand_ins.values(), strict=True)
        differences = [float(((a - b).abs() / (1 + a.abs())).max()) for a, b in pairs]
        found[name] = {
            "tensors": len(with_torch),
            "same_names": list(with_torch) == list(with_stand_ins),
            "difference": max(differences),
            "weight_gradients": calls[0],
            "norms": calls[1],
        }
    return found


def _fused(config: Any) -> Any:
    import lightning_megatron as lm

    module = lm.GPTModule(config)
    module.fused = True
    return module


def _fit(make: Any, batch: Any) -> tuple[dict[str, Any], list[int]]:
    """Losses, gradient norms and weights after three steps of two micro-batches, and the stand-ins' calls."""
    import fused_weight_gradient_mlp_cuda as gradients
    import torch
    from apex.normalization import fused_layer_norm as norm

    from tests.helpers import Record, quiet_trainer
    from tests.models.runs import Shared, strategy

    gradients.calls = norm.calls = 0
    module, record = make(), Record()
    trainer = quiet_trainer(strategy(mbs=2), 1, max_steps=3, max_epochs=1, callbacks=[record])
    trainer.fit(module, Shared(module, batch, 3))
    weights = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
    return {"losses": torch.tensor(record.losses), "norms": torch.tensor(record.norms), **weights}, [
        gradients.calls,
        norm.calls,
    ]


if __name__ == "__main__":
    json.dump(compare(), sys.stdout)
