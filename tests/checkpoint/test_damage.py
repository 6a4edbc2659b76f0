"""Every file of a checkpoint is damaged in every way; a load and `doctor` find it, name the file and the remedy."""

from __future__ import annotations

import copyreg
import importlib
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch

from lightning_megatron.checkpoint import average, consolidate, verify
from lightning_megatron.checkpoint.integrity import LIGHTNING_FILE, open_checked
from lightning_megatron.checkpoint.metadata import CheckpointMetadata
from lightning_megatron.checkpoint.shard_files import INDEX_FILE, ShardFiles
from lightning_megatron.checkpoint.shard_index import read_index
from lightning_megatron.checkpoint.summed_file import write_file
from lightning_megatron.checkpoint.together import Alone
from lightning_megatron.checkpoint.trainer_state import read_trainer_state
from lightning_megatron.errors import CheckpointError
from lightning_megatron.interop import safe_pickle
from tests.checkpoint import crafted
from tests.checkpoint.damages import Others, as_format_2, damages
from tests.checkpoint.readers import Outcomes, read_all
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


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _load(path: Path) -> None:
    """What every load does, with all ranks' parts in one process."""
    opened = open_checked(path)
    read_trainer_state(path / LIGHTNING_FILE, opened.small[LIGHTNING_FILE], None)
    for chunks in opened.files.chunks.values():
        for chunk in chunks:
            opened.files.load(chunk)


def _sweep(path: Path, others: Others, scratch: Path, share: int, only: Sequence[str] = ()) -> Outcomes:
    """Let readers read a checkpoint with one in ``share`` of all damages, each by itself."""
    return read_all(path, list(damages(path, others))[::share], scratch, only)


def _assert_all_named(outcomes: Outcomes, least: int) -> None:
    assert outcomes.bad == []
    assert outcomes.counts["tried"] >= least
    assert outcomes.counts.keys() == {"tried", "named"}


def test_damage_is_named(ranks: RankPool, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    path, other = checkpoints
    readers = ("fit", "doctor")
    (found,) = ranks.run(_sweep, 1, path, Others(other, other, other), tmp_path, 8, readers)
    _assert_all_named(found, 60)
    assert found.counts["named"] == found.counts["tried"] * len(readers)


LAYOUTS = {
    "one": Case(),
    "tp2": Case(2, {"tensor_model_parallel_size": 2}),
    "pp2_dp2": Case(4, {"pipeline_model_parallel_size": 2}, distributed=True),
}


def _three(case: Case, directory: Path) -> None:
    train(case, 2, save=directory / "two.ckpt")
    train(case, 4, save=directory / "four.ckpt")
    train(replace(case, seed=8), 4, save=directory / "seed.ckpt")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damage_is_named_by_every_reader(ranks: RankPool, tmp_path: Path) -> None:
    for name, case in LAYOUTS.items():
        ranks.run(_three, case.world, case, tmp_path / name)
        for path in [*(tmp_path / name).iterdir()]:
            old = tmp_path / f"{name}_2" / path.name
            shutil.copytree(path, old)
            as_format_2(old)
    tried = 0
    for name in LAYOUTS:
        for suffix in ("", "_2"):
            directory = tmp_path / f"{name}{suffix}"
            layout = tmp_path / f"{'tp2' if name == 'one' else 'one'}{suffix}"
            others = Others(directory / "two.ckpt", directory / "seed.ckpt", layout / "four.ckpt")
            (found,) = ranks.run(_sweep, 1, directory / "four.ckpt", others, tmp_path, 3, timeout=900.0)
            _assert_all_named(found, 150)
            tried += found.counts["tried"]
    assert tried >= 1000


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
    as_format_2(old)
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
            _flip(damaged / name)
        else:
            shutil.copy(checkpoints[1] / name, damaged)
        first, second = ranks.run(_resume, 2, damaged)
        assert first == second
        assert f"{name} does not have its checksum" in first
        assert REMEDY in first


def test_tools_raise_one_error(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoints[0], bad)
    _flip(bad / LIGHTNING_FILE)
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


def _reports(reader: Callable[[], object]) -> list[str]:
    """The lines of a reader's error, if it raises."""
    try:
        reader()
    except CheckpointError as error:
        return str(error).strip().splitlines()
    return []


def test_pickles_call_nothing(tmp_path: Path) -> None:
    """In every place from which a file's pickle is read: the index, the Trainer's state, and files of Megatron-LM."""
    for code, name in ((0xF0, "fire"), (0xF0F0, "Fires"), (0x0FF0F0F0, "Fires.__call__")):
        copyreg.add_extension(crafted.HERE, name, code)
    every = list(crafted.pickles())
    assert len(every) > 120
    loaded = set()
    file = tmp_path / "model_optim_rng.pt"
    for name, content in every:
        (tmp_path / INDEX_FILE).write_bytes(content)
        readers: list[Callable[[], object]] = [lambda: ShardFiles.open(tmp_path)]
        for form in (crafted.archive, crafted.old_archive):
            data = form(content)
            readers += [
                lambda data=data: read_trainer_state(tmp_path / LIGHTNING_FILE, data, None),
                lambda data=data: safe_pickle.load(file.write_bytes(data) and file),
            ]
        for place, reader in enumerate(readers):
            lines = _reports(reader)
            assert len(lines) < 2, lines
            if not lines:
                loaded.add((place, name))
            assert crafted.FIRED == [], (place, name)
    assert not hasattr(OrderedDict, "crafted")
    plain = {"protocol 255"}
    assert {name for place, name in loaded if place in (0, 1, 3)} == plain  # files of this package
    inert = {
        *plain,
        "deep tuples",
        "deep lists",
        "memo entry of 4 billion",
        "list in itself",
        "a dictionary that hides its values",
    }
    assert {name for _, name in loaded if not name.startswith("numpy")} <= inert


def test_a_crafted_checkpoint_calls_nothing(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """As the ones before, in checkpoints whose manifest matches, also where a tensor should be."""
    path = tmp_path / "crafted"
    shutil.copytree(checkpoints[0], path)
    whole = {name: (path / name).read_bytes() for name in (INDEX_FILE, LIGHTNING_FILE, "__0_0.distcp")}
    first = min((c for chunks in ShardFiles.open(path).chunks.values() for c in chunks if c.file == "__0_0.distcp"),
                key=lambda chunk: chunk.start)  # fmt: skip
    for name, content in [found for found in crafted.pickles() if len(found[1]) < 4000][::9]:
        shard = crafted.archive(content, size=first.length) + whole[first.file][first.length :]
        for file, data in ((INDEX_FILE, content), (LIGHTNING_FILE, crafted.archive(content)), (first.file, shard)):
            (path / file).write_bytes(data)
            crafted.sign(path)
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                _load(path)
            assert crafted.FIRED == [], (file, name)
            (path / file).write_bytes(whole[file])


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
