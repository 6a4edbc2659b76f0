"""Importing the package is quiet and light, and changes nothing for other strategies."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.parametrize(
    "code", ["import lightning_megatron", "import lightning_megatron as lm; lm.MegatronStrategy; lm.GPTModule"]
)
def test_import_prints_nothing(code: str) -> None:
    result = run(code, "-W", "error")
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


def test_import_is_light() -> None:
    code = "import sys, lightning_megatron, lightning_megatron.layout, lightning_megatron.models.config\n"
    code += "print([n for n in ('torch', 'lightning', 'megatron', 'hydra', 'transformers') if n in sys.modules])"
    assert run(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning_megatron, lightning.pytorch as pl",
        pytest.param("import lightning.pytorch as pl, lightning_megatron", marks=pytest.mark.slow),
    ],
)
def test_names_that_users_look_for_in_either_order_of_imports(imports: str) -> None:
    code = imports + (
        "\nlm = lightning_megatron"
        "\nprint([n for n in dir(lm) if not n.startswith('__') and getattr(lm, n, None) is None])"
        "\nprint(lm.average_losses_across_data_parallel_group.__name__, lm.compat.GPTTrainStep.name)"
        "\nprint(lm.checkpoint.average.__name__, lm.generation.megatron_generate.__name__)"
        "\nt = pl.Trainer(strategy='megatron_tp2_pp2', devices=4, accelerator='cpu', logger=False)"
        "\nprint(type(t.strategy).__name__, t.strategy.layout)"
        "\nfrom lightning.pytorch.strategies import StrategyRegistry"
        "\nprint(*[n for n in StrategyRegistry.available_strategies() if n.startswith('megatron')][:4])"
    )
    lines = run(code).stdout.strip().splitlines()
    assert lines[:4] == [
        "[]",
        "average_losses_across_data_parallel_group GPTTrainStep",
        "average megatron_generate",
        "MegatronStrategy tp2_pp2",
    ]
    assert lines[4].startswith("megatron megatron_notebook megatron_")


OTHERS = """
import torch, lightning_megatron.strategy
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
for name in ("auto", "ddp"):
    trainer = pl.Trainer(strategy=name, devices=1, accelerator="cpu", max_steps=2, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(BoringModel())
    print(type(trainer.strategy).__name__, trainer.global_step)
try:
    torch.ones(1).cuda()
except (RuntimeError, AssertionError) as error:
    print("cuda raises")
print(torch.ones(1).type())
"""


def test_other_strategies_train_as_before() -> None:
    import torch

    lines = run(OTHERS).stdout.strip().splitlines()
    assert lines[:2] == ["SingleDeviceStrategy 2", "DDPStrategy 2"]
    if not torch.cuda.is_available():
        assert lines[2] == "cuda raises"
    assert lines[-1] == "torch.FloatTensor"
