"""Generation: tokens per second beside Hugging Face's ``generate`` in the same run, and the cost of a token by length.

    python benchmarks/generation.py                                   # GPT-2 small on the CPU
    python benchmarks/generation.py --device cuda --size large        # bf16, against a compiled static cache

Both decode greedily from random weights of the same sizes, in turn, several times; the best time of each counts, which
is what the machine can do when nothing else runs. The first table is tokens per second by batch size.

The second is the time of one more token after prompts of 128 to 2048 tokens, beside the time of the attention over
that many keys in all layers by itself. What is left, the rest of the model, should not grow: the last column divides
the rest by that of the shortest prompt. ``--skip`` leaves one of the tables out.
"""

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

import lightning_megatron as lm
from lightning_megatron.generation import Engine, GenerationConfig, NewTokens
from lightning_megatron.generation.api import build_engine

_SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}


class _OneBatch:
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        tokens = torch.arange(17)[None]
        yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def our_engine(size: str, device: str, positions: int, *, graphs: bool | None = None) -> Engine:
    """An engine in a Trainer of one process."""
    import lightning.pytorch as pl

    config = lm.GPTConfig.gpt2(size, max_position_embeddings=positions)  # type: ignore[arg-type]
    module = lm.GPTModule(config)
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        strategy=lm.MegatronStrategy(),
        precision="bf16-true" if device == "cuda" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        use_distributed_sampler=False,
    )
    trainer.validate(module, _OneBatch(), verbose=False)
    return build_engine(module, cuda_graphs=graphs)


def their_model(size: str, device: str, positions: int) -> Any:
    """Hugging Face's GPT-2 of the same sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, hidden, heads = _SIZES[size]
    config = GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=heads, n_positions=positions, bos_token_id=None, eos_token_id=None
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return GPT2LMHeadModel(config).eval().to(device=device, dtype=dtype)


def seconds_of(run: Callable[[], object], device: str) -> float:
    """The time of one call, with what it left to do on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def best_seconds(runs: Sequence[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """The shortest time of each, taken in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, measured in zip(runs, times, strict=True):
            taken = seconds_of(run, device)
            if repeat:  # the first compiles, records and warms
                measured.append(taken)
    return [min(measured) for measured in times]


def throughput(engine: Engine, args: argparse.Namespace) -> None:
    """Print the first table."""
    on_gpu = args.device == "cuda"
    prompt, new = args.prompt or (128 if on_gpu else 32), args.new or (128 if on_gpu else 32)
    model = their_model(args.size, args.device, 1024)
    greedy = GenerationConfig(max_new_tokens=new)
    theirs: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if on_gpu:
        theirs["cache_implementation"] = "static"  # which generate compiles
    print(f"{'batch':>6} {'prompt':>7} {'new':>5} {'tokens/s':>9} {'Hugging Face':>13} {'ratio':>6}")
    for batch in args.batch or ((1, 8, 64) if on_gpu else (1, 8)):
        tokens = torch.randint(0, 50257, (batch, prompt), generator=torch.Generator().manual_seed(0))
        rows, on_device = tokens.tolist(), tokens.to(args.device)
        mask = torch.ones_like(on_device)

        def ours(rows: list[list[int]] = rows) -> None:
            engine.generate(rows, greedy)

        def hugging_face(tokens: torch.Tensor = on_device, mask: torch.Tensor = mask) -> None:
            with torch.inference_mode():
                model.generate(tokens, attention_mask=mask, **theirs)

        seconds = best_seconds((ours, hugging_face), args.repeats, args.device)
        one, other = (batch * new / taken for taken in seconds)
        print(f"{batch:>6} {prompt:>7} {new:>5} {one:>9.1f} {other:>13.1f} {one / other:>6.2f}", flush=True)


def token_seconds(engine: Engine, rows: list[list[int]], repeats: int) -> float:
    """The median time between two tokens of a row; each is read by the host, as when it is streamed."""
    times: list[float] = []

    def note(_: NewTokens) -> None:
        times.append(time.perf_counter())

    for _ in range(repeats):
        engine.generate(rows, GenerationConfig(max_new_tokens=34), on_tokens=note)
    gaps = [after - before for before, after in pairwise(times)]
    per_call = len(times) // repeats
    # The first gap of a call warms caches, and the gap between two calls holds a prompt.
    return statistics.median(gap for index, gap in enumerate(gaps) if 0 < index % per_call < per_call - 1)


def attention_seconds(engine: Engine, size: str, length: int, repeats: int) -> float:
    """The time of attention from one new token to ``length`` keys in every layer, and of nothing else."""
    layers, hidden, heads = _SIZES[size]
    decoder = engine.decoder
    shape = layers, 1, heads, length, hidden // heads
    keys, values = (torch.randn(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(2))
    query = torch.randn(1, heads, 1, hidden // heads, dtype=decoder.dtype, device=decoder.device)

    def run() -> None:
        with torch.inference_mode():
            for layer in range(layers):
                F.scaled_dot_product_attention(query, keys[layer], values[layer])

    return statistics.median(seconds_of(run, decoder.device.type) for _ in range(20 * repeats))


def lengths(engine: Engine, args: argparse.Namespace) -> None:
    """Print the second table."""
    print(f"{'length':>7} {'token':>10} {'attention':>10} {'the rest':>10} {'rest / shortest':>16}")
    shortest = 0.0
    engine.generate([[7] * 16], GenerationConfig(max_new_tokens=16))
    for length in args.lengths:
        token = token_seconds(engine, [[7] * length], args.repeats)
        attention = attention_seconds(engine, args.size, length, args.repeats)
        rest = token - attention
        shortest = shortest or rest
        milliseconds = " ".join(f"{1e3 * number:>7.2f} ms" for number in (token, attention, rest))
        print(f"{length:>7} {milliseconds} {rest / shortest:>16.2f}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(_SIZES), default="small")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 and 8, and 64 on a GPU")
    parser.add_argument("--prompt", type=int, default=None, help="tokens; default 32, 128 on a GPU")
    parser.add_argument("--new", type=int, default=None, help="tokens; default 32, 128 on a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-graphs", action="store_true", help="do not replay the step of a token as a CUDA graph")
    parser.add_argument("--skip", choices=("throughput", "lengths"), default=None)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"GPT-2 {args.size} on {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.skip != "throughput":
        throughput(our_engine(args.size, args.device, 1024, graphs=False if args.no_graphs else None), args)
    if args.skip != "lengths":
        positions = max(1024, max(args.lengths) + 34)
        lengths(our_engine(args.size, args.device, positions, graphs=False if args.no_graphs else None), args)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
