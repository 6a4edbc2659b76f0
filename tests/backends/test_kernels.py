"""The multi-tensor kernels against megatron-core's own functions, and the names that they replace."""

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_megatron.backends import core, cpu, kernels
from lightning_megatron.backends.fused_adam import FusedAdam

clip_grads = pytest.importorskip("megatron.core.optimizer.clip_grads")


@pytest.fixture(autouse=True)
def megatron_cores_own():
    """Each test starts without the kernels, which importing `backends.core` has installed."""
    kernels.uninstall()
    yield
    kernels.uninstall()
    kernels.install()


@pytest.fixture
def process_group(tmp_path):
    """One gloo rank: the norm is reduced over a group."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    if made:
        dist.destroy_process_group()


@pytest.fixture
def installed():
    kernels.install()
    yield
    kernels.uninstall()


def parameters(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,), (1,), (4, 2, 3))]
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator)
    return params


@pytest.mark.parametrize("norm_type", [1, 2, 3.5, float("inf")])
def test_norm_equals_megatron_core(process_group, norm_type):
    grads = [p.grad for p in parameters()]
    expected = clip_grads.get_grad_norm_fp32(grads, norm_type, process_group)
    actual = kernels.get_grad_norm_fp32(grads, norm_type, process_group)
    assert isinstance(actual, torch.Tensor)
    assert actual.shape == (1,)
    torch.testing.assert_close(actual, torch.tensor([float(expected)]), rtol=1e-6, atol=0)


def test_norm_of_no_gradients_is_zero(process_group):
    assert kernels.get_grad_norm_fp32([], 2, process_group).item() == 0.0


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_clipping_equals_megatron_core(scale, as_tensor):
    expected, actual = parameters(scale=scale), parameters(scale=scale)
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in expected])).item()
    with cpu.cuda_type_names():  # upstream asserts the type's name
        clip_grads.clip_grad_by_total_norm_fp32(expected, 1.0, norm)
    kernels.clip_grad_by_total_norm_fp32(actual, 1.0, torch.tensor([norm]) if as_tensor else norm)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


def test_clipping_takes_bfloat16_and_refuses_float16():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    kernels.clip_grad_by_total_norm_fp32([p], 1.0, 2.0)
    assert p.grad.tolist() == [0.5, 0.5]
    q = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    q.grad = torch.ones_like(q)
    with pytest.raises(TypeError, match="bfloat16"):
        kernels.clip_grad_by_total_norm_fp32([q], 1.0, 1.0)


def test_copy_casts():
    this, that = [torch.randn(5), torch.randn(2, 3)], [torch.empty(5).bfloat16(), torch.empty(2, 3).bfloat16()]
    kernels.multi_tensor_copy(this, that)
    for a, b in zip(this, that, strict=True):
        assert torch.equal(a.bfloat16(), b)
    kernels.multi_tensor_copy([], [])


def test_every_replaced_name_exists_with_the_same_arguments():
    """Fails when an upgrade of megatron-core moves or changes what `install` replaces."""
    assert not kernels.installed()
    for replacement in kernels.REPLACEMENTS:
        original = getattr(kernels._owner(replacement), replacement.name)
        if inspect.isfunction(original):
            arguments = list(inspect.signature(original).parameters)
            assert arguments == list(inspect.signature(replacement.value(original)).parameters), replacement


def test_no_other_module_holds_a_replaced_function():
    """A module that imports one of them by name needs an entry of its own (not FSDP and mimo, which we never use)."""
    names = {r.name for r in kernels.REPLACEMENTS if r.owner is None and inspect.isfunction(r.value(None))}
    replaced = {(r.module, r.name) for r in kernels.REPLACEMENTS}
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core.") and ".mimo" not in name and ".fsdp." not in name:
            held = {(name, n) for n in names if n in vars(module)}
            assert held <= replaced


def test_install_is_idempotent_and_uninstall_restores():
    before = [getattr(kernels._owner(r), r.name) for r in kernels.REPLACEMENTS]
    kernels.install()
    kernels.install()
    assert clip_grads.get_grad_norm_fp32 is kernels.get_grad_norm_fp32
    kernels.uninstall()
    assert [getattr(kernels._owner(r), r.name) for r in kernels.REPLACEMENTS] == before
    assert not kernels.installed()


class Chunk(core.CoreModule):
    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(6, 5)
        self.second = torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def train(bf16, distributed, with_kernels, steps=4):
    """Weights, norms and optimizer state after a few steps of a small network in megatron-core's DDP and optimizer."""
    (kernels.install if with_kernels else kernels.uninstall)()
    try:
        config = core.TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=bf16)
        torch.manual_seed(3)
        module = Chunk(config).bfloat16() if bf16 else Chunk(config)
        ddp_config = core.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=False
        )
        chunk = core.DistributedDataParallel(config, ddp_config, module)
        with cpu.cuda_type_names():
            optimizer = core.get_megatron_optimizer(
                core.CoreOptimizerConfig(
                    optimizer="adam",
                    lr=0.05,
                    weight_decay=0.1,
                    clip_grad=0.5,
                    bf16=bf16,
                    use_distributed_optimizer=distributed,
                    params_dtype=torch.bfloat16 if bf16 else torch.float32,
                ),
                [chunk],
                use_gloo_process_groups=False,
            )
        norms = []
        for step in range(steps):
            chunk.zero_grad_buffer()
            optimizer.zero_grad()
            x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
            chunk(x.bfloat16() if bf16 else x).float().square().sum().backward()
            chunk.finish_grad_sync()
            with cpu.cuda_type_names():  # upstream's own functions assert the type's name
                success, norm, _ = optimizer.step()
            assert success
            norms.append(float(norm))
        inner = optimizer.chained_optimizers[0].optimizer
        assert isinstance(inner, FusedAdam) == with_kernels
        return [p.detach().float().clone() for p in module.parameters()], norms, copy.deepcopy(inner.state_dict())
    finally:
        kernels.uninstall()


@pytest.fixture
def parallel(process_group):
    core.use_device(torch.device("cpu"))
    core.parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    core.initialize_rng_tracker(force_reset=True)
    core.model_parallel_cuda_manual_seed(1)
    yield
    core.parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_optimizer_steps_equal_megatron_core(parallel, bf16, distributed):
    weights, norms, state = train(bf16, distributed, with_kernels=True)
    expected_weights, expected_norms, expected_state = train(bf16, distributed, with_kernels=False)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    for a, b in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for index, values in expected_state["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(state["state"][index][name], value, rtol=1e-5, atol=1e-7)


def test_adam_with_l2_equals_torch():
    expected, actual = parameters(), parameters()
    reference = torch.optim.Adam(expected, lr=0.01, weight_decay=0.2)
    optimizer = FusedAdam(actual, lr=0.01, weight_decay=0.2, adam_w_mode=False)
    for _ in range(3):
        reference.step()
        optimizer.step()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_adam_kernel_in_triton_interpreter():
    """The kernel's values without a GPU: triton runs it in Python, in a process of its own."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "check_adam.py"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
