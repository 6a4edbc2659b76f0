"""Pretrain a language model.

python recipes/pretrain.py model=gpt2_large parallel=tp2_pp2 data.data_path=[corpus] trainer.max_steps=1000
"""

from pathlib import Path

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_megatron.cli.configuration import recipe
from lightning_megatron.models.registry import module_for


@recipe("pretrain")
def main(config: DictConfig) -> None:
    """Build what the configuration describes, and run its task."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    save_config(config)
    trainer = instantiate(
        config.trainer,
        strategy=instantiate(config.parallel, precision_plugin=instantiate(config.precision)),
        logger=list(instantiate(config.logger).values()),
        callbacks=list(instantiate(config.callbacks).values()),
    )
    module = module_for(instantiate(config.model), instantiate(config.optim))
    task = {"fit": trainer.fit, "validate": trainer.validate, "test": trainer.test}[config.task]
    task(module, datamodule=instantiate(config.data), ckpt_path=config.ckpt_path)


@rank_zero_only
def save_config(config: DictConfig) -> None:
    """The resolved configuration, beside the run."""
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))


if __name__ == "__main__":
    main()
