"""What of TransformerEngine and Apex runs, and why not. Neither can be installed here: stand-ins take their place."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_megatron.backends import core, extensions, inventory, kernels
from lightning_megatron.backends.extensions import (
    APEX_NORM,
    APEX_WEIGHT_GRADIENTS,
    EXTENSIONS,
    TRANSFORMER_ENGINE_NORMS,
    Extension,
    unavailable,
)
from lightning_megatron.generation.layers import _NORMS
from lightning_megatron.models import norms, specs
from lightning_megatron.models.specs import bert_block_spec, gpt_block_spec, t5_layer_submodules
from tests.backends import stand_ins

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Each test asks as the first of its process."""
    extensions._defect.cache_clear()
    yield
    extensions._defect.cache_clear()
    extensions._broken.clear()


def install(monkeypatch: Any, extension: Extension, *, taken_up: bool = True) -> ModuleType:
    """Put a module into ``sys.modules`` that has the names of an extension, and tell megatron-core."""
    path = extension.module.split(".")
    for end in range(1, len(path) + 1):
        module = ModuleType(".".join(path[:end]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in extension.names:
        setattr(module, name, object())
    where, flag = extension.taken_up
    monkeypatch.setattr(importlib.import_module(where), flag, taken_up)
    return module


def run(code: list[str], *directories: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (*directories, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, timeout=180, check=False, env=environment
    )


# ---------------------------------------------------------------------------------------------------------- what runs


@pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda e: f"{e.package} {e.part}")
def test_an_extension_runs_on_cuda_where_it_is_installed(monkeypatch: Any, extension: Extension) -> None:
    assert unavailable(extension, "cuda") == unavailable(extension, "cpu") == "not installed"
    install(monkeypatch, extension)
    assert unavailable(extension, "cuda") is None
    assert unavailable(extension, "cpu") == "there is no GPU"


def test_an_extension_that_megatron_core_has_not_taken_up_does_not_run(monkeypatch: Any, caplog: Any) -> None:
    install(monkeypatch, APEX_NORM, taken_up=False)
    for _ in range(2):
        assert "megatron.core.fusions.fused_layer_norm could not" in str(unavailable(APEX_NORM, "cuda"))
    assert len(caplog.records) == 1


def test_an_extension_of_another_version_does_not_run(monkeypatch: Any) -> None:
    del install(monkeypatch, APEX_WEIGHT_GRADIENTS).wgrad_gemm_accum_fp16
    assert "has no wgrad_gemm_accum_fp16" in str(unavailable(APEX_WEIGHT_GRADIENTS, "cuda"))


def test_another_package_named_apex_is_not_imported(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert extensions.another_apex()
    for device_type in ("cpu", "cuda"):
        assert unavailable(APEX_NORM, device_type) == "another package named apex is installed, not NVIDIA's"


def test_a_broken_build_is_told_once_and_not_used(monkeypatch: Any, tmp_path: Path, caplog: Any) -> None:
    stand_ins.write(tmp_path)
    (tmp_path / "apex" / "normalization" / "fused_layer_norm.py").write_text("raise OSError('libcudart.so.9')")
    monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert unavailable(APEX_NORM, "cuda") == "broken: OSError: libcudart.so.9"
    assert [record.getMessage() for record in caplog.records] == [
        "Apex's LayerNorm not used: broken: OSError: libcudart.so.9"
    ]
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.mark.slow
def test_a_broken_build_does_not_break_megatron_core(tmp_path: Path) -> None:
    """megatron-core catches an ImportError alone."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libtransformer_engine.so')")
    code = "from lightning_megatron import backends\n"
    code += "print([(k.choice, k.why) for k in backends.report() if k.part == 'TransformerEngine'])"
    result = run(["-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[('not used', 'broken: OSError: libtransformer_engine.so')]"
    assert result.stderr.count("transformer_engine is installed, but is not used") == 1


def test_megatron_core_has_the_names_that_are_used() -> None:
    """Fails when an upgrade moves one."""
    for extension in EXTENSIONS:
        where, flag = extension.taken_up
        module = importlib.import_module(where)
        assert getattr(module, flag) is False, extension
        # The same names are asked for there; TransformerEngine's norms are attributes of the package's.
        package = "te.pytorch" if extension is TRANSFORMER_ENGINE_NORMS else extension.names[0]
        assert package in inspect.getsource(module), extension
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    for name in APEX_WEIGHT_GRADIENTS.names:
        assert f"fused_weight_gradient_mlp_cuda.{name}(" in inspect.getsource(layers)
    assert "gradient_accumulation_fusion" in inspect.signature(core.TransformerConfig).parameters
    for norm in (core.TENorm.__new__, core.FusedLayerNorm.__init__):
        assert list(inspect.signature(norm).parameters)[1:4] == ["config", "hidden_size", "eps"]
    optimizer = importlib.import_module("megatron.core.optimizer")
    assert optimizer.SGD is torch.optim.SGD


# --------------------------------------------------------------------------------------------------------------- fits


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a process in which megatron-core has imported the stand-ins by itself."""
    directory = tmp_path_factory.mktemp("apex")
    stand_ins.write(directory)
    result = run([str(Path(stand_ins.__file__))], directory)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("model", "linears", "norms"),
    [
        ("tied", 2 * 4 + 1, 2 * 2 + 1),  # of layers, and one after the last
        ("untied", 4 + 1, 2 + 1),
        ("experts", 2 * (2 + 2 * 4), 2 * 2 + 1),  # the vocabulary's loss is fused
        ("post_layernorm", 4 * 4 + 1, 4 * 2),
    ],
)
@pytest.mark.slow
def test_a_fit_with_apex_is_the_fit_without(compared: dict[str, Any], model: str, linears: int, norms: int) -> None:
    found = compared[model]
    micro_batches = 3 * 2
    assert found["weight_gradients"] == linears * micro_batches
    assert found["norms"] == norms * micro_batches
    assert found["same_names"]
    assert found["tensors"] > linears
    assert found["difference"] < 1e-6


@pytest.mark.slow
def test_nothing_of_apex_runs_on_a_cpu(compared: dict[str, Any]) -> None:
    """That nothing was called there is checked in the fits without."""
    assert ["Apex", "not used", "there is no GPU"] in compared["report"]


# -------------------------------------------------------------------------------------------------------------- norms


class RecordingNorm(torch.nn.Module):
    """As TransformerEngine's: none of torch's norms, with a state of FP8, and an output that is a view."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.given = (config.normalization, hidden_size, eps)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0)

    def set_extra_state(self, state: Any) -> None: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return normed.flatten().view(x.shape)


def config(**changes: Any) -> Any:
    fields = {"normalization": "LayerNorm", "use_cpu_initialization": False, "params_dtype": torch.bfloat16}
    return SimpleNamespace(**{**fields, "sequence_parallel": True, **changes})


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_transformer_engines_norm(monkeypatch: Any, normalization: str) -> None:
    for extension in EXTENSIONS:
        install(monkeypatch, extension)
    monkeypatch.setattr(norms, "TENorm", RecordingNorm)
    norm: Any = norms.UnfusedNorm(config(normalization=normalization), 8, 1e-6)
    assert norm.given == (normalization, 8, 1e-6)
    assert isinstance(norm, _NORMS)  # or decoding refuses the layer
    assert all(p.sequence_parallel and p.dtype == torch.bfloat16 for p in norm.parameters())

    reference = torch.nn.LayerNorm(8, eps=1e-6, dtype=torch.bfloat16)
    assert list(norm.state_dict()) == ["weight", "bias"]
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in norm.state_dict().items())
    assert norm.load_state_dict(reference.state_dict(), strict=True).missing_keys == []
    x = torch.randn(3, 2, 8, dtype=torch.bfloat16)
    assert torch.equal(norm(x), reference(x))
    assert norm(x)._base is None
    assert norm(x).requires_grad


def test_which_norm_is_built(monkeypatch: Any) -> None:
    monkeypatch.setattr(norms, "TENorm", lambda *_: RecordingNorm(config(), 8, 1e-6))
    monkeypatch.setattr(norms, "FusedLayerNorm", RecordingNorm)

    def built(**changes: Any) -> type:
        norm = norms.UnfusedNorm(config(**changes), 8)
        return type(norm) if not isinstance(norm, norms.ExtensionNorm) else norms.ExtensionNorm

    assert built() is torch.nn.LayerNorm
    install(monkeypatch, APEX_NORM)
    assert built() is norms.ExtensionNorm
    assert built(use_cpu_initialization=True) is torch.nn.LayerNorm
    assert built(normalization="RMSNorm") is torch.nn.RMSNorm
    install(monkeypatch, TRANSFORMER_ENGINE_NORMS)
    assert built(normalization="RMSNorm") is norms.ExtensionNorm


def test_fused_blocks_read_torchs_norms(monkeypatch: Any) -> None:
    monkeypatch.setattr(specs, "get_num_layers_to_build", lambda *_: 1)  # which asks for process groups
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "use_cpu_initialization": True}
    dense = core.TransformerConfig(**sizes)
    experts = core.TransformerConfig(**sizes, num_moe_experts=2, moe_ffn_hidden_size=8, add_bias_linear=False)

    def norms_of(spec: Any) -> set[Any]:
        (layer,) = spec.layer_specs
        return {layer.submodules.input_layernorm, layer.submodules.pre_mlp_layernorm, spec.layer_norm}

    for build in (gpt_block_spec, bert_block_spec):
        assert norms_of(build(dense, 0, fused=True)) == {norms.TorchNorm}
        assert norms_of(build(dense, 0, fused=False)) == {norms.UnfusedNorm}
    assert norms_of(gpt_block_spec(experts, 0, fused=True)) == {norms.UnfusedNorm}
    decoder = t5_layer_submodules(norms.TorchNorm, decoder=True)
    assert decoder.pre_cross_attn_layernorm is norms.TorchNorm


# ------------------------------------------------------------------------------------------------------------- report


def lines(cuda: bool) -> dict[str, tuple[str, str]]:
    kernels = (inventory._extension(package, cuda) for package in ("TransformerEngine", "Apex"))
    return {kernel.part: (kernel.choice, kernel.why) for kernel in kernels}


def test_the_report_says_which_parts_run(monkeypatch: Any) -> None:
    assert lines(cuda=True) == dict.fromkeys(("TransformerEngine", "Apex"), ("not used", "not installed"))
    install(monkeypatch, APEX_NORM)
    assert lines(cuda=False)["Apex"] == ("not used", "LayerNorm: there is no GPU; weight gradients: not installed")
    choice, why = lines(cuda=True)["Apex"]
    assert (choice, why) == ("LayerNorm of layers that run unfused", "weight gradients: not installed")
    install(monkeypatch, APEX_WEIGHT_GRADIENTS)
    choice, why = lines(cuda=True)["Apex"]
    assert choice == "LayerNorm and weight gradients of layers that run unfused"
    assert "own kernels" in why
    install(monkeypatch, TRANSFORMER_ENGINE_NORMS)
    assert lines(cuda=True)["TransformerEngine"][0] == "LayerNorm and RMSNorm of layers that run unfused"
    assert lines(cuda=True)["Apex"] == (
        "weight gradients of layers that run unfused",
        "LayerNorm: TransformerEngine's runs instead",
    )


def test_the_report_says_whose_sgd_runs(monkeypatch: Any) -> None:
    optimizer = importlib.import_module("megatron.core.optimizer")
    monkeypatch.setattr(optimizer, "SGD", type("FusedSGD", (), {"__module__": "apex.optimizers.fused_sgd"}))
    assert lines(cuda=True)["Apex"][0] == "optimizer='sgd'"
    assert lines(cuda=True)["TransformerEngine"][0] == "not used"
    assert lines(cuda=False)["Apex"][0] == "not used"


class FusedSGD:
    """Takes what Apex's does, which has no kernel for a CPU."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        assert all(parameter.is_cuda for group in groups for parameter in group["params"])
        self.groups, self.options = groups, options


def test_sgd_of_a_cpu_is_that_of_torch(monkeypatch: Any) -> None:
    optimizer = importlib.import_module("megatron.core.optimizer")
    installed = kernels.installed()
    kernels.uninstall()
    monkeypatch.setattr(optimizer, "SGD", FusedSGD)
    kernels.install()
    try:
        built = optimizer.SGD([{"params": [torch.nn.Parameter(torch.zeros(2))]}], lr=0.5, momentum=0.9)
        assert type(built) is torch.optim.SGD
        assert built.param_groups[0]["momentum"] == 0.9
        groups = [{"params": [SimpleNamespace(is_cuda=True)]}]
        fused = optimizer.SGD(groups, lr=0.5)
        assert isinstance(fused, FusedSGD)
        assert (fused.groups, fused.options) == (groups, {"lr": 0.5})
    finally:
        kernels.uninstall()
        monkeypatch.undo()
        if installed:
            kernels.install()


def test_importing_the_backends_is_light() -> None:
    code = "import sys, lightning_megatron.backends, lightning_megatron.backends.extensions\n"
    code += "print([n for n in ('torch', 'megatron') if n in sys.modules])"
    assert run(["-c", code]).stdout.strip() == "[]"
