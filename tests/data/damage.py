"""Damaged indexed datasets, index maps and progress files, the same ones at every run.

Each case is a name and a function that damages whole files in place.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

HEADER = 34
Damage = Callable[[Path], None]
Case = tuple[str, Damage]


def edit(path: Path, change: Callable[[bytearray], bytes | bytearray | None]) -> None:
    data = bytearray(path.read_bytes())
    changed = change(data)
    path.write_bytes(data if changed is None else changed)


def flip(offset: int, bit: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[offset % len(data)] ^= 1 << bit

    return change


def replaced_files(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Other things under the name of a file."""

    def link(target: str) -> Callable[[], None]:
        return lambda: os.symlink(target, path)

    yield "missing", lambda: None
    yield "empty", path.touch
    yield "directory", path.mkdir
    yield "pipe", lambda: os.mkfifo(path)
    yield "dangling link", link("nothing-here")
    yield "link to itself", link(path.name)
    yield "link to /dev/zero", link("/dev/zero")
    yield "link to /dev/null", link("/dev/null")


def index_layout(data: bytes | bytearray) -> tuple[int, dict[str, tuple[str, int, int]]]:
    """Sequences, and of each array its struct code, offset and count."""
    sequences, boundaries = struct.unpack_from("<QQ", data, 18)
    return sequences, {
        "length": ("<i", HEADER, sequences),
        "pointer": ("<q", HEADER + 4 * sequences, sequences),
        "boundary": ("<q", HEADER + 12 * sequences, boundaries),
    }


def set_number(array: str, index: int, value: int | str) -> Callable[[bytearray], None]:
    """Replace one number of an array of an index by a value, or change it as named."""

    def change(data: bytearray) -> None:
        code, offset, count = index_layout(data)[1][array]
        size = struct.calcsize(code)
        place = offset + (index % count) * size
        if isinstance(value, int):
            struct.pack_into(code, data, place, value)
        elif value == "next":
            other = offset + ((index + 1) % count) * size
            data[place : place + size], data[other : other + size] = (
                data[other : other + size],
                data[place : place + size],
            )
        else:
            data[place + (size - 1 if value == "sign" else 0)] ^= 0x80 if value == "sign" else 1

    return change


def reordered(array: str, how: str) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        code, offset, count = index_layout(data)[1][array]
        values = np.frombuffer(data, code[1], count, offset).copy()
        values = values[::-1] if how == "reversed" else np.roll(values, 1) if how == "rolled" else np.sort(values)
        data[offset : offset + values.nbytes] = values.tobytes()

    return change


def consistent_swap(data: bytearray) -> None:
    """Exchange two lengths and move the pointer between them along: an index of other documents."""
    sequences, arrays = index_layout(data)
    offset = arrays["length"][1]
    lengths = np.frombuffer(data, np.int32, sequences, offset).copy()
    first = int(np.flatnonzero(lengths[:-1] != lengths[1:])[3])
    lengths[[first, first + 1]] = lengths[[first + 1, first]]
    itemsize = {4: 4, 8: 2}[data[17]]
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    data[offset : offset + lengths.nbytes] = lengths.tobytes()
    data[offset + lengths.nbytes : offset + lengths.nbytes + pointers.nbytes] = pointers.tobytes()


def index_cases(others: dict[str, Path]) -> Iterator[Case]:
    """Damage of `.idx`, given other whole datasets by name."""
    changes: dict[str, Callable[[bytearray], bytes | bytearray | None]] = {}
    for offset in range(HEADER):
        for bit in range(8):
            changes[f"header byte {offset} bit {bit}"] = flip(offset, bit)
    for code in range(10):
        changes[f"dtype code {code}"] = lambda data, code=code: data.__setitem__(17, code)
    for array in ("length", "pointer", "boundary"):
        for index in (0, 1, 2, 7, 20, 33, -2, -1):
            for value in (0, 1, -1, 2**31 - 1, -(2**31), "low bit", "sign", "next"):
                changes[f"{array} {index} {value}"] = set_number(array, index, value)
        for how in ("reversed", "rolled", "sorted"):
            changes[f"{array}s {how}"] = reordered(array, how)
    changes["consistent swap"] = consistent_swap
    random = np.random.default_rng(0)
    for number in range(60):
        place, bit = int(random.integers(HEADER, 4096)), int(random.integers(8))
        changes[f"random bit {number}"] = flip(place, bit)
    for part in (0, 1, 8, 33, 34, 35, 100, 500):
        changes[f"first {part} bytes"] = lambda data, part=part: data[:part]
    for part in (1, 4, 8, 64, 300):
        changes[f"without the last {part} bytes"] = lambda data, part=part: data[:-part]
        changes[f"{part} zeros behind it"] = lambda data, part=part: data + bytes(part)
        changes[f"zeros in place of the last {part} bytes"] = lambda data, part=part: data[:-part] + bytes(part)
    for name, change in changes.items():
        yield f"idx: {name}", lambda prefix, change=change: edit(Path(f"{prefix}.idx"), change)
    yield from _file_cases("idx", others)


def bin_cases(others: dict[str, Path]) -> Iterator[Case]:
    """Damage of `.bin`."""
    random = np.random.default_rng(1)
    changes: dict[str, Callable[[bytearray], bytes | bytearray | None]] = {}
    for number in range(40):
        changes[f"bit {number}"] = flip(int(random.integers(1 << 20)), int(random.integers(8)))
    for part in (1, 2, 3, 10, 100):
        changes[f"without the last {part} bytes"] = lambda data, part=part: data[:-part]
        changes[f"{part} zeros behind it"] = lambda data, part=part: data + bytes(part)
    changes["halves exchanged"] = lambda data: data[len(data) // 4 * 2 :] + data[: len(data) // 4 * 2]
    changes["reversed"] = lambda data: data[::-1]
    changes["zeros"] = lambda data: bytes(len(data))
    for name, change in changes.items():
        yield f"bin: {name}", lambda prefix, change=change: edit(Path(f"{prefix}.bin"), change)
    yield from _file_cases("bin", others)


def side_file_cases(name: str) -> Iterator[Case]:
    """Damage of a JSON file beside a dataset."""
    texts = ["{", "[]", "1", "null", "{}", '"text"', "[" * 5000, '{"format": 1}', "\x00" * 50, '{"format": 1e999}']
    for text in texts:
        yield f"{name}: {text[:16]!r}", lambda prefix, text=text: Path(f"{prefix}.{name}").write_text(text)

    def nulls(prefix: Path) -> None:
        path = Path(f"{prefix}.{name}")
        path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()))))

    yield f"{name}: nulls", nulls
    random = np.random.default_rng(2)
    for number in range(30):
        place, bit = int(random.integers(1 << 20)), int(random.integers(7))
        yield (
            f"{name}: bit {number}",
            lambda prefix, place=place, bit=bit: edit(Path(f"{prefix}.{name}"), flip(place, bit)),
        )
    yield from _file_cases(name, {})


def _file_cases(suffix: str, others: dict[str, Path]) -> Iterator[Case]:
    def replace(prefix: Path, number: int) -> None:
        path = Path(f"{prefix}.{suffix}")
        path.unlink()
        [*replaced_files(path)][number][1]()

    for number, (name, _) in enumerate(replaced_files(Path("x"))):
        yield f"{suffix}: {name}", lambda prefix, number=number: replace(prefix, number)
    for name, other in others.items():
        yield (
            f"{suffix}: of {name}",
            lambda prefix, other=other: (
                shutil.copyfile(f"{other}.{suffix}", f"{prefix}.{suffix}") and None  # type: ignore[func-returns-value]
            ),
        )


def map_cases(other: Path) -> Iterator[Case]:
    """Damage of an entry of index maps, given the entry of another corpus."""
    random = np.random.default_rng(3)
    for name in ("document.npy", "sample.npy", "shuffle.npy", "description.json", "checksums.json"):
        for number in range(12):
            place, bit = int(random.integers(1 << 20)), int(random.integers(8))
            yield (
                f"{name}: bit {number}",
                lambda entry, name=name, place=place, bit=bit: edit(entry / name, flip(place, bit)),
            )
        for part in (0, 1, 10, 100):
            yield (
                f"{name}: first {part} bytes",
                lambda entry, name=name, part=part: edit(entry / name, lambda data: data[:part]),
            )
        yield f"{name}: longer", lambda entry, name=name: edit(entry / name, lambda data: data + bytes(8))
        yield f"{name}: of another corpus", lambda entry, name=name: _copy(other / name, entry / name)

        def replace(entry: Path, name: str = name, number: int = 0) -> None:
            (entry / name).unlink()
            [*replaced_files(entry / name)][number][1]()

        for number, (kind, _) in enumerate(replaced_files(Path("x"))):
            yield f"{name}: {kind}", lambda entry, number=number, replace=replace: replace(entry, number=number)
    for text in ("[]", "1", "{}", '{"files": {}}', '{"files": 1, "digest": 2}', "[" * 5000):
        yield (
            f"checksums.json: {text[:20]}",
            lambda entry, text=text: (entry / "checksums.json").write_text(text) and None,  # type: ignore[func-returns-value]
        )

    def whole(entry: Path) -> None:
        shutil.rmtree(entry)
        shutil.copytree(other, entry)

    yield "entry of another corpus", whole

    def swap(entry: Path) -> None:
        shutil.copyfile(entry / "shuffle.npy", entry / "document.npy")

    yield "one map in place of another", swap

    def entry_replaced(entry: Path, number: int) -> None:
        shutil.rmtree(entry)
        [*replaced_files(entry)][number][1]()

    def lock_replaced(entry: Path, number: int) -> None:
        shutil.rmtree(entry)
        lock = entry.with_name(f"{entry.name}.lock")
        lock.unlink()
        [*replaced_files(lock)][number][1]()

    for number, (kind, _) in enumerate(replaced_files(Path("x"))):
        yield f"entry: {kind}", lambda entry, number=number: entry_replaced(entry, number)
        yield f"lock: {kind}", lambda entry, number=number: lock_replaced(entry, number)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def progress_cases() -> Iterator[Case]:
    """Damage of a progress file."""
    random = np.random.default_rng(4)
    for number in range(100):
        place, bit = int(random.integers(1 << 20)), int(random.integers(8))
        yield f"bit {number}", lambda path, place=place, bit=bit: edit(path, flip(place, bit))
    for part in (0, 1, 20, 100, 150):
        yield f"first {part} bytes", lambda path, part=part: edit(path, lambda data: data[:part])
    texts = ["{", "[]", "1", "null", "{}", "[" * 5000, "\x00" * 50, '{"job": 1}', '{"job": "job"}']
    texts += [f'{{"job": "job", "crc32": 0, {rest}}}' for rest in ('"blocks": 1, "positions": 7', '"blocks": null')]
    for text in texts:
        yield f"{text[:40]!r}", lambda path, text=text: path.write_text(text) and None  # type: ignore[func-returns-value]
    for name, value in (("blocks", 4), ("blocks", -1), ("blocks", "3"), ("positions", []), ("positions", [{}])):

        def change(path: Path, name: str = name, value: object = value) -> None:
            path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

        yield f"{name}={value!r}", change
    for number, (kind, _) in enumerate(replaced_files(Path("x"))):
        if kind != "missing":

            def replace(path: Path, number: int = number) -> None:
                path.unlink()
                [*replaced_files(path)][number][1]()

            yield kind, replace
