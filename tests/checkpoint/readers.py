"""Everything that reads a checkpoint, in one process, and what each says of a damaged one."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

import lightning_megatron as lm
from lightning_megatron.checkpoint import average, consolidate, verify
from lightning_megatron.checkpoint.restored import fill
from lightning_megatron.cli.main import main
from lightning_megatron.errors import CheckpointError
from tests.checkpoint.damages import Damage
from tests.checkpoint.runs import Case, make_module, make_trainer
from tests.helpers import SharedLoader

REMEDIES = ("backup of this checkpoint", "take another checkpoint")
SECONDS = 20
"""After which a reader hangs."""


class Hang(BaseException):  # which no handler of errors catches
    """A reader that does not come to an end."""


@dataclass
class Outcomes:
    """What the readers said, counted, and each case that was not named."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    longest: float = 0.0

    def add(self, reader: str, outcome: str, case: str, text: str = "") -> None:
        self.counts[outcome] += 1
        if outcome != "named":
            self.bad.append(f"{outcome}: {reader}: {case}: {text[:2000]}")


def _command(*words: str) -> Callable[[Path], None]:
    """A command of the command line, whose error it raises."""

    def run(path: Path) -> None:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main([str(path) if word == "CKPT" else word for word in words])
        if code:
            raise CheckpointError(errors.getvalue())

    return run


def _readers(trainer: pl.Trainer, module: lm.GPTModule, scratch: Path) -> dict[str, Callable[[Path], object]]:
    def load_from_checkpoint(path: Path) -> None:
        lm.GPTModule.load_from_checkpoint(path)
        fill(module, path)

    def convert(path: Path) -> None:
        shutil.rmtree(scratch / "converted", ignore_errors=True)
        to = ("--save-path", str(scratch / "converted"), "--to", "huggingface", "--verify")
        _command("convert", "--load-path", "CKPT", *to)(path)

    return {
        "fit": trainer.strategy.load_checkpoint,
        "load_from_checkpoint": load_from_checkpoint,
        "average": lambda path: average([path], scratch / "mean"),
        "consolidate": lambda path: consolidate(path, scratch / "one.safetensors"),
        "doctor": _command("doctor", "CKPT"),
        "convert": convert,
    }


def _outcome(damage: Damage, path: Path, error: BaseException | None) -> str:
    if error is None:
        return "silent"
    if isinstance(error, Hang):
        return "hang"
    text = str(error)
    names = any(str(path) if name == "." else name in text for name in damage.names)
    clear = isinstance(error, CheckpointError) and "Traceback" not in text and str(path) in text and names
    return "named" if clear and (damage.names == (".",) or any(remedy in text for remedy in REMEDIES)) else "unclear"


def _alarm(number: int, frame: Any) -> None:
    raise Hang(f"it did not end in {SECONDS} s")


class _Read(pl.Callback):
    """Lets all readers read while a fit's model and optimizer are there to be filled."""

    def __init__(self, path: Path, damages: Iterable[Damage], scratch: Path, only: Collection[str]) -> None:
        self._path, self._damages, self._scratch, self._only = path, damages, scratch, only
        self.outcomes = Outcomes()
        self.whole: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        every = _readers(trainer, pl_module, self._scratch)
        readers = {name: reader for name, reader in every.items() if not self._only or name in self._only}
        before = signal.signal(signal.SIGALRM, _alarm)
        try:
            for name, reader in readers.items():
                if (error := self._try(reader, self._path)) is not None:
                    self.whole.append(f"{name}: {error}")
            for damage in self._damages:
                self._one(damage, readers)
        finally:
            signal.signal(signal.SIGALRM, before)

    def _one(self, damage: Damage, readers: dict[str, Callable[[Path], object]]) -> None:
        path = self._scratch / "damaged"
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        shutil.copytree(self._path, path)
        damage.apply(path)
        self.outcomes.counts["tried"] += 1
        case = f"{self._path.parent.name}/{self._path.name} {damage}"
        found: list[str] = []
        if (hang := self._try(lambda at: found.extend(verify(at)), path)) is not None:
            self.outcomes.add("verify", "hang" if isinstance(hang, Hang) else "unclear", case, repr(hang))
        for name, reader in readers.items():
            error = self._try(reader, path)
            self.outcomes.add(name, _outcome(damage, path, error), case, repr(error))
            directory = damage.names == (".",)  # no checkpoint at all, which each says in its own words
            if any(error is None or (line.strip() not in str(error) and not directory) for line in found):
                self.outcomes.add(name, "disagree", case, f"{error!r}\nverify: {found}")

    def _try(self, reader: Callable[[Path], object], path: Path) -> BaseException | None:
        began = time.monotonic()
        signal.alarm(SECONDS)
        try:
            reader(path)
        except (Exception, Hang, SystemExit) as error:
            return error
        finally:
            signal.alarm(0)
            self.outcomes.longest = max(self.outcomes.longest, time.monotonic() - began)
        return None


def read_all(path: Path, damages: Iterable[Damage], scratch: Path, only: Collection[str] = ()) -> Outcomes:
    """Let every reader, or those named in ``only``, read a checkpoint with each damage, after the whole one."""
    callback = _Read(path, damages, scratch, only)
    module = make_module()
    make_trainer(Case(), callback, max_steps=1).fit(module, SharedLoader(module))
    assert callback.whole == [], callback.whole
    return callback.outcomes
