"""A checkpoint is removed only when the one that replaces it is whole, however saves are made and fail."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_megatron as lm
from lightning_megatron.checkpoint import CheckpointOptions, io, verify
from lightning_megatron.checkpoint import saver as saver_module
from lightning_megatron.checkpoint.metadata import FILE
from lightning_megatron.checkpoint.publish import clean_up, new_partial, partial_path
from lightning_megatron.checkpoint.retention import Retention
from lightning_megatron.errors import CheckpointError
from tests.checkpoint.runs import make_module
from tests.helpers import Record, SharedLoader, quiet_trainer
from tests.ranks import RankPool

STEPS = 6


def _fit(
    directory: Path, options: CheckpointOptions, callbacks: list[dict], delay: float, fails_from: int | None
) -> str:
    """Train with writes that take ``delay`` seconds, and that all fail from a step on; the error."""
    module = make_module()
    strategy = lm.MegatronStrategy(seed=7, checkpoint=options)
    checkpoints = [
        ModelCheckpoint(
            directory / str(number),
            **{"filename": "{step}", "every_n_train_steps": 1, "mode": ("min", "max", "min")[number], **kwargs},
        )
        for number, kwargs in enumerate(callbacks)
    ]
    trainer = quiet_trainer(strategy, 1, max_steps=STEPS, callbacks=[Record(), *checkpoints], enable_checkpointing=True)
    write, write_file = saver_module.Snapshot.write, io.write_file

    def slowly(snapshot: Any, team: Any) -> None:
        time.sleep(delay)
        write(snapshot, team)

    def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if fails_from is not None and trainer.global_step >= fails_from:
            raise OSError(28, "No space left on device")
        return write_file(path, *args, **kwargs)

    saver_module.Snapshot.write, io.write_file = slowly, failing
    try:
        trainer.fit(module, SharedLoader(module, length=160))
    except CheckpointError as error:
        return str(error)
    finally:
        saver_module.Snapshot.write, io.write_file = write, write_file
    return ""


def _whole(directory: Path) -> dict[str, int]:
    """Names and steps of the checkpoints, all whole, with no link that dangles and nothing left behind."""
    found = {}
    for path in directory.iterdir():
        assert verify(path) == [], path
        found[path.name] = torch.load(path / "lightning.pt", weights_only=True)["global_step"]
    return found


SKIP = CheckpointOptions(background=True, when_busy="skip")
WAIT = CheckpointOptions(background=True)
WARN = CheckpointOptions(on_error="warn")
WARN_BACKGROUND = CheckpointOptions(background=True, on_error="warn")


def _cases(directory: Path) -> list[str]:
    top = {"monitor": "train_loss", "save_top_k": 2}
    return [
        _fit(directory / "default", SKIP, [{"save_last": True}], 0.0, None),
        _fit(directory / "slow", SKIP, [{"save_last": True}, {"save_last": False}], 0.3, None),
        _fit(directory / "link", SKIP, [{"save_last": "link"}], 0.3, None),
        _fit(directory / "wait", WAIT, [{"save_last": "link"}, {"save_last": True, "save_top_k": -1}], 0.02, None),
        _fit(directory / "full", WARN, [{"save_last": False}, {"save_last": "link"}, top], 0.0, 4),
        _fit(directory / "full_background", WARN_BACKGROUND, [{"save_last": False}, {"save_last": "link"}], 0.02, 4),
        _fit(directory / "raise", CheckpointOptions(background=True), [{"save_last": True}], 0.02, 4),
        _fit(directory / "last_fails", WAIT, [{"save_last": True}], 0.02, STEPS),
    ]


def test_no_checkpoint_goes_before_its_successor_is_whole(ranks: RankPool, tmp_path: Path) -> None:
    errors = ranks.run(_cases, 1, tmp_path)[0]
    assert errors[:6] == [""] * 6
    assert all("the disk is full" in error for error in errors[6:])
    last = {f"step={STEPS}.ckpt": STEPS, "last.ckpt": STEPS}
    assert _whole(tmp_path / "default" / "0") == last
    assert _whole(tmp_path / "slow" / "0") == last
    assert _whole(tmp_path / "slow" / "1") == {f"step={STEPS}.ckpt": STEPS}
    assert _whole(tmp_path / "link" / "0") == last
    assert _whole(tmp_path / "wait" / "0") == last
    assert _whole(tmp_path / "wait" / "1") == last | {f"step={step}.ckpt": step for step in range(1, STEPS)}
    assert _whole(tmp_path / "full" / "0") == {"step=3.ckpt": 3}
    assert _whole(tmp_path / "full" / "1") == {"step=3.ckpt": 3, "last.ckpt": 3}
    assert len(_whole(tmp_path / "full" / "2")) >= 2
    for number in ("0", "1"):
        found = _whole(tmp_path / "full_background" / number)
        assert found
        assert all(1 <= step <= 3 for step in found.values())
    assert _whole(tmp_path / "raise" / "0")
    # The write of one step may begin after the next, so the one before the last may fail too.
    assert set(_whole(tmp_path / "last_fails" / "0").values()) <= {STEPS - 2, STEPS - 1}


def _checkpoint(path: Path) -> Path:
    path.mkdir()
    (path / FILE).write_text("")
    return path


def test_removals_pass_to_the_next_successor(tmp_path: Path) -> None:
    retention = Retention()
    one, two, three = _checkpoint(tmp_path / "1"), tmp_path / "2", tmp_path / "3"
    retention.begin(one)
    retention.complete(one)
    retention.begin(two)  # and comes to nothing
    retention.remove(one)
    assert one.exists()
    retention.begin(three)
    retention.remove(two)
    assert one.exists()
    _checkpoint(three)
    retention.complete(three)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_what_is_saved_again_is_not_removed(tmp_path: Path) -> None:
    retention = Retention()
    one, two = _checkpoint(tmp_path / "1"), tmp_path / "2"
    retention.begin(two)
    retention.remove(one)
    retention.begin(one)
    retention.complete(one)
    retention.complete(two)
    assert one.exists()


def test_links_never_dangle_while_their_target_is_written(tmp_path: Path) -> None:
    retention, one, two = Retention(), _checkpoint(tmp_path / "1"), tmp_path / "2"
    link = tmp_path / "last.ckpt"
    retention.begin(two)
    link.symlink_to("2")
    retention.mend_links()
    assert link.resolve() == one
    _checkpoint(two)
    retention.complete(two)
    assert link.resolve() == one  # until the thread that links looks
    retention.mend_links()
    assert link.resolve() == two
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "last.ckpt"}


def test_what_killed_processes_left_behind(tmp_path: Path) -> None:
    for name in (".step=1.ckpt.removed", ".last.ckpt.0123abcd.removed", ".last.ckpt.0123abcd.partial", ".mine"):
        (tmp_path / name).mkdir()
    used = partial_path(tmp_path / "last.ckpt", "89abcdef")
    with new_partial(used):
        clean_up(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".mine", used.name}  # another run is writing it
    clean_up(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mine"}
