"""Optimizer configuration: frozen, standard library only, in Megatron's field names; lengths in optimizer steps."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, Literal

OPTIMIZERS = ("adam", "sgd")
DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WEIGHT_DECAY_STYLES = ("constant", "linear", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW (or SGD) with Megatron's schedules.

    Raises:
        ValueError: a name that does not exist, a negative rate, a warm-up longer than the schedule.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_warmup_steps: int = 0
    lr_warmup_init: float = 0.0
    lr_decay_steps: int | None = None
    """Steps until ``min_lr``; ``None`` is the length of the training run, which must then be known before it begins."""
    lr_wsd_decay_steps: int | None = None
    """With ``"WSD"`` (warm-up, stable, decay; arXiv:2404.06395): the length of the last, decaying part."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    weight_decay: float = 0.01
    """Decoupled weight decay (arXiv:1711.05101); vectors (biases, norms) are exempt."""
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off. ``Trainer(gradient_clip_val=...)`` wins over it."""

    def __post_init__(self) -> None:
        self._choice("optimizer", OPTIMIZERS)
        self._choice("lr_decay_style", DECAY_STYLES)
        self._choice("weight_decay_incr_style", WEIGHT_DECAY_STYLES)
        for name in ("lr", "min_lr", "lr_warmup_init", "lr_warmup_steps", "weight_decay", "clip_grad", "adam_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} is negative.")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr!r} is larger than lr={self.lr!r}.")
        if self.lr_decay_steps is not None and self.lr_warmup_steps >= self.lr_decay_steps:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} is not smaller than lr_decay_steps={self.lr_decay_steps}."
            )
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_steps is None:
            raise ValueError("lr_decay_style='WSD' needs lr_wsd_decay_steps.")
        if (self.start_weight_decay is None) != (self.end_weight_decay is None):
            raise ValueError("start_weight_decay and end_weight_decay come together; only one was given.")
        if self.weight_decay_incr_style != "constant" and self.start_weight_decay is None:
            raise ValueError(
                f"weight_decay_incr_style={self.weight_decay_incr_style!r} needs start_weight_decay and "
                "end_weight_decay."
            )

    @property
    def needs_total_steps(self) -> bool:
        """Whether a schedule goes on for the length of the run, because no other is given."""
        over_the_run = self.lr_decay_steps is None and self.lr_decay_style in ("linear", "cosine", "WSD")
        return over_the_run or self.weight_decay_incr_style != "constant"

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.{hint}")

    def replace(self, **changes: Any) -> OptimizerConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)
