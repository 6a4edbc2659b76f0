"""Reads the Trainer's state, ``lightning.pt``, of which a checkpoint's writer decides what is in it.

By default it may hold ``None``, ``bool``, ``int``, ``float``, ``complex``, ``str``, ``bytes``, ``bytearray``, ``dict``,
``OrderedDict``, ``Counter``, ``list``, ``tuple``, ``set``, ``torch.Size``, ``torch.dtype``, ``torch.device`` and dense
tensors. Lightning's loops, callbacks and schedulers keep nothing else. What other libraries let torch load
(``torch.serialization.add_safe_globals``) is not taken, and no other class is built.
"""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_megatron.checkpoint.metadata import remedy
from lightning_megatron.errors import CheckpointError

_SCALARS = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.Size)
_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set, frozenset)
_TENSORS = (Tensor, torch.nn.Parameter)


def read_trainer_state(file: Path, data: bytes, weights_only: bool | None) -> dict[str, Any]:
    """The Trainer's state.

    Args:
        file: where ``data`` comes from.
        weights_only: ``False`` lets it hold any Python object, which runs code of whoever wrote it.

    Raises:
        CheckpointError: it is damaged, or holds anything but plain containers, numbers and tensors.
    """
    try:
        if weights_only is False:
            state = torch.load(BytesIO(data), map_location="cpu", weights_only=False)
        else:
            with _without_safe_globals():
                state = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
            _check_plain(state)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds Python objects other than plain containers, numbers and tensors, which could run code. If "
            f"you trust it, pass weights_only=False. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        text = " ".join(str(error).split())
        raise CheckpointError(f"{file} is damaged: {text}.{remedy(file.parent)}") from error
    if not isinstance(state, dict):
        found = type(state).__name__
        raise CheckpointError(f"{file} is damaged: it holds {found} instead of dict.{remedy(file.parent)}")
    return state


def _check_plain(state: Any) -> None:
    seen: set[int] = set()
    waiting = [state]
    while waiting:
        value = waiting.pop()
        if type(value) in _SCALARS or id(value) in seen:
            continue
        seen.add(id(value))
        # Attributes that the pickle has set on an object may hide its methods, so those of the class are asked.
        waiting.extend(getattr(value, "__dict__", {}).values())
        if type(value) in _MAPPINGS:
            waiting.extend(dict.keys(value))
            waiting.extend(dict.values(value))
        elif type(value) in _SEQUENCES:
            waiting.extend(value)
        elif type(value) not in _TENSORS or value.layout is not torch.strided or value.is_quantized:
            raise pickle.UnpicklingError(f"It holds a {type(value).__module__}.{type(value).__qualname__}.")


@contextmanager
def _without_safe_globals() -> Iterator[None]:
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
