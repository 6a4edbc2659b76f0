"""Text from a checkpoint, at any layout.

python recipes/generate.py checkpoint=run/checkpoints/last.ckpt prompts=["The module"] parallel=tp2 generation=sampled
"""

import json
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_megatron.cli.configuration import ConfigurationError, recipe
from lightning_megatron.cli.generate import end_tokens_of, restore, tokenizer_of
from lightning_megatron.generation import Generation, GenerationConfig
from lightning_megatron.printable import printable


@recipe("generate")
def main(config: DictConfig) -> None:
    """Restore the model, and continue the prompts."""
    texts = list(config.prompts)
    if config.prompts_file is not None:
        texts += Path(config.prompts_file).read_text().splitlines()
    if not texts:
        raise ConfigurationError("There is nothing to continue: give prompts=[...] or prompts_file=...")
    checkpoint = Path(config.checkpoint)
    trust = {"from_hub": config.from_hub, "trust_remote_code": config.trust_remote_code}
    tokenizer = tokenizer_of(checkpoint, config.tokenizer, **trust)
    how: GenerationConfig = instantiate(config.generation)
    if config.stop_at_end:
        how = how.replace(stop_tokens=(*how.stop_tokens, *end_tokens_of(checkpoint, tokenizer)))
    strategy = instantiate(config.parallel, precision_plugin=instantiate(config.precision))
    devices = config.trainer.devices or strategy.layout.model_parallel_size
    trainer = instantiate(config.trainer, strategy=strategy, devices=devices)
    module = restore(checkpoint, trainer)
    try:
        found = module.generate([tokenizer(text)["input_ids"] for text in texts], how)
    except ValueError as error:  # a prompt or an option that does not fit the model
        raise ConfigurationError(str(error)) from error
    if not trainer.is_global_zero:
        return
    continued = [text for text in texts for _ in range(how.num_return_sequences)]
    lines = [_line(prompt, one, tokenizer) for prompt, one in zip(continued, found, strict=True)]
    if config.output is None:
        print("\n\n".join(printable(line["text"]) for line in lines), flush=True)
    else:
        Path(config.output).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _line(prompt: str, generation: Generation, tokenizer: Any) -> dict[str, Any]:
    """One text with all that is known of it, in types that JSON has."""
    text = tokenizer.decode(list(generation.tokens), skip_special_tokens=True)
    return {
        "prompt": prompt,
        "text": text,
        "tokens": generation.new_tokens,
        "finish_reason": generation.finish_reason,
        "log_probs": generation.log_probs,
        "score": generation.score,
    }


if __name__ == "__main__":
    main()
