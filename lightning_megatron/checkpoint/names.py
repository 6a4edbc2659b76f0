"""Compares the names and shapes of a model with those of a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_megatron.backends.shards import Shard, Sizes
from lightning_megatron.lora import is_adapter

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where a model and a checkpoint differ."""

    missing: tuple[str, ...]
    """Names of the model that the checkpoint lacks."""
    unexpected: tuple[str, ...]
    """Names in the checkpoint that the model lacks."""
    reshaped: tuple[tuple[str, Sizes, Sizes], ...]
    """Names with their shape in the checkpoint and in the model."""

    @classmethod
    def between(
        cls, wanted: Mapping[str, tuple[Sizes, bool]], saved: Mapping[str, Sizes], *, same_vocabulary: bool
    ) -> Mismatch:
        """``wanted`` holds shapes, and whether dimension 0 may be padded differently."""
        reshaped = []
        for name in _sorted(wanted.keys() & saved.keys()):
            (shape, resizable), there = wanted[name], saved[name]
            may_differ = resizable and same_vocabulary and shape[1:] == there[1:]
            if shape != there and not may_differ:
                reshaped.append((name, there, shape))
        return cls(
            tuple(_sorted(wanted.keys() - saved.keys())), tuple(_sorted(saved.keys() - wanted.keys())), tuple(reshaped)
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def describe(self, path: Path) -> str:
        """All of it, with the nearest names in the checkpoint beside those that are missing there."""
        if not self.reshaped and (remedy := self._adapters(path)):
            return remedy
        lines = [f"The checkpoint at {path} is of another model."]
        if self.missing:
            near = {name: difflib.get_close_matches(name, self.unexpected, n=1) for name in self.missing[:_SHOWN]}
            lines.append(f"  {len(self.missing)} names of the model are missing in it:")
            lines += [f"    {name}" + (f" (nearest there: {n[0]})" if n else "") for name, n in near.items()]
            lines += _more(self.missing)
        if self.unexpected:
            lines.append(f"  {len(self.unexpected)} names in it are not the model's:")
            lines += [f"    {name}" for name in self.unexpected[:_SHOWN]]
            lines += _more(self.unexpected)
        if self.reshaped:
            lines.append(f"  {len(self.reshaped)} shapes differ:")
            lines += [
                f"    {name}: {list(there)} in the checkpoint, {list(here)} in the model"
                for name, there, here in self.reshaped[:_SHOWN]
            ]
            lines += _more(self.reshaped)
        advice = "" if self.reshaped else ", or load with strict=False"
        lines.append(f"Build the model with the configuration in its lightning_megatron.json{advice}.")
        return "\n".join(lines)

    def _adapters(self, path: Path) -> str:
        """What to do if the model and the checkpoint differ in their adapters of LoRA alone."""
        missing, unexpected = (
            [name for name in names if not name.startswith("optimizer.")] for names in (self.missing, self.unexpected)
        )
        if missing and not unexpected and all(map(is_adapter, missing)):
            return (
                f"The checkpoint at {path} has no adapters of LoRA, but this model has lora=LoRAConfig(...). To train "
                "adapters on top of its weights, leave ckpt_path out and start from them with "
                f"callbacks=[lightning_megatron.callbacks.InitialWeights({str(path)!r})]."
            )
        if unexpected and not missing and all(map(is_adapter, unexpected)):
            return (
                f"The checkpoint at {path} has adapters of LoRA, but this model has none. Set module.lora to the "
                "LoRAConfig in its lightning_megatron.json before the module is built, or merge the adapters into the "
                "weights with `lightning-megatron convert`."
            )
        return ""


def _sorted(names: Iterable[str]) -> list[str]:
    """Weights before the optimizer's state for them, which has the same faults."""
    return sorted(names, key=lambda name: (name.startswith("optimizer."), name))


def _more(names: tuple[object, ...]) -> list[str]:
    return [f"    and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []


def shapes(shards: Iterable[Shard]) -> dict[str, tuple[Sizes, bool]]:
    """Global shapes by name, and whether dimension 0 may be padded differently."""
    return {shard.key: (shard.global_shape, shard.resizable) for shard in shards}
