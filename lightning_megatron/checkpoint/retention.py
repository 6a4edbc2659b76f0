"""Decides when a checkpoint may be removed: only once the save that replaces it is whole under its name."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from lightning_megatron.checkpoint.metadata import FILE
from lightning_megatron.checkpoint.publish import remove


class Retention:
    """Holds removals back until the save before them is whole, and keeps links to checkpoints from dangling.

    ModelCheckpoint saves a checkpoint and then removes the one that it replaces, and does not hear of a save that was
    skipped, failed, or is still being written. A removal whose successor came to nothing passes to the next checkpoint
    that replaces that successor. Of rank 0; its methods may be called by the training and the writing thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: Path | None = None
        self._unfinished: set[Path] = set()
        """Paths whose last save is being written, was skipped or has failed."""
        self._held: dict[Path, list[Path]] = {}
        """What each unfinished path replaces."""
        self._newest: dict[Path, Path] = {}
        """The last whole checkpoint of each directory."""
        self._links: dict[Path, Path] = {}
        """Links that point at another checkpoint until the one that they are meant for is whole."""

    def begin(self, path: Path) -> None:
        """A save of ``path`` was asked for; it is not whole yet, and may never be."""
        with suppress(OSError):  # the save itself tells what is wrong
            path.parent.mkdir(parents=True, exist_ok=True)  # ModelCheckpoint links into it at once
        with self._lock:
            self._latest = path
            self._unfinished.add(path)
            for held in self._held.values():
                if path in held:
                    held.remove(path)  # it is wanted again

    def complete(self, path: Path) -> None:
        """``path`` is whole. Remove what it replaces, unless a link stands at that yet (see :meth:`mend_links`)."""
        with self._lock:
            self._unfinished.discard(path)
            self._newest[path.parent] = path
            if path in self._links.values():
                return
            doomed = self._held.pop(path, [])
        for old in doomed:
            remove(old)

    def remove(self, path: Path) -> None:
        """Remove ``path``, which the latest save replaces, now or when that save is whole."""
        with self._lock:
            doomed = [*self._held.pop(path, []), path]
            if self._latest in self._unfinished and self._latest is not None:
                self._held.setdefault(self._latest, []).extend(doomed)
                return
        for old in doomed:
            remove(old)

    def mend_links(self) -> None:
        """Point links at the newest whole checkpoint whose own is unfinished.

        ``ModelCheckpoint(save_last="link")`` links ``last.ckpt`` to a checkpoint that a background save has not written
        yet; if the process is killed then, ``ckpt_path="last"`` would find nothing and training would begin anew.
        Of the training thread alone, which also makes the links.
        """
        self._restore_links()
        with self._lock:
            unfinished = set(self._unfinished)
            newest = dict(self._newest)
        for directory in {path.parent for path in unfinished}:
            whole = newest.get(directory) or _newest_in(directory)
            if whole is None:
                continue
            for link in _dangling(directory):
                target = Path(os.path.normpath(directory / os.readlink(link)))
                if target in unfinished:
                    with self._lock:
                        self._links[link] = target
                    _point(link, whole)
        self._restore_links()

    def _restore_links(self) -> None:
        """Point links at their own checkpoints that are whole by now, and remove what these replace."""
        with self._lock:
            whole = {link: target for link, target in self._links.items() if target not in self._unfinished}
            doomed = [old for target in set(whole.values()) for old in self._held.pop(target, [])]
            for link in whole:
                del self._links[link]
        for link, target in whole.items():
            if link.is_symlink():  # otherwise a checkpoint was saved under this name since
                _point(link, target)
        for old in doomed:
            remove(old)


def _dangling(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if path.is_symlink() and not path.exists()]


def _newest_in(directory: Path) -> Path | None:
    if not directory.is_dir():
        return None
    found = [path for path in directory.iterdir() if not path.name.startswith(".") and (path / FILE).is_file()]
    return max(found, key=lambda path: (path / FILE).stat().st_mtime, default=None)


def _point(link: Path, target: Path) -> None:
    """Replace a link in one step."""
    new = link.with_name(f".{link.name}.link")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target, link.parent))
    os.replace(new, link)
