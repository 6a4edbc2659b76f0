"""One rank of :mod:`benchmarks.multi_gpu`: does its share of the jobs, one after another, and rank 0 tells.

    python -m benchmarks.multi_gpu_rank DIRECTORY    # with torchrun's variables

The driver leaves the jobs in the directory and reads what rank 0 writes into it. A job on fewer ranks is one of the
first so many, in a process group of its own.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_megatron as lm
from benchmarks.multi_gpu_events import Events, Setting
from benchmarks.multi_gpu_kinds import Decoding, Generation, Job, Layout, Speed, Training
from benchmarks.multi_gpu_profile import Span, kernels, summary
from benchmarks.workloads import WORKLOADS, Batch, Workload
from lightning_megatron.backends import core
from lightning_megatron.backends.groups import release_recorded
from lightning_megatron.callbacks import Heartbeat
from lightning_megatron.callbacks.clock import Moment, now
from lightning_megatron.callbacks.throughput import peak_flops
from lightning_megatron.generation import GenerationConfig
from lightning_megatron.generation.api import build_engine

PROFILED = 3
GLOBAL_BATCH, MICRO_BATCH = 16, 2
SILENCE = 20.0
"""Seconds without progress after which the ranks beside a killed one are freed."""
PROMPTS = [[5, 17, 3, 90, 41], [7], [100, 1, 33, 58, 12, 6, 6, 71, 20], [9, 9, 9], [44, 2]]
NEW_TOKENS = 20


# ---------------------------------------------------------------------------------------------------- training


class Tokens:
    """The same few random samples in order, of which each replica gets its share of each global batch."""

    def __init__(self, module: pl.LightningModule, config: lm.GPTConfig, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._text = torch.randint(
            0, config.vocab_size, (4 * GLOBAL_BATCH, config.max_position_embeddings + 1), generator=generator
        )
        self._module, self._steps = module, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        strategy: Any = self._module.trainer.strategy
        share = GLOBAL_BATCH // strategy.data_parallel_size
        for step in range(self._steps):
            start = step % 4 * GLOBAL_BATCH + strategy.data_parallel_rank * share
            text = self._text[start : start + share]
            yield {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}


class Record(pl.Callback):
    """Losses and gradient norms of every step; with ``events``, tells of each."""

    def __init__(self, events: Events | None) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._events = events

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called by Lightning."""
        self.losses.append(float(outputs["loss"]))
        self.norms.append(float(trainer.strategy.megatron_optimizer.grad_norm))  # type: ignore[attr-defined]
        if self._events is not None:
            self._events.tell(step=trainer.global_step)


def small_gpt(setting: Setting, **changes: Any) -> lm.GPTConfig:
    """The model whose numbers are compared."""
    hidden, sequence = (64, 32) if setting.tiny else (256, 128)
    config = lm.GPTConfig(
        num_layers=4,
        hidden_size=hidden,
        num_attention_heads=8,
        vocab_size=256,
        make_vocab_size_divisible_by=32,
        max_position_embeddings=sequence,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return config.replace(**changes)


EXPERTS = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.01, "add_bias_linear": False}
"""Without biases, which megatron-core's experts have at TP=1 alone."""


def strategy_of(layout: Layout, micro_batch_size: int, seed: int = 0) -> lm.MegatronStrategy:
    """The strategy of a layout. On a GPU weights depend on it, so here they do everywhere: each has a seed of its own.

    What is to be equal has its weights from a checkpoint.
    """
    return lm.MegatronStrategy(
        layout.sizes,
        micro_batch_size=micro_batch_size,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        seed=zlib.crc32(str(layout).encode()) % 1000 + seed,
    )


def trainer_of(setting: Setting, strategy: lm.MegatronStrategy, gpus: int, **options: Any) -> pl.Trainer:
    """A Trainer that prints and writes nothing unless asked."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    accelerator = "gpu" if setting.device == "cuda" else "cpu"
    return pl.Trainer(strategy=strategy, accelerator=accelerator, devices=gpus, **{**quiet, **options})


def train(job: Training, setting: Setting, events: Events) -> dict[str, Any]:
    """Losses and gradient norms of the steps taken."""
    config = small_gpt(setting, **(EXPERTS if job.experts else {}))
    module = lm.GPTModule(config, lm.OptimizerConfig(lr=2e-3, lr_warmup_steps=2, lr_decay_steps=100))
    tells = job.kill_at is not None and os.environ["RANK"] == "0"
    record = Record(events if tells else None)
    callbacks: list[pl.Callback] = [record]
    if job.kill_at is not None:
        callbacks.append(Heartbeat(SILENCE, exit_after=10.0))
    if job.checkpoints is not None:
        folder = setting.directory / job.checkpoints
        callbacks.append(ModelCheckpoint(folder, save_last=True, save_top_k=1, every_n_train_steps=1))
    trainer = trainer_of(
        setting,
        strategy_of(job.layout, MICRO_BATCH, job.seed),
        job.layout.gpus,
        precision=job.precision,
        max_steps=job.steps,
        callbacks=callbacks,
        enable_checkpointing=job.checkpoints is not None,
    )
    load = str(setting.directory / job.load) if job.load else "last" if job.checkpoints and not job.kill_at else None
    trainer.fit(module, Tokens(module, config, 100), ckpt_path=load)
    if job.save is not None:
        trainer.save_checkpoint(setting.directory / job.save)
    return {"losses": record.losses, "norms": record.norms}


# ------------------------------------------------------------------------------------------------------- speed


class RandomTokens:
    """Batches of a replica, over and over."""

    def __init__(self, module: pl.LightningModule, workload: Workload, samples: int, steps: int) -> None:
        self._module, self._workload, self._samples, self._steps = module, workload, samples, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        replica: int = self._module.trainer.strategy.data_parallel_rank  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(replica)
        batches = [self._workload.batch(self._samples, generator) for _ in range(2)]
        return (batches[step % len(batches)] for step in range(self._steps))


class Clock(pl.Callback):
    """When each step was done on the device; the losses, left there; and a profile of what comes after on rank 0."""

    def __init__(self, job: Speed) -> None:
        self.moments: list[Moment] = []
        self.losses: list[torch.Tensor] = []
        self.spans: list[Span] = []
        self._timed = job.warm_up + job.timed
        self._profiles = job.profiled and torch.cuda.is_available() and os.environ["RANK"] == "0"
        self._profiler: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called by Lightning."""
        self.moments.append(now(trainer.strategy.root_device))
        self.losses.append(outputs["loss"])
        if self._profiles and len(self.moments) == self._timed + 1:
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Called by Lightning."""
        if self._profiler is not None:
            torch.cuda.synchronize()
            self._profiler.stop()
            self.spans = kernels(self._profiler)

    def seconds(self, warm_up: int) -> list[float]:
        """Of each step between the warm-up and the profile."""
        timed = self.moments[warm_up - 1 : self._timed]
        return [later.since(earlier) for earlier, later in itertools.pairwise(timed)]


def measure(job: Speed, setting: Setting) -> dict[str, Any]:
    """Tokens per second, MFU, memory."""
    workload = WORKLOADS[job.model]()
    module, clock = workload.module(), Clock(job)
    steps = job.warm_up + job.timed + (PROFILED + 1) * (job.profiled and setting.device == "cuda")
    before = 0
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # should be next to nothing, or an earlier job's is in the peak
    trainer = trainer_of(
        setting,
        strategy_of(job.layout, job.micro_batch_size),
        job.layout.gpus,
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=[clock],
    )
    samples = job.micro_batch_size * job.num_micro_batches
    trainer.fit(module, RandomTokens(module, workload, samples, steps))
    if setting.device == "cuda":
        torch.cuda.synchronize()
    times = clock.seconds(job.warm_up)
    rate = samples * job.layout.data_parallel_size / job.layout.gpus / median(times)  # samples per GPU and second
    numbers: dict[str, Any] = {
        "ms": median(times) * 1e3,
        "fastest_ms": min(times) * 1e3,
        "slowest_ms": max(times) * 1e3,
        "tokens_per_s_per_gpu": rate * workload.tokens_per_sample,
        "tflops_per_gpu": rate * workload.flops_per_sample / 1e12,
        "losses": [float(clock.losses[0]), float(clock.losses[-1])],
    }
    if setting.device == "cuda":
        peak = peak_flops(trainer.strategy.root_device, "bf16-mixed")
        numbers["device"] = torch.cuda.get_device_name()
        numbers["mfu"] = rate * workload.flops_per_sample / peak if peak else None
        numbers["gib_before"] = before / 2**30
        numbers["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        # What CUDA graphs hold no longer counts as allocated once they are captured, but it is reserved.
        numbers["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return numbers | (summary(clock.spans, PROFILED) if clock.spans else {})


# -------------------------------------------------------------------------------------------------- generation


def generate(job: Generation, setting: Setting) -> dict[str, Any]:
    """Greedy tokens, from weights so large that texts differ."""
    config = small_gpt(setting, init_method_std=0.2)
    module = lm.GPTModule(config)
    trainer = trainer_of(setting, strategy_of(job.layout, MICRO_BATCH), job.layout.gpus, limit_val_batches=1)
    weights = setting.directory / "weights"
    trainer.validate(module, Tokens(module, config, 1), ckpt_path=weights if job.reference else None, verbose=False)
    if job.reference is None:
        trainer.save_checkpoint(weights)
    texts = [list(found.new_tokens) for found in module.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]
    began = time.perf_counter()
    module.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    return {"tokens": texts, "tokens_per_s": len(PROMPTS) * NEW_TOKENS / (time.perf_counter() - began)}


def decode(job: Decoding, setting: Setting) -> dict[str, Any]:
    """Greedy tokens per second of all prompts together, the fastest of a few calls."""
    workload = WORKLOADS[job.model]()
    module = workload.module()
    precision = "bf16-true" if setting.device == "cuda" else "32-true"
    strategy = strategy_of(job.layout, 1)
    trainer = trainer_of(setting, strategy, job.layout.gpus, precision=precision, limit_val_batches=1)
    trainer.validate(module, RandomTokens(module, workload, 1, 1), verbose=False)
    engine = build_engine(module)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, module.config.vocab_size, (job.batch, job.prompt), generator=generator).tolist()
    config = GenerationConfig(max_new_tokens=job.new)
    engine.generate(prompts, config)  # records the steps
    times = []
    for _ in range(job.repeats):
        began = time.perf_counter()
        found = engine.generate(prompts, config)
        times.append(time.perf_counter() - began)
    engine.decoder.release()
    return {"tokens_per_s": job.batch * job.new / min(times), "tokens": [list(one.new_tokens) for one in found]}


# -------------------------------------------------------------------------------------------------- the process


def run(job: Job, setting: Setting, events: Events) -> list[dict[str, Any]]:
    """The job's numbers on each rank."""
    if isinstance(job, Training):
        numbers = train(job, setting, events)
    elif isinstance(job, Speed):
        numbers = measure(job, setting)
    elif isinstance(job, Decoding):
        numbers = decode(job, setting)
    else:
        assert isinstance(job, Generation)
        numbers = generate(job, setting)
    gathered: list[Any] = [None] * job.layout.gpus
    dist.all_gather_object(gathered, numbers)
    return gathered


def leave_groups() -> None:
    """Let the next job start as a new process would."""
    release_recorded()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if core.parallel_state.model_parallel_is_initialized():
        core.parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()  # models and strategies are in cycles, and hold memory and groups
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with(driver: int) -> None:
    while os.getppid() == driver:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Run the jobs that this rank takes part in."""
    # A driver that is killed cannot end its ranks, which would keep their GPUs.
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the driver asks a rank that hangs where it is
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("highest")  # TF32 is not fp32
    directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    setting: Setting
    jobs: list[Job]
    setting, jobs = pickle.loads((directory / "jobs.pickle").read_bytes())
    if setting.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # or what comes before the strategy's would use the first
    events = Events(directory)
    for index, job in enumerate(jobs):
        if rank >= job.layout.gpus:
            continue
        if rank == 0:
            port = free_port()
            events.tell(begin=index, port=port)
        else:
            port = events.port_of(index)
        size = str(job.layout.gpus)
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": str(port)}
        began = time.monotonic()
        gathered = run(job, setting, events)
        if rank == 0:
            events.tell(end=index, ranks=gathered, wall_s=round(time.monotonic() - began, 2))
        leave_groups()


if __name__ == "__main__":
    main()
