"""The attributes of megatron-core that freezing during a fit relies on."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from lightning_megatron.backends import core


@pytest.mark.parametrize(
    "name",
    [
        "param_to_bucket",
        "params",
        "grad_reduce_handle",
        "is_last_microbatch",
        "is_first_batch",
        "golden_per_param_grad_ready_counts",
        "per_param_grad_ready_counts",
    ],
)
def test_bucket_groups_have_these_attributes(name: str) -> None:
    module = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    assert f"self.{name} = " in inspect.getsource(module._ParamAndGradBucketGroup.__init__)


def test_the_forward_hook_asserts_what_is_worked_around() -> None:
    source = inspect.getsource(core.DistributedDataParallel._make_forward_pre_hook)
    assert "assert param.requires_grad" in source


def test_a_bias_beside_a_frozen_weight_gets_its_gradient() -> None:
    """megatron-core's own function returns none, so it is replaced."""
    weight, bias = torch.randn(4, 3), torch.zeros(4, requires_grad=True)
    x = torch.randn(2, 1, 3, requires_grad=True)
    out = core.tensor_parallel.layers.linear_with_frozen_weight(x, weight, bias, False, False, False, None)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias))
    out.sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [2.0] * 4
