"""Every file of a checkpoint is damaged in every way; a load and `doctor` find it, name the file and the remedy."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch

from lightning_megatron.checkpoint import average, consolidate, metadata, verify
from lightning_megatron.checkpoint.integrity import LIGHTNING_FILE, open_checked
from lightning_megatron.checkpoint.metadata import FILE, CheckpointMetadata
from lightning_megatron.checkpoint.shard_index import read_index
from lightning_megatron.checkpoint.summed_file import write_file
from lightning_megatron.checkpoint.together import Alone
from lightning_megatron.checkpoint.trainer_state import read_trainer_state
from lightning_megatron.errors import CheckpointError
from tests.checkpoint.runs import Case, make_module, make_trainer, train
from tests.helpers import SharedLoader
from tests.ranks import RankPool

REMEDY = "backup of this checkpoint"


def _two_steps(directory: Path) -> None:
    case = Case(2, {"tensor_model_parallel_size": 2})
    train(case, 2, save=directory / "two.ckpt")
    train(case, 4, save=directory / "four.ckpt")


@pytest.fixture(scope="module")
def checkpoints(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("damage")
    ranks.run(_two_steps, 2, directory)
    return directory / "four.ckpt", directory / "two.ckpt"


@dataclass(frozen=True)
class Damage:
    """One way to damage one file."""

    name: str
    kind: str
    at: float = 0.0

    def _neighbour(self, path: Path) -> Path:
        after = sorted(p for p in path.iterdir() if p.suffix == Path(self.name).suffix)
        return after[(after.index(path / self.name) + 1) % len(after)]

    def names(self, path: Path) -> tuple[str, ...]:
        """The files that are damaged: two where they are swapped, of which the manifest may be one."""
        return (self.name, self._neighbour(path).name) if self.kind == "swap" else (self.name,)

    def apply(self, path: Path, other: Path) -> bool:
        """Whether anything changed."""
        file = path / self.name
        before = file.read_bytes()
        if self.kind == "delete":
            file.unlink()
            return True
        if self.kind == "copy":
            shutil.copy(other / self.name, file)
        elif self.kind == "swap":
            neighbour = self._neighbour(path)
            file.write_bytes(neighbour.read_bytes())
            neighbour.write_bytes(before)
        else:
            place = min(int(self.at * len(before)), len(before) - 1)
            data = bytearray(before)
            if self.kind == "flip":
                data[place] ^= 1 << (place % 8)
            elif self.kind == "zero":
                data[place : place + 64] = bytes(len(data[place : place + 64]))
            elif self.kind == "truncate":
                del data[place:]
            else:
                data.append(0)
            file.write_bytes(data)
        return file.read_bytes() != before


def _damages(path: Path, places: int) -> Iterator[Damage]:
    for name in sorted(file.name for file in path.iterdir()):
        yield from (Damage(name, kind) for kind in ("delete", "copy", "swap", "append"))
        for place in range(places):
            yield from (Damage(name, kind, (place + 0.37) / places) for kind in ("flip", "zero", "truncate"))
        yield from (Damage(name, "flip", 1.0), Damage(name, "truncate", 1.0))


def _load(path: Path) -> None:
    """What every load does, with all ranks' parts in one process."""
    opened = open_checked(path)
    read_trainer_state(path / LIGHTNING_FILE, opened.small[LIGHTNING_FILE], None)
    for chunks in opened.files.chunks.values():
        for chunk in chunks:
            opened.files.load(chunk)


def _sweep(checkpoints: tuple[Path, Path], tmp_path: Path, places: int) -> dict[str, int]:
    path, other = checkpoints
    counts = {"tried": 0, "named": 0, "unclear": 0, "silent": 0, "differ": 0}
    for damage in _damages(path, places):
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(path, damaged)
        if not damage.apply(damaged, other):
            continue
        counts["tried"] += 1
        found = verify(damaged)
        try:
            _load(damaged)
        except CheckpointError as error:
            counts["differ"] += str(error).splitlines() != found
            named = any(name in str(error) for name in damage.names(path))
            clear = str(damaged) in str(error) and named and REMEDY in str(error)
            counts["named" if clear else "unclear"] += 1
            if not clear:
                print(damage, error)
        except Exception:
            counts["unclear"] += 1
        else:
            counts["silent"] += 1
    print(counts)
    return counts


def _assert_all_named(counts: dict[str, int]) -> None:
    assert counts["tried"] > 0
    assert counts == {"tried": counts["tried"], "named": counts["tried"], "unclear": 0, "silent": 0, "differ": 0}


def test_damage_is_named(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    _assert_all_named(_sweep(checkpoints, tmp_path, 2))


@pytest.mark.slow
def test_damage_is_named_everywhere(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    _assert_all_named(_sweep(checkpoints, tmp_path, 40))


def test_whole_checkpoints_load(checkpoints: tuple[Path, Path]) -> None:
    for path in checkpoints:
        assert verify(path) == []
        _load(path)
    ids = {CheckpointMetadata.read(path).id for path in checkpoints}
    assert len(ids) == 2
    assert all(len(one) == 32 for one in ids)


def test_format_2_still_loads(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(checkpoints[0], old)
    data = json.loads((old / FILE).read_text()) | {"format": 2}
    del data["id"], data["crc32"]
    data["crc32"] = metadata._crc32(data)
    (old / FILE).write_text(json.dumps(data))
    assert verify(old) == []
    _load(old)
    shutil.copy(checkpoints[1] / LIGHTNING_FILE, old)
    assert f"{LIGHTNING_FILE} does not have its checksum" in "\n".join(verify(old))


def _resume(path: Path) -> str:
    module = make_module()
    trainer = make_trainer(Case(2, {"tensor_model_parallel_size": 2}), max_steps=5)
    try:
        trainer.fit(module, SharedLoader(module), ckpt_path=path)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_fit_names_damage_on_every_rank(ranks: RankPool, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    names = [LIGHTNING_FILE, ".metadata", "checksums.json", "__1_0.distcp"]
    for name in names:
        damaged = tmp_path / name.strip(".")
        shutil.copytree(checkpoints[0], damaged)
        if name in (".metadata", "checksums.json"):  # the same in both, or of another size
            assert Damage(name, "flip", 0.5).apply(damaged, checkpoints[1])
        else:
            shutil.copy(checkpoints[1] / name, damaged)
        first, second = ranks.run(_resume, 2, damaged)
        assert first == second
        assert f"{name} does not have its checksum" in first
        assert REMEDY in first


def test_tools_raise_one_error(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoints[0], bad)
    Damage(LIGHTNING_FILE, "flip", 0.5).apply(bad, checkpoints[1])
    tools: list[Callable[[], None]] = [
        lambda: average([checkpoints[1], bad], tmp_path / "mean"),
        lambda: consolidate(bad, tmp_path / "one.safetensors"),
    ]
    for tool in tools:
        with pytest.raises(CheckpointError, match=f"{LIGHTNING_FILE} does not have its checksum"):
            tool()


# ------------------------------------------------------------------------------------------------- crafted files


def _set_attribute(module: str, name: str, attribute: str) -> bytes:
    """A pickle that sets an attribute of a class or function: its name, ``(None, {attribute: 1})`` and BUILD."""
    key = b"X" + len(attribute).to_bytes(4, "little") + attribute.encode()
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + b"N}" + key + b"K\x01s\x86b."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pathlib", "PosixPath"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
    ],
)
def test_an_index_sets_no_attributes_of_classes(module: str, name: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        read_index(_set_attribute(module, name, "crafted"))
    assert not hasattr(getattr(importlib.import_module(module), name), "crafted")


def test_an_index_of_other_types_is_refused() -> None:
    for value in ({}, 1, PosixPath("x"), [torch.float32]):
        with pytest.raises(ValueError, match="should be"):
            read_index(pickle.dumps(value))


def _state(value: Any, weights_only: bool | None = None) -> Any:
    from lightning_megatron.checkpoint.io import pickled

    return read_trainer_state(Path("x/lightning.pt"), pickled({"value": value}), weights_only)["value"]


def test_what_the_trainers_state_may_hold() -> None:
    plain = {"a": [1, 2.0, None, True, "x", b"y", 1j, {3}], ("k", 1): (torch.Size([2]), torch.float32)}
    assert _state(plain) == plain
    assert torch.equal(_state(torch.arange(3)), torch.arange(3))
    with torch.serialization.safe_globals([PosixPath]):
        for value in (PosixPath("x"), torch.eye(2).to_sparse()):
            with pytest.raises(CheckpointError, match="plain containers, numbers and tensors"):
                _state(value)
        assert PosixPath in torch.serialization.get_safe_globals()
    assert _state(PosixPath("x"), weights_only=False) == PosixPath("x")


# ---------------------------------------------------------------------------------------------------------- full disk


def _limited(path: Path) -> str:
    """Write more than the limit of a file's size allows, in a process of its own."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        Alone().do("Saving", lambda: write_file(path, [torch.zeros(1 << 19)]))
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def test_a_write_that_fails_says_why(ranks: RankPool, tmp_path: Path) -> None:
    assert "ulimit -f" in ranks.run(_limited, 1, tmp_path / "large")[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_called_so() -> None:
    with pytest.raises(CheckpointError, match=r"the disk is full \(No space left on device"):
        Alone().do("Saving", lambda: write_file(Path("/dev/full"), [torch.zeros(1 << 19)]))
