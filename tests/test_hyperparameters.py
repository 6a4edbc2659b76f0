"""Lightning's ways to keep and to make modules: save_hyperparameters, load_from_checkpoint, torch.compile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_megatron as lm
from lightning_megatron.data import Masking, PretrainingData
from tests.helpers import plain_loader, quiet_trainer, tiny_config
from tests.models.runs import strategy
from tests.ranks import RankPool


class Kept(lm.GPTModule):
    """Saves its hyperparameters."""

    def __init__(self, config: lm.GPTConfig, optimizer: lm.OptimizerConfig | None = None, width: int = 3) -> None:
        super().__init__(config, optimizer)
        self.width = width
        self.save_hyperparameters()


class KeptData(PretrainingData):
    """Saves its hyperparameters, of which one is a configuration."""

    def __init__(self, masking: Masking) -> None:
        super().__init__("corpus", seq_length=16, global_batch_size=8)
        self.save_hyperparameters()


def test_configurations_are_kept_as_dicts() -> None:
    kept = Kept(tiny_config(), lm.OptimizerConfig(lr_decay_steps=9), width=5)
    assert kept.hparams.config["hidden_size"] == 32
    assert kept.hparams.optimizer["lr_decay_steps"] == 9
    assert kept.hparams_initial.width == 5
    assert isinstance(kept.hparams_initial.config, dict)
    assert KeptData(Masking()).hparams.masking["max_ngram"] == 3


def _saved(directory: Path) -> tuple[float, float, int, int, bool]:
    module = Kept(tiny_config(num_layers=2), lm.OptimizerConfig(lr_decay_steps=9), width=5)
    trainer = quiet_trainer(strategy(), 1, max_steps=2, logger=CSVLogger(directory))
    trainer.fit(module, plain_loader(4))
    trainer.save_checkpoint(directory / "c.ckpt")
    loss = trainer.validate(module, plain_loader(4, 8), verbose=False)[0]["val_loss"]
    loaded = Kept.load_from_checkpoint(directory / "c.ckpt")
    again = quiet_trainer(strategy(), 1).validate(loaded, plain_loader(4, 8), verbose=False)[0]["val_loss"]
    resumed = Kept(tiny_config(num_layers=2), lm.OptimizerConfig(lr_decay_steps=9))
    quiet_trainer(strategy(), 1, max_steps=3).fit(resumed, plain_loader(4), ckpt_path=directory / "c.ckpt")
    assert loaded.optimizer_config.lr_decay_steps == 9
    return loss, again, loaded.width, resumed.width, (Path(trainer.log_dir or "") / "hparams.yaml").is_file()


def _loaded(directory: Path) -> float:
    loaded = Kept.load_from_checkpoint(directory / "c.ckpt", width=7)
    assert loaded.width == 7
    loader = plain_loader(4, 8)
    trainer = quiet_trainer(strategy(tp=2), int(os.environ["WORLD_SIZE"]))
    return float(trainer.validate(loaded, loader, verbose=False)[0]["val_loss"])


def test_a_module_from_a_checkpoint_directory(ranks: RankPool, tmp_path: Path) -> None:
    loss, again, width, _, logged = ranks.run(_saved, 1, tmp_path)[0]
    assert again == loss
    assert width == 5
    assert logged
    assert ranks.run(_loaded, 2, tmp_path) == pytest.approx([loss] * 2, abs=1e-5)
    with pytest.raises(lm.CheckpointError, match="holds a GPTModule"):
        lm.T5Module.load_from_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(lm.ModuleError, match="map_location"):
        Kept.load_from_checkpoint(tmp_path / "c.ckpt", map_location="cpu")
    with pytest.raises(lm.CheckpointError, match="no checkpoint at"):
        Kept.load_from_checkpoint(tmp_path / "other.ckpt")


def _compiled() -> str:
    module: Any = torch.compile(lm.GPTModule(tiny_config(num_layers=2)))
    try:
        quiet_trainer(strategy(), 1, max_steps=1).fit(module, plain_loader(4))
    except lm.ModuleError as error:
        return str(error)
    return ""


def test_a_compiled_module_is_refused(ranks: RankPool) -> None:
    assert "torch.compile" in ranks.run(_compiled, 1)[0]
