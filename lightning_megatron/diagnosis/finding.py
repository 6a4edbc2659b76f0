"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """How a finding is."""

    OK = "ok"
    NOTE = "note"
    """Works, but could be better or may surprise."""
    PROBLEM = "problem"
    """Does not work, or gives wrong results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    """A command or a setting; empty if there is nothing to mend."""


def ok(name: str, detail: str) -> Finding:
    """Nothing to mend."""
    return Finding(name=name, status=Status.OK, detail=detail)


def note(name: str, detail: str, remedy: str) -> Finding:
    """Something to know."""
    return Finding(name=name, status=Status.NOTE, detail=detail, remedy=remedy)


def problem(name: str, detail: str, remedy: str) -> Finding:
    """Something to mend."""
    return Finding(name=name, status=Status.PROBLEM, detail=detail, remedy=remedy)
