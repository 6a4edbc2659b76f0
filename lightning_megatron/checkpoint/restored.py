"""Modules made from a checkpoint directory, for ``load_from_checkpoint``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lightning_megatron.checkpoint.integrity import LIGHTNING_FILE, open_small
from lightning_megatron.checkpoint.io import load_weights
from lightning_megatron.checkpoint.run_state import RunState
from lightning_megatron.checkpoint.trainer_state import read_trainer_state
from lightning_megatron.errors import CheckpointError
from lightning_megatron.lora import LoRAConfig
from lightning_megatron.optim.config import OptimizerConfig


def module_from(kind: type[Any], path: Path, arguments: dict[str, Any]) -> Any:
    """A module of a class of GPT's, BERT's or T5's, which takes its weights from ``path`` when it is built.

    Args:
        kind: the class; its constructor takes the configuration as ``config``, or first.
        path: the checkpoint.
        arguments: of the constructor, instead of those that the checkpoint holds.

    Raises:
        CheckpointError: no whole checkpoint, or one of another kind of model.
    """
    metadata, small = open_small(path)
    model = metadata.model
    expected = f"{kind.config_type.__name__.removesuffix('Config')}Module"
    if model.get("module") != expected:
        raise CheckpointError(f"{path} holds a {model.get('module')}, but {kind.__name__} is a {expected}.")
    parameters = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    saved = {name: value for name, value in _hyperparameters(path, small[LIGHTNING_FILE]).items() if name in parameters}
    if isinstance(saved.get("optimizer"), dict):
        saved["optimizer"] = OptimizerConfig(**saved["optimizer"])
    config = "config" if "config" in parameters else parameters[0]
    module = kind(**saved | {config: kind.config_type.from_checkpoint(model["config"])} | arguments)
    module.checkpoint, module.draws_initial_weights = path, False
    if "lora" in model:
        module.lora = LoRAConfig(**model["lora"])
    return module


def fill(module: Any, path: Path) -> None:
    """Fill a module's chunks from a checkpoint; on every rank.

    Raises:
        CheckpointError: on every rank, if the checkpoint is damaged or of another model.
    """
    strategy = module.strategy
    state = RunState(list(module.chunks), None, strategy.build_context.groups)
    load_weights(path, state, module.describe(), strategy.team, include=("*",), exclude=())


def _hyperparameters(path: Path, data: bytes) -> dict[str, Any]:
    """What ``save_hyperparameters`` kept, if it was called and all of it is plain."""
    saved = read_trainer_state(path / LIGHTNING_FILE, data, None)
    found = saved.get("hyper_parameters", {})
    return dict(found) if isinstance(found, dict) else {}
