"""Damages of a checkpoint directory, each by itself, in an order that does not change from run to run."""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from lightning_megatron.checkpoint.integrity import LIGHTNING_FILE
from lightning_megatron.checkpoint.metadata import FILE

_SEED = 18


@dataclass(frozen=True)
class Damage:
    """A way to damage a checkpoint."""

    what: str
    names: tuple[str, ...]
    """Damaged files: an error must name one of them. ``"."`` is the directory itself."""
    apply: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.what}({', '.join(self.names)})"


@dataclass(frozen=True)
class Others:
    """Whole checkpoints whose files get into another one."""

    step: Path
    """Another step of the same run."""
    seed: Path
    """Another run of the same model."""
    layout: Path
    """The same model in another layout."""


def damages(path: Path, others: Others, positions: int = 6) -> Iterator[Damage]:
    """All damages of the checkpoint at ``path``, which stays as it is.

    Args:
        positions: bits that are flipped, and places at which a file is cut.
    """
    names = sorted(file.name for file in path.iterdir())
    for name in names:
        yield from _of_bytes(name, (path / name).read_bytes(), positions)
        yield from _of_kind(name)
        yield from _of_other_files(path, name, others)
    for one, other in combinations(names, 2):
        yield Damage("swap", (one, other), lambda at, one=one, other=other: _swap(at / one, at / other))
    for name in names:
        if name.endswith(".json"):
            yield from _of_fields(name, path / name)
    yield from _of_trainer_state(path / LIGHTNING_FILE)
    yield from _of_directory(path, names, others)


def _of_bytes(name: str, content: bytes, positions: int) -> Iterator[Damage]:
    """Of the contents of one file."""
    chance = random.Random(_SEED + zlib.crc32(name.encode()))
    size = len(content)

    def damage(what: str, change: Callable[[bytearray], object]) -> Damage:
        def apply(at: Path) -> None:
            data = bytearray(content)
            change(data)
            (at / name).write_bytes(data)

        return Damage(what, (name,), apply)

    def flip(at: int, bit: int) -> Damage:
        return damage(f"flip bit {bit} of byte {at}", lambda data: data.__setitem__(at, data[at] ^ 1 << bit))

    for at in sorted({0, size - 1, *(int((part + chance.random()) * size / positions) for part in range(positions))}):
        yield flip(min(at, size - 1), chance.randrange(8))
    for at in sorted({0, 1, size // 3, size // 2, size - 1}):
        yield damage(f"truncate at {at}", lambda data, at=at: data.__delitem__(slice(at, None)))
    yield damage("zero 64 bytes", lambda data: data.__setitem__(slice(size // 2, size // 2 + 64), bytes(64)))
    yield damage("append a zero", lambda data: data.append(0))
    noise = chance.randbytes(5000)
    yield damage("append noise", lambda data: data.extend(noise))
    yield damage("double", lambda data: data.extend(content))
    yield Damage("extend to 1 TiB", (name,), lambda at: os.truncate(at / name, 1 << 40))


def _of_kind(name: str) -> Iterator[Damage]:
    """Something other than the regular file."""

    def instead(what: str, make: Callable[[Path], object]) -> Damage:
        def apply(at: Path) -> None:
            (at / name).unlink()
            make(at / name)

        return Damage(what, (name,), apply)

    yield instead("remove", lambda at: None)
    yield instead("directory", lambda at: at.mkdir())
    yield instead("fifo", os.mkfifo)
    yield instead("link to itself", lambda at: at.symlink_to(at.name))
    yield instead("link to nothing", lambda at: at.symlink_to("nothing"))
    yield instead("link to an endless device", lambda at: at.symlink_to("/dev/zero"))
    yield instead("link to an empty device", lambda at: at.symlink_to("/dev/null"))


def _of_other_files(path: Path, name: str, others: Others) -> Iterator[Damage]:
    for what, other in (("step", others.step), ("seed", others.seed), ("layout", others.layout)):
        source = other / name
        if source.is_file() and source.read_bytes() != (path / name).read_bytes():
            yield Damage(f"file of another {what}", (name,), lambda at, source=source: shutil.copy(source, at))


def _of_fields(name: str, file: Path) -> Iterator[Damage]:
    """Each field of a JSON file changed, and removed."""
    whole = json.loads(file.read_text())
    for keys in _leaves(whole):
        for what, change in (("change", _changed), ("remove", None)):
            data = json.loads(file.read_text())
            parent = data
            for key in keys[:-1]:
                parent = parent[key]
            if change is None:
                del parent[keys[-1]]
            else:
                parent[keys[-1]] = change(parent[keys[-1]])
            text = json.dumps(data, indent=2) + "\n" if name == FILE else json.dumps(data)
            yield Damage(
                f"{what} {'.'.join(map(str, keys))}", (name,), lambda at, text=text: (at / name).write_text(text)
            )


def _leaves(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if isinstance(child, (dict, list)) and child:
            yield from _leaves(child, (*before, key))
        elif not isinstance(key, int) or key < 2:  # of long lists the first ones
            yield (*before, key)


def _changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else 1


def _of_trainer_state(file: Path) -> Iterator[Damage]:
    """Each number of the Trainer's state changed, in a file that torch has written."""
    state = torch.load(file, weights_only=True)
    for keys in _leaves(state):
        parent = state
        for key in keys[:-1]:
            parent = parent[key]
        before = parent[keys[-1]]
        if isinstance(before, (bool, int, float)):

            def apply(at: Path, keys: tuple[Any, ...] = keys) -> None:
                changed = torch.load(file, weights_only=True)
                parent = changed
                for key in keys[:-1]:
                    parent = parent[key]
                parent[keys[-1]] = _changed(parent[keys[-1]])
                torch.save(changed, at / file.name)

            yield Damage(f"change {'.'.join(map(str, keys))}", (file.name,), apply)


def _of_directory(path: Path, names: list[str], others: Others) -> Iterator[Damage]:
    """Several files at once, or the directory itself."""
    for what, other in (("step", others.step), ("seed", others.seed)):
        theirs = {name for name in names if (other / name).is_file()}
        theirs = {name for name in theirs if (other / name).read_bytes() != (path / name).read_bytes()}
        yield Damage(f"all but the manifest of another {what}", tuple(theirs - {FILE}), _copy(other, theirs - {FILE}))
        for name in sorted(theirs - {FILE}):
            kept = tuple(theirs - {FILE, name})
            yield Damage(f"manifest and {name} of another {what}", (*kept, FILE), _copy(other, {FILE, name}))
        shards = {name for name in theirs if name.endswith(".distcp")}
        yield Damage(f"all shards of another {what}", tuple(shards), _copy(other, shards))

    def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def apply(at: Path) -> None:
            shutil.rmtree(at)
            make(at)

        return apply

    yield Damage("empty", (".",), instead(lambda at: at.mkdir()))
    yield Damage("removed", (".",), instead(lambda at: None))
    yield Damage("a file", (".",), instead(lambda at: at.write_bytes(b"x")))
    yield Damage("a fifo", (".",), instead(os.mkfifo))
    yield Damage("a link to itself", (".",), instead(lambda at: at.symlink_to(at.name)))
    yield Damage("a link to an endless device", (".",), instead(lambda at: at.symlink_to("/dev/zero")))


def _copy(source: Path, names: set[str]) -> Callable[[Path], None]:
    return lambda at: [shutil.copy(source / name, at) for name in sorted(names)] and None


def _swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def as_format_2(path: Path) -> None:
    """Make a checkpoint one of format 2: no id, and a manifest whose text may have any form."""
    from lightning_megatron.checkpoint import metadata

    data = json.loads((path / FILE).read_text()) | {"format": 2}
    del data["id"], data["crc32"]
    data["crc32"] = metadata._crc32(data)
    (path / FILE).write_text(json.dumps(data, indent=2))
