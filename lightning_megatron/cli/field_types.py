"""The types of the fields of what a configuration makes, and whether YAML's values have them."""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any


def parameters(target: Any) -> tuple[dict[str, Any], bool]:
    """Type by name of what ``target`` takes, and whether it takes any other name too."""
    if is_dataclass(target):
        hints = typing.get_type_hints(target)
        return {field.name: hints[field.name] for field in fields(target)}, False
    function = target.__init__ if inspect.isclass(target) else target
    parameters = inspect.signature(function).parameters
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations that only a type checker can import
        hints = {}
    named = {name: hints.get(name, Any) for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    named.pop("self", None)
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML's types can be one of ``hint``; types that YAML cannot express fit anything."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is type(None) or hint is None:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if inspect.isclass(hint) and hint.__module__ == "pathlib":
        return isinstance(value, str)
    return True


def spell(hint: Any) -> str:
    """A type as a message shows it."""
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")
