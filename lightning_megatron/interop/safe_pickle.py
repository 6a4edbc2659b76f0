"""Reads what ``torch.save`` wrote without running code that is in it."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from lightning_megatron.errors import CheckpointError

_REAL = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
}
"""Beside what torch loads by itself: tensors, containers, numbers."""

_INERT = ("megatron", "apex", "transformer_engine", "numpy", "pathlib", "deepspeed")
"""Packages of whose classes Megatron-LM keeps objects, such as enums, loss scalers and random states. In their place
come objects that hold what the file says of them, and do nothing."""


class Inert:
    """Stands for an object of a class that is not loaded."""

    name = "?"

    def __init__(self, *args: Any) -> None:
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}>"


def load(path: Path, data: bytes | None = None) -> Any:
    """What a file of ``torch.save`` holds, its tensors mapped where the file's format allows.

    Args:
        data: the file's contents, if it is a part of the one at ``path``.

    Raises:
        CheckpointError: the file is cut short or damaged, or holds objects of classes that are not on the list of those
            that Megatron-LM writes: such a file could run any code. None of it was run.
    """
    try:
        zipped = zipfile.is_zipfile(path if data is None else BytesIO(data))
        wanted = sorted(set(_globals(path if data is None else BytesIO(data), zipped)))
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(_damaged(path, error)) from error
    allowed: list[Any] = []
    for name in wanted:
        module, _, qualified = name.partition(" ")
        full = f"{module}.{qualified}"
        if full in _REAL:
            allowed.append((_REAL[full], full))
        elif module.split(".")[0] in _INERT:
            allowed.append((type("Inert", (Inert,), {"name": full}), full))
        elif not _torch_loads(module):
            raise CheckpointError(
                f"{path} asks for {full} when it is unpickled, which is not on the list of what Megatron-LM writes and "
                "could run any code. Nothing of it was run or loaded. If you know where the file comes from, load it "
                "with torch.load(weights_only=False), and save its 'model', 'args' and 'checkpoint_version' alone."
            )
    try:
        with _only(allowed):
            if data is not None:
                return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} was not loaded: {str(error).splitlines()[0]}") from error
    except Exception as error:
        raise CheckpointError(_damaged(path, error)) from error


@contextmanager
def _only(allowed: list[Any]) -> Iterator[None]:
    """Without what other libraries of the process let torch load."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(allowed)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _damaged(path: Path, error: Exception) -> str:
    size = path.stat().st_size if path.is_file() else 0
    return f"{path} is no whole file of torch.save ({size} bytes): {error}. Was it cut short?"


def _torch_loads(module: str) -> bool:
    """Whether it is for torch's own loader of weights, which has a list of its own, to decide."""
    return module.split(".", maxsplit=1)[0] in ("torch", "collections", "_codecs", "copyreg")


def _globals(source: Path | BytesIO, zipped: bool) -> Iterator[str]:
    """``module name`` of everything that unpickling would import. Nothing is unpickled."""
    if zipped:
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if not names:
                raise ValueError("there is no data.pkl in the archive")
            with archive.open(names[0]) as file:
                yield from _globals_of(pickletools.genops(file))
        return
    with source if isinstance(source, BytesIO) else open(source, "rb") as file:
        for _ in range(5):  # magic number, version, system, the object itself, keys of storages
            yield from _globals_of(pickletools.genops(file))


def _globals_of(operations: Iterator[Any]) -> Iterator[str]:
    strings: list[str] = []
    for operation, argument, _ in operations:
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif operation.name == "STACK_GLOBAL":
            # The two strings before are its operands, unless they come from the memo; then torch's loader decides.
            yield " ".join(strings[-2:]) if len(strings) > 1 else "? ?"
        elif isinstance(argument, str):
            strings.append(argument)
