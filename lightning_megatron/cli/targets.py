"""Which objects a configuration may make: an allow-list, which the environment extends, and what the user types.

Hydra makes whatever a ``_target_`` names, and refuses only a list of known dangers. A file of somebody else's should
name nothing but parts of this package and of Lightning.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig
from omegaconf.base import Node

ALLOWED = (
    "lightning_megatron",
    "lightning.pytorch.Trainer",
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "plugins", "profilers", "strategies")),
)
"""Prefixes of the classes that a configuration may name."""
HYDRA = ("hydra._internal.core_plugins", "hydra_plugins")
"""The same below ``hydra``: launchers and sweepers."""
ENVIRONMENT = "LIGHTNING_MEGATRON_TARGETS"
"""Further prefixes, separated by commas."""
_HOMES = ("lightning_megatron", "lightning.pytorch", "lightning.fabric")
"""Packages whose classes are behind the names of the allow-list."""


def within(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted name is one of the prefixes, or below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def extended() -> tuple[str, ...]:
    """Prefixes that the environment adds."""
    return tuple(filter(None, (part.strip() for part in os.environ.get(ENVIRONMENT, "").split(","))))


def typed(overrides: Iterable[str]) -> frozenset[str]:
    """Targets that are written in overrides of the command line, which is the user's own word."""
    found: set[str] = set()
    for line in overrides:
        try:
            override = OverridesParser.create().parse_overrides([line])[0]
            value = override.value()
        except (HydraException, ValueError):
            continue
        if override.key_or_group.rpartition(".")[2] == "_target_" and isinstance(value, str):
            found.add(value)
        found.update(_written(value))
    return frozenset(found)


def _written(value: Any) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        if str(key) == "_target_" and isinstance(inner, str):
            yield inner
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _written(child)


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Path and node of everything that has a ``_target_``, in lists and behind interpolations too, as Hydra finds it.

    Raises:
        RecursionError: a node that is inside of itself.
    """
    if isinstance(node, Node) and node._is_interpolation():
        node = node._maybe_dereference_node()  # None if a value is missing
    if not isinstance(node, (DictConfig, ListConfig)) or node._is_missing() or node._is_none():
        return
    if isinstance(node, ListConfig):
        for index in range(len(node)):
            yield from nodes(node._get_node(index), f"{path}[{index}]")
        return
    if "_target_" in node:
        yield path, node
    for key in node:
        yield from nodes(node._get_node(key), f"{path}.{key!s}" if path else str(key))


def refusal(name: object, path: str, own: Collection[str], allowed: Iterable[str] = ALLOWED) -> str | None:
    """Why a configuration may not name this target, before anything of it is imported; ``None`` if it may.

    Args:
        path: of the node.
        own: targets that the user typed.
    """
    if isinstance(name, str) and (name in own or within(name, (*allowed, *extended()))):
        return None
    prefix = name.partition(".")[0] if isinstance(name, str) else "my_package"
    return (
        f"{path}._target_={name!r:.100} is nothing that a configuration may make: {', '.join(allowed)}. If you trust "
        f"it, name its module in the environment, {ENVIRONMENT}={prefix}, or write the _target_ on the command line."
    )


def locate(name: str, own: Collection[str]) -> Any:
    """The object of a target that is not refused.

    Raises:
        ImportError, AttributeError, ValueError: there is none.
        PermissionError: a name of the allow-list behind which is something else than a class of its packages.
    """
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if name in own or within(name, extended()):
        return found
    home = f"{found.__module__}.{found.__qualname__}" if inspect.isclass(found) else ""
    if not within(home, _HOMES):
        raise PermissionError(f"it is no class of {', '.join(_HOMES)}, but {home or type(found).__name__}")
    return found
