"""``lightning-megatron convert``: checkpoints of Hugging Face, Megatron-LM and this package into each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lightning_megatron.cli.trust import add_trust
from lightning_megatron.printable import printable

_EPILOG = """\
formats, of which the one of --load-path is found out:
  huggingface       config.json and safetensors: GPT-2, Llama, Mistral, Qwen2, Megatron-BERT, BERT, T5, mT5
  megatron          Megatron-LM's torch_dist, iter_0000000/ with .metadata; any layout loads it
  megatron-legacy   Megatron-LM's iter_0000000|release/mp_rank_TT[_PPP]/model_optim_rng.pt, at any layout
  lightning         this package's checkpoint, weights alone, which any layout loads

examples:
  lightning-megatron convert --load-path gpt2/ --save-path gpt2-megatron/ --to megatron-legacy \\
      --target-tensor-model-parallel-size 2 --target-pipeline-model-parallel-size 2 --verify
  lightning-megatron convert --load-path run/last.ckpt --save-path hub/ --to huggingface --tokenizer-name run/tokenizer
"""


def add_parser(subparsers: Any) -> None:
    """Add ``convert`` to the command line."""
    parser = subparsers.add_parser(
        "convert",
        help="checkpoints of Hugging Face, Megatron-LM and this package into each other",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--load-path", type=Path, required=True, help="directory of any of the formats")
    parser.add_argument("--save-path", type=Path, help="a new or empty directory")
    parser.add_argument("--to", choices=("huggingface", "megatron", "megatron-legacy", "lightning"))
    parser.add_argument(
        "--verify", action="store_true", help="run both models on the same tokens; differing is an error"
    )
    parser.add_argument("--print-checkpoint-structure", action="store_true", help="list the tensors of --load-path")
    target = parser.add_argument_group("the target")
    target.add_argument("--target-tensor-model-parallel-size", type=int, default=1, metavar="TP")
    target.add_argument("--target-pipeline-model-parallel-size", type=int, default=1, metavar="PP")
    target.add_argument("--target-data-parallel-size", type=int, default=1, metavar="DP")
    target.add_argument("--target-params-dtype", choices=("fp32", "fp16", "bf16"), help="default: the source's")
    target.add_argument("--make-vocab-size-divisible-by", type=int, help="default: the source's, or 128")
    target.add_argument("--max-shard-size", default="200MB", help="of safetensors (default 200MB)")
    target.add_argument("--model-type", help="of Hugging Face, if several have the model: mistral for a Llama")
    target.add_argument(
        "--tokenizer-name",
        help="saved beside the model for huggingface; tells the vocabulary's size, and resizes it to added tokens",
    )
    add_trust(target)
    target.add_argument("--use-distributed-optimizer", action="store_true", help="name megatron-legacy files for it")
    parser.add_argument(
        "--model-config", type=Path, metavar="FILE", help="JSON for Megatron-LM files without arguments"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; 0, 1 if the verification finds a difference, or 2 with the reason on standard error."""
    from lightning_megatron.errors import CheckpointError, DataError, LayoutError

    try:
        return _run(args)
    except (CheckpointError, LayoutError, DataError, ValueError, OSError) as error:
        print("error:", *(printable(line.strip()) for line in str(error).splitlines()), file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if (args.to is None or args.save_path is None) and not args.print_checkpoint_structure:
        raise ValueError("--save-path and --to are needed, or --print-checkpoint-structure alone.")
    from lightning_megatron.interop.convert import DTYPES, Conversion, convert, open_model, read_model_config, structure
    from lightning_megatron.interop.resized import tokens_of
    from lightning_megatron.interop.sharded_checkpoint import ShardedCheckpoint

    config = None if args.model_config is None else read_model_config(args.model_config)
    if args.print_checkpoint_structure:
        print("\n".join(map(printable, structure(open_model(args.load_path, config=config)))))
    if args.to is None or args.save_path is None:
        return 0
    tokenizer = None
    if args.tokenizer_name is not None:
        from lightning_megatron.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(
            args.tokenizer_name, from_hub=args.from_hub, trust_remote_code=args.trust_remote_code
        )
    job = Conversion(
        load_path=args.load_path,
        save_path=args.save_path,
        to=args.to,
        tensor_model_parallel_size=args.target_tensor_model_parallel_size,
        pipeline_model_parallel_size=args.target_pipeline_model_parallel_size,
        data_parallel_size=args.target_data_parallel_size,
        params_dtype=None if args.target_params_dtype is None else DTYPES[args.target_params_dtype],
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
        max_shard_size=args.max_shard_size,
        tokenizer=tokenizer,
        model_type=args.model_type,
        model_config=config,
        use_distributed_optimizer=args.use_distributed_optimizer,
        progress=sys.stderr.isatty() or sys.stdout.isatty(),
    )
    source = convert(job)
    merged = isinstance(source, ShardedCheckpoint) and source.lora is not None
    added = 0 if job.tokenizer is None else tokens_of(job.tokenizer) - source.identity.config.vocab_size
    resized = f", with {added} added tokens, whose embeddings are the mean of the others'" if added > 0 else ""
    print(f"{args.save_path} is written{', with adapters merged into the weights' if merged else ''}{resized}.")
    if not args.verify:
        return 0
    from lightning_megatron.interop.verify import compare

    found = compare(source, open_model(args.save_path), job.params_dtype)
    verdict = "the same model" if found.equal else "DIFFERENT MODELS"
    print(
        f"largest difference of logits: {found.largest_difference:.3g} over {found.tokens} tokens (largest logit "
        f"{found.largest_logit:.3g}, tolerance {found.tolerance:.3g}): {verdict}"
    )
    if not found.equal:
        print(f"error: {args.save_path} does not compute what {args.load_path} does; do not use it.", file=sys.stderr)
        return 1
    return 0
