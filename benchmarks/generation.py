"""Tokens per second of generation, and the ratio to Hugging Face's ``generate`` in the same run.

    python benchmarks/generation.py                                   # GPT-2 small on the CPU
    python benchmarks/generation.py --device cuda --size large        # bf16, against a compiled static cache

Both decode greedily from random weights of the same sizes, in turn, several times; the best time of each counts, which
is what the machine can do when nothing else runs. Prints one JSON line per batch size, and with ``--lengths`` how the
time of a token grows with the tokens before it.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lightning_megatron as lm
from lightning_megatron.generation import Engine, GenerationConfig
from lightning_megatron.generation.api import build_engine

_SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}


class _OneBatch:
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        tokens = torch.arange(17)[None]
        yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def our_engine(size: str, device: str, positions: int) -> Engine:
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
    return build_engine(module)


def their_model(size: str, device: str, positions: int) -> Any:
    """Hugging Face's GPT-2 of the same sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, hidden, heads = _SIZES[size]
    config = GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=heads, n_positions=positions, bos_token_id=None, eos_token_id=None
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return GPT2LMHeadModel(config).eval().to(device=device, dtype=dtype)


def best_seconds(runs: Sequence[Callable[[], None]], repeats: int, device: str) -> list[float]:
    """The shortest time of each, taken in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, measured in zip(runs, times, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first compiles, records and warms
                measured.append(time.perf_counter() - started)
    return [min(measured) for measured in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(_SIZES), default="small")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 and 8, and 64 on a GPU")
    parser.add_argument("--prompt", type=int, default=None, help="tokens; default 32, 128 on a GPU")
    parser.add_argument("--new", type=int, default=None, help="tokens; default 32, 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lengths", action="store_true", help="also time tokens after prompts of 128 to 896 tokens")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    prompt, new = args.prompt or (128 if on_gpu else 32), args.new or (128 if on_gpu else 32)
    engine, model = our_engine(args.size, args.device, 1024), their_model(args.size, args.device, 1024)
    greedy = GenerationConfig(max_new_tokens=new)
    theirs: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if on_gpu:
        theirs["cache_implementation"] = "static"  # which generate compiles
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
        rates = [batch * new / taken for taken in seconds]
        line = {
            "batch": batch,
            "prompt": prompt,
            "new": new,
            "threads": torch.get_num_threads(),
            "tokens_per_second": round(rates[0], 1),
            "hugging_face": round(rates[1], 1),
            "ratio": round(rates[0] / rates[1], 3),
        }
        print(json.dumps(line), flush=True)
    if args.lengths:
        for length in (128, 384, 640, 896):
            rows = [[7] * length]

            def first(rows: list[list[int]] = rows) -> None:
                engine.generate(rows, greedy.replace(max_new_tokens=1))

            def several(rows: list[list[int]] = rows) -> None:
                engine.generate(rows, greedy.replace(max_new_tokens=33))

            short, long = best_seconds((first, several), args.repeats, args.device)
            print(json.dumps({"length": length, "milliseconds_per_token": round((long - short) / 32 * 1e3, 2)}))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
