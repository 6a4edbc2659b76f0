"""Training speed on one GPU: the package through ``Trainer(strategy="megatron")`` beside its peers, in one run.

    python -m benchmarks.gpu --variants ours nano huggingface unfused megatron-core transformer-engine --batches 8 24

Each variant runs in a process of its own. A step is timed by CUDA events over its whole cycle, data transfer and
logging included; the median of the last steps counts. MFU is against 989 TFLOP/s with the operations of
:mod:`benchmarks.workloads`; for a GPT-2 ``6 * (12 * L * H^2 + V * H) + 12 * L * H * S`` a token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import WORKLOADS, Batch, Workload

PEAK = 989e12
WARM_UP = 6
PROFILED = 5
"""Steps, one of which is logged. They begin with an idle device, which the first of them fills."""
BATCHES = {"llama-1b": (4,), "llama-1b-alibi": (4,), "bert-large": (32,), "t5-large": (16,)}
"""Samples of a step, where they are not 8 and 24."""
VARIANTS = ("ours", "unfused", "nano", "huggingface", "megatron-core", "transformer-engine")
"""The last two are megatron-core without the package, with its own layers and with TransformerEngine's."""
FLOAT8: dict[str, dict[str, Any]] = {
    "ours-fp8": {},
    "ours-fp8-fast": {"fast_accumulation": "all"},
    "ours-fp8-inputs": {"weight_gradients": False},
}
"""Options of FP8 by variant. MFU stays against the peak of 16 bits."""


class RandomTokens:
    """A few batches of random tokens on the host, over and over."""

    def __init__(self, workload: Workload, samples: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._batches = [workload.batch(samples, generator) for _ in range(4)]
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        return (self._batches[step % len(self._batches)] for step in range(self._steps))


class Clock:
    """Times of steps, the highest allocation, and optionally the kernels of a few steps."""

    def __init__(self, profile_at: int | None) -> None:
        self.events: list[torch.cuda.Event] = []
        self.kernels: dict[str, Any] = {}
        self._profile_at = profile_at
        self._profiler: Any = None

    def step_done(self) -> None:
        """Call after each step."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)
        count = len(self.events)
        if count == 2:  # after compilation, before graphs are captured
            torch.cuda.reset_peak_memory_stats()
        if self._profile_at == count:
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        elif self._profiler is not None and count == (self._profile_at or 0) + PROFILED:
            torch.cuda.synchronize()
            self._profiler.stop()
            self.kernels = _kernel_times(self._profiler, steps=PROFILED)
            self._profiler = None

    def times(self) -> list[float]:
        """Milliseconds of each step after the warm-up that was not profiled."""
        torch.cuda.synchronize()
        last = self._profile_at or len(self.events)
        timed = self.events[WARM_UP:last]
        return [a.elapsed_time(b) for a, b in itertools.pairwise(timed)]


def _kernel_times(profiler: Any, steps: int) -> dict[str, Any]:
    """Time in kernels, the share of the window in which any ran, the kernels by name, and where none ran."""
    total: dict[str, list[float]] = {}
    spans = []
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            row = total.setdefault(event.name(), [0.0, 0])
            row[0] += event.duration_ns() / 1e6 / steps
            row[1] += 1 / steps
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns(), event.name()))
    spans.sort()
    busy, until, before = 0, spans[0][0], ""
    idle: dict[str, list[float]] = {}
    for start, end, name in spans:
        busy += max(0, end - max(start, until))
        if start > until:
            row = idle.setdefault(f"{before[:45]} -> {name[:45]}", [0.0, 0])
            row[0] += (start - until) / 1e6 / steps
            row[1] += 1 / steps
        until, before = max((until, before), (end, name))
    rows = sorted(total.items(), key=lambda item: -item[1][0])
    return {
        "kernel_ms": round(sum(ms for ms, _ in total.values()), 2),
        "busy": round(busy / (until - spans[0][0]), 4),
        "top": [f"{ms:8.3f} ms {round(count):5d} x {name[:100]}" for name, (ms, count) in rows[:40]],
        "idle": [
            f"{ms:8.3f} ms {round(count):5d} x nothing between {pair}"
            for pair, (ms, count) in sorted(idle.items(), key=lambda item: -item[1][0])[:15]
        ],
    }


def run_ours(workload: Workload, batch: int, steps: int, clock: Clock, variant: str) -> list[float]:
    """Through the Trainer, with logging, as a user would. Returns the losses."""
    import lightning as pl
    from lightning.pytorch.loggers import CSVLogger

    import lightning_megatron as lm

    losses: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(outputs["loss"])
            clock.step_done()

    module = workload.module()
    module.fused = variant != "unfused"
    fp8 = lm.Float8(**FLOAT8[variant]) if variant in FLOAT8 else False
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        strategy=lm.MegatronStrategy(micro_batch_size=batch),
        plugins=[lm.MegatronPrecision("bf16-mixed", fp8=fp8)],
        max_steps=steps,
        logger=CSVLogger(os.environ.get("TMPDIR", "/tmp")),
        log_every_n_steps=5,
        callbacks=[Watch()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, RandomTokens(workload, batch, steps))
    return [float(loss) for loss in losses]


def run_peer(workload: Workload, batch: int, steps: int, clock: Clock, name: str) -> list[float]:
    """One of :mod:`benchmarks.peers`, with the same batches."""
    from benchmarks import megatron_peers, peers

    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    build: dict[str, Callable[[Workload], Callable[[Batch], Tensor]]] = {
        "nano": peers.nano,
        "huggingface": peers.huggingface,
        "megatron-core": partial(megatron_peers.megatron, layers="megatron-core"),
        "transformer-engine": partial(megatron_peers.megatron, layers="transformer-engine"),
    }
    step = build[name](workload)
    losses = []
    for data in RandomTokens(workload, batch, steps):
        losses.append(step({name: tensor.cuda(non_blocking=True) for name, tensor in data.items()}))
        clock.step_done()
    return [float(loss) for loss in losses]


def measure(variant: str, model: str, batch: int, steps: int, profile: bool) -> dict[str, Any]:
    """One variant in this process."""
    workload = WORKLOADS[model]()
    clock = Clock(steps - PROFILED - 1 if profile else None)
    began = time.time()
    if variant in ("ours", "unfused", *FLOAT8):
        losses = run_ours(workload, batch, steps, clock, variant)
    else:
        losses = run_peer(workload, batch, steps, clock, variant)
    times = clock.times()
    milliseconds = median(times)
    samples = batch / milliseconds * 1000
    return {
        "variant": variant,
        "model": model,
        "batch": batch,
        "ms": round(milliseconds, 2),
        "spread": [round(min(times), 2), round(max(times), 2)],
        "tokens_per_s": round(samples * workload.tokens_per_sample),
        "mfu": round(samples * workload.flops_per_sample / PEAK, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "loss": [round(losses[i], 4) for i in (0, 1, len(losses) // 2, -1)],
        "wall_s": round(time.time() - began, 1),
        **clock.kernels,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in ("triton", "megatron-core", "lightning", "transformers", "transformer-engine", "apex"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


def run_apart(variant: str, model: str, batch: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """One variant in a process of its own, whose result is printed; ``None`` if it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--here", "--variants", variant, "--model", model]
    command += ["--batches", str(batch), "--steps", str(options.steps)] + ["--profile"] * options.profile
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        output = f"no result in {options.timeout} s\n{(error.stderr or b'')[-2000:]!r}"
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{variant} of {model}, batch {batch}, failed:\n{output[-4000:]}", flush=True)
        return None
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    listings = result.pop("top", []), result.pop("idle", [])
    print(json.dumps(result), *itertools.chain(*listings), sep="\n", flush=True)
    return result


def compare(results: list[dict[str, Any]]) -> Iterator[str]:
    """How many times as fast as each other variant of the run the first one was, by model and batch."""
    for (model, batch), group in itertools.groupby(results, key=lambda result: (result["model"], result["batch"])):
        first, *others = group
        for other in others:
            ratio = other["ms"] / first["ms"]
            yield f"{model} batch {batch}: {first['variant']} is {ratio:.3f} times as fast as {other['variant']}"


def main() -> None:
    """Run the variants of each model and batch one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=(*VARIANTS, *FLOAT8))
    parser.add_argument("--batches", nargs="+", type=int, help="samples of a step; by default what each model is for")
    parser.add_argument("--model", nargs="+", default=["gpt2-large"], choices=tuple(WORKLOADS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="list the kernels of a few steps")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds per variant and batch")
    parser.add_argument("--here", action="store_true", help="in this process (one variant, one model, one batch)")
    options = parser.parse_args()
    if options.here:
        result = measure(options.variants[0], options.model[0], options.batches[0], options.steps, options.profile)
        print("RESULT " + json.dumps(result), flush=True)
        return
    print(json.dumps(_versions()), flush=True)
    if "transformer-engine" in options.variants:
        from benchmarks.megatron_peers import unavailable

        reason = unavailable("transformer-engine")
        if reason is not None:
            print(f"transformer-engine is left out: {reason}", flush=True)
            options.variants.remove("transformer-engine")
    results = []
    for model in options.model:
        for batch in options.batches or BATCHES.get(model, (8, 24)):
            for variant in options.variants:
                results.append(run_apart(variant, model, batch, options))
    print(*compare([result for result in results if result is not None]), sep="\n")


if __name__ == "__main__":
    main()
