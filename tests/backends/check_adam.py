"""FusedAdam's kernel against torch's AdamW. Run by tests, in a process of its own:

on CPU tensors with ``TRITON_INTERPRET=1``, where triton runs its kernels in Python, or with ``KERNEL_DEVICE=cuda``.
"""

import copy
import os

import torch

from lightning_megatron.backends import gpu_adam_kernel
from lightning_megatron.backends.fused_adam import FusedAdam
from lightning_megatron.backends.kernels import clip_grad_by_total_norm_fp32

DEVICE = os.environ.get("KERNEL_DEVICE", "cpu")
SHAPES = ((3, 5), (4096,), (2, 4099), (1,))


def make(seed, *, unaligned=False):
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in SHAPES:
        values = torch.randn(shape, generator=generator)
        storage = torch.empty(values.numel() + 1, device=DEVICE)[int(unaligned) :][
            : values.numel()
        ]  # one float off 16 bytes
        params.append(torch.nn.Parameter(storage.view(shape).copy_(values)))
    return params


def groups(params):
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0, "lr": 0.05}]


def check(*, adam_w_mode, model_dtype, unaligned, scale=None, clip=True):
    assert gpu_adam_kernel.INTERPRETED or DEVICE == "cuda"
    expected, actual = make(0), make(0, unaligned=unaligned)
    reference_class = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    reference = reference_class(groups(expected), lr=0.01, betas=(0.9, 0.95), eps=1e-6)
    optimizer = FusedAdam(groups(actual), lr=0.01, betas=(0.9, 0.95), eps=1e-6, adam_w_mode=adam_w_mode)
    models = [torch.zeros_like(p, dtype=model_dtype) for p in actual] if model_dtype else []
    for step in range(4):
        if step == 1 and models:
            assert not optimizer.wrote_model_params
            optimizer.set_model_params(zip(actual, models, strict=True))
        if step == 3:  # a checkpoint in the middle, from torch's own state
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        for p, q, g in zip(expected, actual, make(step + 1), strict=True):
            p.grad, q.grad = g.detach().clone(), g.detach() / (scale or 1.0)
        if scale:
            optimizer.scale_gradients(torch.tensor(7.0, device=DEVICE))  # of a step that was then skipped
            optimizer.scale_gradients(torch.tensor(scale, device=DEVICE))
        unclipped = actual[0].grad.clone()
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(expected, 1.0)
            clip_grad_by_total_norm_fp32(actual, 1.0, norm.reshape(1) / (scale or 1.0))
        # From the second step on, the kernel clips.
        assert torch.equal(actual[0].grad, unclipped) == (step > 0 or not clip)
        reference.step()
        optimizer.step()
        for p, q in zip(expected, actual, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            for name in ("exp_avg", "exp_avg_sq", "step"):
                torch.testing.assert_close(reference.state[p][name], optimizer.state[q][name], rtol=1e-5, atol=1e-7)
    for p, m in zip(actual, models, strict=False):
        assert optimizer.wrote_model_params
        if DEVICE == "cuda":
            assert torch.equal(p.to(model_dtype), m)
        # The interpreter truncates to bfloat16 where the device rounds: one unit in the last place.
        torch.testing.assert_close(p, m.float(), rtol=2**-7, atol=0)
    part = actual[:1]  # may have a norm of its own
    before = part[0].grad.clone()
    clip_grad_by_total_norm_fp32(part, 1.0, torch.full((1,), 2.0, device=DEVICE))
    torch.testing.assert_close(part[0].grad, before / 2)


for adam_w_mode in (True, False):
    check(adam_w_mode=adam_w_mode, model_dtype=None, unaligned=False)
for model_dtype in (torch.bfloat16, torch.float16):
    check(adam_w_mode=True, model_dtype=model_dtype, unaligned=False)
check(adam_w_mode=True, model_dtype=torch.bfloat16, unaligned=True)
for clip in (True, False):
    check(adam_w_mode=True, model_dtype=torch.bfloat16, unaligned=False, scale=2**-12, clip=clip)
print("ok")
