"""Position of a training data loader: which epoch of it, and how many batches of that epoch training has used."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Resume(Enum):
    """Where a run continues that resumes from a checkpoint, relative to the last batch that was handed to training."""

    AFTER = "after"
    """With the batch after it."""
    AGAIN = "again"
    """With that batch, whose step was interrupted."""
    NEXT_EPOCH = "next epoch"
    """At the start of the next epoch: the epoch was complete, or was cut short by a limit or by the user."""


def resume_of(fit_loop: Mapping[str, Any], *, by_steps: bool) -> Resume:
    """Where Lightning continues from the progress that a checkpoint holds.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
        by_steps: whether the resumed Trainer has ``max_steps``. Then Lightning goes on inside an epoch that a limit of
            steps broke off; otherwise it counts such an epoch as finished.
    """
    epoch = fit_loop["epoch_progress"]["current"]
    progress = fit_loop["epoch_loop.batch_progress"]
    batch = progress["current"]
    finished = epoch["ready"] == epoch["started"] == epoch["processed"]
    if finished and not by_steps:
        return Resume.NEXT_EPOCH
    if batch["started"] > batch["processed"]:
        return Resume.AGAIN
    if progress["is_last_batch"] and batch["ready"] == batch["processed"]:
        return Resume.NEXT_EPOCH
    return Resume.AFTER


def repair_totals(fit_loop: Mapping[str, Any]) -> None:
    """Let the totals of a checkpoint's progress agree with the counts of its epoch, in place.

    Where ``on_train_batch_start`` ends an epoch by -1, Lightning has counted its last batch as ready, but neither as
    started nor as completed. From such totals it concludes later that the last batch before a checkpoint was not
    trained on, and counts one batch more in the resumed epoch.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    total, current = progress["total"], progress["current"]
    for name in ("started", "processed", "completed"):
        total[name] = total["ready"] - (current["ready"] - current[name])


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a loader's data."""

    epoch: int
    """How often the data were begun anew."""
    batches: int
    """Batches of this epoch that come before."""


def settled(state: Mapping[str, Any], resume: Resume, reload_every: int = 0) -> dict[str, Any]:
    """The state of a loader from which a run continues, out of the state that was saved.

    Args:
        state: what :meth:`ReplicaDataLoader.state_dict` has returned, also of versions that called ``batches``
            ``consumed_batches``.
        resume: where to continue.
        reload_every: epochs after which Lightning makes new loaders, or 0.
    """
    new = dict(state)
    batches = new.pop("consumed_batches", None)
    new.setdefault("batches", batches)
    again, current = new.pop("loader_again", None), new.pop("current", None)
    generators = new.get("generators")
    if resume is Resume.AGAIN and new["batches"]:
        new["batches"] -= 1
        new["loader"] = again
    if resume is Resume.NEXT_EPOCH and new["batches"]:
        new |= {"epoch": new["epoch"] + 1, "batches": 0, "loader": None}
        new["passes"] = [*new.get("passes", ()), [current, 1]] if current is not None else []
        if generators is not None:
            new["generators"] = {"start": generators["now"], "now": generators["now"]}
        if reload_every and new["epoch"] - new.get("first_epoch", 0) >= reload_every:
            new |= {"passes": [], "generators": None, "first_epoch": new["epoch"]}
    return new


class PositionTracker:
    """Counts the batches that training uses, apart from those that Lightning fetches ahead.

    Lightning may call ``iter`` on a loader several times before it uses a batch, stops reading where a limit says so,
    and fetches one batch ahead of a loader without a length. So a new iteration is a new epoch only if a batch of the
    one before was used, or if that one came to its end.
    """

    def __init__(self, first_epoch: int) -> None:
        self.used = Position(first_epoch, 0)
        """The place after the last batch that training used."""
        self.start = self.used
        """Where the current pass over the data began."""
        self._read = 0
        self._ahead: deque[Position] = deque()
        self._touched = False
        self._ended = False

    @property
    def next(self) -> Position:
        """The place of the batch that training uses next."""
        return Position(self._ahead[0].epoch, self._ahead[0].batches - 1) if self._ahead else self.used

    @property
    def unused(self) -> int:
        """Batches that were read and not used."""
        return len(self._ahead)

    @property
    def ended(self) -> bool:
        """Whether the current pass came to its end."""
        return self._ended

    @property
    def read(self) -> Position:
        """The place after the last batch that was read."""
        return Position(self.start.epoch, self._read)

    def move(self, position: Position) -> None:
        """Begin the next pass at ``position``."""
        self.used = self.start = position
        self._ahead.clear()
        self._read, self._touched, self._ended = position.batches, False, False

    def begin(self) -> Position:
        """Begin a pass; where it begins."""
        if not self._ended:
            self._ahead.clear()
        if self._touched or self._ended:
            self.start = Position(self.start.epoch + 1, 0)
        self._read, self._touched, self._ended = self.start.batches, False, False
        return self.start

    def add(self) -> None:
        """A batch was read."""
        self._read += 1
        self._ahead.append(self.read)

    def end(self) -> None:
        """The pass came to its end."""
        self._ended = True

    def use(self) -> None:
        """Training uses the oldest batch that was read and not used."""
        if self._ahead:
            self.used = self._ahead.popleft()
            self._touched |= self.used.epoch == self.start.epoch
