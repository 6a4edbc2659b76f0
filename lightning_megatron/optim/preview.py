"""The learning rate of each step of a run, without torch: for plots before and after it."""

from __future__ import annotations

import math

from lightning_megatron.optim.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step ``step``, counted from 0, of a run of ``total_steps``; megatron-core's schedules."""
    decay_steps = config.lr_decay_steps or max(total_steps, config.lr_warmup_steps + 1, 1)
    warmup = config.lr_warmup_steps
    if warmup > 0 and step <= warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * step / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if step > decay_steps:
        return config.min_lr
    if config.lr_decay_style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / max(step, 1)))
    return config.min_lr + (config.lr - config.min_lr) * _coefficient(config, step, decay_steps)


def _coefficient(config: OptimizerConfig, step: int, decay_steps: int) -> float:
    """From 1 at the peak to 0 at the end."""
    if config.lr_decay_style != "WSD":
        return _decayed(config.lr_decay_style, (step - config.lr_warmup_steps) / (decay_steps - config.lr_warmup_steps))
    length = config.lr_wsd_decay_steps or 1
    start = decay_steps - length
    return 1.0 if step <= start else _decayed(config.lr_wsd_decay_style, (step - start) / length)


def _decayed(style: str, part: float) -> float:
    return {
        "linear": 1.0 - part,
        "cosine": 0.5 * (math.cos(math.pi * part) + 1.0),
        "exponential": 2.0 * 0.5**part - 1.0,
        "minus_sqrt": 1.0 - math.sqrt(part),
    }[style]


def learning_rates(config: OptimizerConfig, total_steps: int, points: int = 500) -> list[tuple[int, float]]:
    """``(step, rate)`` over a run, at most about ``points`` of them, the last step included."""
    stride = max(1, total_steps // points)
    steps = [*range(0, total_steps, stride), total_steps]
    return [(step, learning_rate(config, step, total_steps)) for step in dict.fromkeys(steps)]
