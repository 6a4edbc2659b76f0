"""Fine-tune a model of Hugging Face: from a directory of transformers to a directory of transformers.

python recipes/finetune.py pretrained=Qwen2.5-0.5B data.train_path=train.jsonl save_path=tuned lora.rank=16
"""

from pathlib import Path

import lightning.pytorch as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_megatron.cli.configuration import ConfigurationError, recipe
from lightning_megatron.cli.preflight import preflight
from lightning_megatron.cli.run_directory import save_config
from lightning_megatron.models.registry import from_pretrained


@recipe("finetune")
def main(config: DictConfig) -> None:
    """Load, train, and write the model, and its adapter if there is one."""
    adapter = config.adapter_path
    if adapter is not None and config.lora is None:
        raise ConfigurationError("adapter_path is given, but lora=null trains no adapter. Leave one of them out.")
    for path in (config.save_path, adapter):
        if path is not None and Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
            raise ConfigurationError(f"{path} exists already. Give a new or an empty directory.")
    pl.seed_everything(config.seed, workers=True, verbose=False)
    save_config(config)
    trainer = instantiate(
        config.trainer,
        strategy=instantiate(config.parallel, precision_plugin=instantiate(config.precision)),
        logger=list(instantiate(config.logger).values()),
        callbacks=list(instantiate(config.callbacks).values()),
    )
    optimizer = instantiate(config.optim)
    module = from_pretrained(config.pretrained, optimizer, tokenizer=config.data.tokenizer, **config.changes)
    module.lora = instantiate(config.lora)
    data = instantiate(config.data)
    preflight(trainer, module, data, ckpt_path=config.ckpt_path)
    trainer.fit(module, datamodule=data, ckpt_path=config.ckpt_path)
    module.save_pretrained(config.save_path, tokenizer=config.data.tokenizer)
    if adapter is not None:
        module.save_adapter(adapter)


if __name__ == "__main__":
    main()
