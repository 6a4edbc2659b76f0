"""What the converter knows of an architecture, and where the tables are.

An architecture of Hugging Face is a module of this package with an ``ARCHITECTURE`` for each of its model types. To add
one, write the module and name it in ``_MODULES``.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop.mapping import Table
from lightning_megatron.models.config import TransformerModelConfig

_MODULES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "megatron-bert": "megatron_bert",
    "bert": "bert",
    "t5": "t5",
    "mt5": "t5",
}
"""The module of each ``model_type``. The first that can express a configuration is what it is saved as."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One ``model_type`` of Hugging Face."""

    model_type: str
    config_type: type[TransformerModelConfig]
    """Of ours."""
    read: Callable[[Mapping[str, Any], Collection[str]], Any]
    """Our configuration from theirs (all fields, with defaults) and the names of their tensors. Raises ValueError for a
    choice that our model does not have."""
    write: Callable[[Any], dict[str, Any]]
    """Their fields from our configuration. Raises ValueError for a choice that theirs does not have."""
    table: Callable[[Any], Table]
    """Names and transforms of a model of our configuration."""
    class_name: Callable[[Any], str]
    """The class of transformers that has all the tensors of our configuration."""
    classes: tuple[str, ...]
    """Classes of transformers whose directories can be read."""
    reads: tuple[str, ...]
    """Fields of ``config.json`` that :attr:`read` computes with or checks."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields with the only values that the architecture computes here."""
    ties: tuple[tuple[str, str], ...] = ()
    """``(copy, original)``: tensors that are one if the configuration says ``tie_word_embeddings`` and the files do not
    hold two different ones, as transformers decides it."""
    arrange: Callable[[dict[str, Any], bool], None] = lambda tensors, tied: None
    """Changes the tensors by name, once copies are gone, to those of the table; given ``tie_word_embeddings``."""
    prefix: str = ""
    """Of the names of all but the heads, which directories saved without heads leave out."""
    heads: tuple[str, ...] = ()
    """Patterns of the names of heads, which never have the prefix."""
    ignored: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Patterns of the names of tensors that hold nothing of their own, or that a model of our configuration lacks."""
    generates: bool = True
    """Whether a directory has a generation configuration."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of names that old versions of transformers wrote otherwise."""

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """The names of this version of transformers, each with the name in the files.

        Raises:
            CheckpointError: two names in the files are one in this version.
        """
        found: dict[str, str] = {}
        for name in names:
            new = name
            for old, current in self.renamed.items():
                new = new.replace(old, current)
            if self.prefix and not new.startswith(self.prefix) and not _any(new, self.heads):
                new = self.prefix + new
            if new in found:
                raise CheckpointError(f"{found[new]} and {name} are both {new}. Keep one of them.")
            found[new] = name
        return found

    def ignores(self, config: TransformerModelConfig, name: str) -> bool:
        """Whether a tensor of this canonical name is not needed."""
        return _any(name, self.ignored(config))


def without_copies(architecture: Architecture, tied: bool, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by name, with each tied tensor once and by the original's name.

    Args:
        tied: ``tie_word_embeddings`` of the configuration.
        tensors: of the files; two that are tied are compared, a block of rows at a time.
    """
    found = dict(tensors)
    for copy, original in architecture.ties if tied else ():
        if copy in found and original not in found:
            found[original] = found.pop(copy)
        elif copy in found and same_values(found[copy], found[original]):
            del found[copy]
    architecture.arrange(found, tied)
    return found


def same_values(one: Any, other: Any, block: int = 2**22) -> bool:
    """Whether two stored tensors are equal, reading at most ``block`` elements of each at a time."""
    if one.shape != other.shape or one.dtype != other.dtype or not one.shape:
        return False
    rest = tuple(slice(0, size) for size in one.shape[1:])
    rows = max(1, block // max(1, math.prod(one.shape[1:])))
    places = ((slice(start, min(start + rows, one.shape[0])), *rest) for start in range(0, one.shape[0], rows))
    return all(bool((one[place] == other[place]).all()) for place in places)


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def supported() -> tuple[str, ...]:
    """All model types."""
    return tuple(_MODULES)


def architecture(model_type: str, *, where: Any = None) -> Architecture:
    """The architecture of a ``model_type``.

    Raises:
        CheckpointError: it is not supported; the message names the nearest.
    """
    if not isinstance(model_type, str) or model_type not in _MODULES:
        near = difflib.get_close_matches(str(model_type), _MODULES, n=1, cutoff=0.0)[0]
        place = f" in {where}" if where else ""
        raise CheckpointError(
            f"model_type={model_type!r:.60}{place} is not supported. The nearest that is, by name, is {near!r}; all "
            f"are {', '.join(_MODULES)}."
        )
    module = importlib.import_module(f"lightning_megatron.interop.{_MODULES[model_type]}")
    return next(found for found in _of(module) if found.model_type == model_type)


def _of(module: Any) -> Iterator[Architecture]:
    yield from (value for value in vars(module).values() if isinstance(value, Architecture))


def architecture_for(config: TransformerModelConfig, model_type: str | None = None) -> Architecture:
    """The architecture that a model of our configuration is saved as.

    Args:
        model_type: which, if several could.

    Raises:
        CheckpointError: none can express the configuration, or the one asked for cannot; with each one's reason.
    """
    reasons = []
    for name in _MODULES if model_type is None else (model_type,):
        candidate = architecture(name)
        if not isinstance(config, candidate.config_type):
            reasons.append(f"{name} is no {type(config).__name__}")
            continue
        try:
            candidate.write(config)
            return candidate
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    raise CheckpointError(
        f"No architecture of Hugging Face has the choices of this {type(config).__name__}. " + "; ".join(reasons)
    )


def need(theirs: Mapping[str, Any] | Any, **wanted: Any) -> None:
    """Check that fields have the only values that an architecture has.

    Raises:
        ValueError: they do not.
    """
    for name, value in wanted.items():
        found = theirs.get(name) if isinstance(theirs, Mapping) else getattr(theirs, name)
        if found != value and not (found is None and value is False):
            raise ValueError(f"{name}={found!r}, where only {value!r} is possible.")
