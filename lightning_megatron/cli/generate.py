"""``lightning-megatron generate``: text from a checkpoint, at any layout."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_megatron.cli.trust import add_trust
from lightning_megatron.printable import printable

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_megatron.generation import GenerationConfig
    from lightning_megatron.module import MegatronModule

_EXAMPLE = "lightning-megatron generate run/checkpoints/last.ckpt --prompt 'The module'"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the command."""
    parser = subparsers.add_parser(
        "generate",
        help="text from a checkpoint, at any layout",
        epilog=f"example:\n  {_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes; ``recipes/generate.py`` takes the same, and more, as a Hydra configuration."""
    parser.add_argument("checkpoint", type=Path, help="directory that trainer.save_checkpoint or a callback wrote")
    parser.add_argument(
        "--tokenizer", help="directory, tokenizer.json, or name that transformers knows (default: the run's own)"
    )
    add_trust(parser)
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line")
    machine = parser.add_argument_group("processes")
    machine.add_argument("--layout", default="tp1", help="such as tp2_pp2 (default tp1)")
    machine.add_argument("--devices", type=int, default=None, help="processes (default: what the layout needs)")
    machine.add_argument("--accelerator", default="auto")
    machine.add_argument("--precision", default="32-true", help="as the Trainer's (default 32-true)")
    how = parser.add_argument_group("how")
    how.add_argument("--max-new-tokens", type=int, default=64)
    how.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    how.add_argument("--temperature", type=float, default=1.0)
    how.add_argument("--top-k", type=int, default=0)
    how.add_argument("--top-p", type=float, default=0.0)
    how.add_argument("--repetition-penalty", type=float, default=1.0)
    how.add_argument("--num-beams", type=int, default=1)
    how.add_argument("--num-return-sequences", type=int, default=1)
    how.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, or 2 for arguments that do not fit, with the reason on standard error."""
    from lightning_megatron.errors import CheckpointError, DataError

    try:
        if args.prompts is not None and not args.prompts.is_file():
            raise ValueError(f"There is no file --prompts={args.prompts}. Give one with a prompt on each line.")
        texts = [*args.prompt, *(args.prompts.read_text().splitlines() if args.prompts else [])]
        if not texts:
            raise ValueError("Give at least one --prompt, or --prompts with a file of them.")
        trust = {"from_hub": args.from_hub, "trust_remote_code": args.trust_remote_code}
        tokenizer = tokenizer_of(args.checkpoint, args.tokenizer, **trust)
        config = _config(args, tokenizer)
        module = load(
            args.checkpoint,
            layout=args.layout,
            devices=args.devices,
            accelerator=args.accelerator,
            precision=args.precision,
        )
        found = module.generate([tokenizer(text)["input_ids"] for text in texts], config)
    except (ValueError, OSError, CheckpointError, DataError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    if module.trainer.is_global_zero:
        for generation in found:
            text = tokenizer.decode(list(generation.tokens), skip_special_tokens=True)
            print(printable(text), end="\n\n", flush=True)
    return 0


def _config(args: argparse.Namespace, tokenizer: Any) -> GenerationConfig:
    from lightning_megatron.generation import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=args.sample,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        num_beams=args.num_beams,
        num_return_sequences=args.num_return_sequences,
        seed=args.seed,
    )
    # After the mistakes of the command line: this reads the checkpoint.
    return replace(config, stop_tokens=end_tokens_of(args.checkpoint, tokenizer))


def end_tokens_of(checkpoint: Path, tokenizer: Any) -> tuple[int, ...]:
    """Where text ends: at the tokenizer's end token, and at those of the directory that the model was tuned from.

    Raises:
        CheckpointError: no whole checkpoint, or its end tokens are no token ids.
    """
    from lightning_megatron.checkpoint.metadata import CheckpointMetadata
    from lightning_megatron.errors import CheckpointError
    from lightning_megatron.interop.generation_settings import check_generation, end_tokens

    settings = CheckpointMetadata.read(checkpoint).model.get("generation", {})
    try:
        check_generation(settings)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: its generation settings: {error}. Load another.") from error
    return end_tokens(settings, tokenizer)


class _NoPrompts:
    """A loader of nothing: predict restores the checkpoint before it finds that out."""

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def tokenizer_of(
    checkpoint: Path, given: str | None, *, from_hub: bool = False, trust_remote_code: bool = False
) -> Any:
    """The tokenizer that was given, or that which the checkpoint names.

    Args:
        from_hub, trust_remote_code: of :func:`~lightning_megatron.data.load_tokenizer`.

    Raises:
        CheckpointError: no whole checkpoint, or one that names none.
        DataError: it cannot be loaded, or is another than the run's.
    """
    from lightning_megatron.checkpoint.metadata import CheckpointMetadata
    from lightning_megatron.data import load_tokenizer
    from lightning_megatron.data.tokenizer import tokenizer_identity
    from lightning_megatron.errors import CheckpointError, DataError

    if given is not None:
        return load_tokenizer(given, from_hub=from_hub, trust_remote_code=trust_remote_code)
    named = CheckpointMetadata.read(checkpoint).tokenizer
    if not named.get("source"):
        raise CheckpointError(f"{checkpoint} names no tokenizer. Give one.")
    try:
        if not isinstance(named["source"], str):
            raise DataError(f"The name {named['source']!r:.60} is no text.")
        tokenizer = load_tokenizer(named["source"], from_hub=from_hub, trust_remote_code=trust_remote_code)
    except DataError as error:
        raise DataError(f"{error} {checkpoint} names it; give another, or this one by hand, as tokenizer.") from error
    if not tokenizer_identity(tokenizer).startswith(str(named.get("identity"))):
        raise DataError(
            f"The tokenizer in {named['source']} is not the one that {checkpoint} was trained with any more."
        )
    return tokenizer


def load(
    checkpoint: Path, *, layout: str, devices: int | None, accelerator: str = "auto", precision: str = "32-true"
) -> MegatronModule:
    """The module of a checkpoint directory with its weights, in the processes of a Trainer, ready to generate.

    Raises:
        CheckpointError: no whole checkpoint, or one of a model that does not generate.
        LayoutError: a layout that the model or the processes do not fit.
    """
    import lightning.pytorch as pl

    from lightning_megatron.layout import ParallelLayout
    from lightning_megatron.strategy import MegatronStrategy

    sizes = ParallelLayout.parse(layout)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices or sizes.model_parallel_size,
        strategy=MegatronStrategy(**sizes.as_dict()),  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return restore(checkpoint, trainer)


def restore(checkpoint: Path, trainer: pl.Trainer) -> MegatronModule:
    """The module of a checkpoint directory with its weights, in the processes of ``trainer``, ready to generate.

    Raises:
        CheckpointError: no whole checkpoint, or one of a model that does not generate.
        LayoutError: a layout that the model or the processes do not fit.
    """
    from lightning_megatron.checkpoint.metadata import CheckpointMetadata
    from lightning_megatron.errors import CheckpointError
    from lightning_megatron.lora import LoRAConfig
    from lightning_megatron.models.config import GPTConfig, T5Config
    from lightning_megatron.models.registry import module_for

    model = CheckpointMetadata.read(checkpoint).model
    configs: dict[str, type[GPTConfig | T5Config]] = {"GPTModule": GPTConfig, "T5Module": T5Config}
    if model.get("module") not in configs:
        raise CheckpointError(f"{checkpoint} holds a {model.get('module')}; {' and '.join(configs)} generate.")
    module = module_for(configs[model["module"]].from_checkpoint(model["config"]))
    if "lora" in model:
        module.lora = LoRAConfig(**model["lora"])
    with warnings.catch_warnings():
        # Nothing is predicted here, by intention, and callbacks of the training are of no use.
        for message in ("Total length of", "Be aware that when using `ckpt_path`"):
            warnings.filterwarnings("ignore", message=message)
        trainer.predict(module, _NoPrompts(), ckpt_path=checkpoint)
    return module
