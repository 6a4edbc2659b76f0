"""A process that catches the error of a fit on several ranks, as a notebook or a sweep does, fits again."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

import lightning_megatron as lm
from tests.helpers import Record, SharedLoader, quiet_trainer, tiny_config
from tests.models.runs import strategy
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]


class Fail(pl.Callback):
    """Raises in a hook on one rank, or on all."""

    def __init__(self, hook: str, rank: int | None) -> None:
        self.hook, self.rank, self.calls = hook, rank, 0
        setattr(self, hook, self._raise)

    def _raise(self, trainer: pl.Trainer, *_: Any) -> None:
        self.calls += 1
        if self.rank in (None, trainer.global_rank) and self.calls == (1 if "fit" in self.hook else 3):
            raise KeyError("once")


def _module() -> lm.GPTModule:
    return lm.GPTModule(tiny_config(num_layers=2), lm.OptimizerConfig(lr_decay_steps=99))


def _fit(module: lm.GPTModule, layout: dict[str, Any], *callbacks: pl.Callback) -> list[float] | str:
    """Losses, or the error."""
    record = Record()
    trainer = quiet_trainer(
        strategy(seed=7, mbs=2, **layout), int(os.environ["WORLD_SIZE"]), max_steps=4, callbacks=[record, *callbacks]
    )
    try:
        trainer.fit(module, SharedLoader(module))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return record.losses


def again(layout: dict[str, Any], cases: list[tuple[str, int | None]]) -> list[Any]:
    """For each case, how the fit ended that fails, what the next one gives, and descriptors that are open then."""
    expected = _fit(_module(), layout)
    results = []
    for case in cases:
        failed = _fit(_module(), layout, Fail(*case))
        same = _fit(_module(), layout) == expected
        gc.collect()
        results.append((failed, same, len(os.listdir("/dev/fd"))))
    return results


HOOKS: list[tuple[str, int | None]] = [
    ("on_train_batch_start", 1),
    ("on_train_batch_start", None),
    ("on_before_optimizer_step", 0),
    ("on_train_batch_end", 1),
    ("on_fit_end", 1),  # while the other rank's fit ends well
    ("on_fit_start", 0),
]


def check(results: list[list[Any]], cases: list[tuple[str, int | None]]) -> None:
    for rank, mine in enumerate(results):
        for (hook, where), (failed, same, _) in zip(cases, mine, strict=True):
            assert same, (rank, hook, failed)
            if where in (None, rank):
                assert failed == "KeyError: 'once'"
            elif hook != "on_fit_end":
                assert f"Rank {where} failed" in failed
        assert max(open_now for *_, open_now in mine) <= mine[0][-1] + 4


def test_a_fit_after_a_failed_one_is_as_the_first(ranks: RankPool) -> None:
    cases = [HOOKS[0], HOOKS[4]]
    check(ranks.run(again, 2, {"pp": 2}, cases), cases)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), [(2, {}), (2, {"tp": 2}), (4, {"tp": 2}), (4, {"pp": 2})])
def test_after_a_failure_anywhere(ranks: RankPool, world: int, layout: dict[str, Any]) -> None:
    check(ranks.run(again, world, layout, HOOKS, timeout=300), HOOKS)


def same_module(hook: str) -> Any:
    module = _module()
    failed = _fit(module, {}, Fail(hook, 0))
    return failed, _fit(module, {})


def test_the_same_module_goes_on_if_its_ranks_have_come_equally_far(ranks: RankPool) -> None:
    whole = ranks.run(_fit_twice, 1)[0]
    for failed, losses in ranks.run(same_module, 2, "on_train_batch_start"):
        assert "KeyError: 'once'" in failed
        assert losses == pytest.approx(whole, abs=2e-6)  # both as the second of two fits, after two steps
    for _, message in ranks.run(same_module, 2, "on_before_optimizer_step"):
        assert message.startswith("ModuleError: ")
        assert "different steps (by rank: [2, 3])" in message


def _fit_twice() -> Any:
    module = _module()
    _fit(module, {}, Fail("on_train_batch_start", 0))
    return _fit(module, {})


SCRIPT = """
from tests.distributed.test_second_fit import Fail, _fit, _module
import os
os.environ["WORLD_SIZE"] = "2"
layout = {"pp": 2}
assert "KeyError" in _fit(_module(), layout, Fail("on_train_batch_start", 1))
losses = _fit(_module(), layout)
assert len(losses) == 4, losses
print("fitted again", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]])
def test_under_launchers(launcher: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("WORLD_SIZE", None)
    result = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("fitted again") == 2
