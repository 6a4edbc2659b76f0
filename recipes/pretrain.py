"""Pretrain a language model.

python recipes/pretrain.py model=gpt2_large parallel=tp2_pp2 data.data_path=[corpus] trainer.max_steps=1000
"""

import lightning.pytorch as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_megatron.cli.configuration import ConfigurationError, recipe
from lightning_megatron.cli.preflight import preflight
from lightning_megatron.cli.run_directory import save_config
from lightning_megatron.models.registry import module_for


@recipe("pretrain")
def main(config: DictConfig) -> None:
    """Build what the configuration describes, and run its task."""
    if config.task not in ("fit", "validate", "test"):
        raise ConfigurationError(f"task={config.task} is none of fit, validate, test.")
    pl.seed_everything(config.seed, workers=True, verbose=False)
    save_config(config)
    trainer = instantiate(
        config.trainer,
        strategy=instantiate(config.parallel, precision_plugin=instantiate(config.precision)),
        logger=list(instantiate(config.logger).values()),
        callbacks=list(instantiate(config.callbacks).values()),
    )
    module = module_for(instantiate(config.model), instantiate(config.optim))
    run = {"fit": trainer.fit, "validate": trainer.validate, "test": trainer.test}[config.task]
    data = instantiate(config.data)
    preflight(trainer, module, data, stage=config.task, ckpt_path=config.ckpt_path)
    run(module, datamodule=data, ckpt_path=config.ckpt_path)


if __name__ == "__main__":
    main()
