"""Names for ``Trainer(strategy=...)``: ``"megatron"``, ``"megatron_tp2"``, ``"megatron_tp2_pp2"`` and so on.

Lightning has no entry point for strategies, so the names exist once ``lightning_megatron`` is imported. Importing it
must stay light (the planner answers without torch), so registration waits for Lightning if that is not there yet.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any

_MODULE = "lightning.pytorch.strategies"
_SIZES = (1, 2, 4, 8, 16)


def names() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every registered name with its arguments of MegatronStrategy."""
    yield "megatron", {}
    yield "megatron_notebook", {"start_method": "fork"}
    yield "megatron_auto", {"layout": "auto"}
    for tp in _SIZES[:4]:
        for pp in _SIZES:
            if tp * pp == 1:
                continue
            name = "megatron" + (f"_tp{tp}" if tp > 1 else "") + (f"_pp{pp}" if pp > 1 else "")
            sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
            yield name, sizes
            if tp > 1:
                yield f"{name}_sp", {**sizes, "sequence_parallel": True}


def _strategy(**kwargs: Any) -> Any:
    from lightning_megatron.strategy import MegatronStrategy

    return MegatronStrategy(**kwargs)


def _register(module: types.ModuleType) -> None:
    for name, kwargs in names():
        what = "Megatron parallelism" + (f" with {kwargs}" if kwargs else ": data parallel unless given sizes")
        module.StrategyRegistry.register(name, _strategy, description=what, override=True, **kwargs)


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers when Lightning's strategies are imported, then is gone."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register all names, now or as soon as Lightning is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
