"""What a check found: an error that stops the launch, a warning, or an estimate; each with what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How much a finding weighs."""

    ERROR = "error"
    WARNING = "warning"
    ESTIMATE = "estimate"


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    ``check`` is the check's name as ``--no-check=NAME`` takes it, ``sentence`` says what was found and where, ``fix``
    what to do about it (empty for an estimate that asks for nothing).
    """

    check: str
    level: Level
    sentence: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.check}: {self.sentence}" + (f"; {self.fix}" if self.fix else "")


def error(check: str, sentence: str, fix: str) -> Finding:
    """What cannot work."""
    return Finding(check, Level.ERROR, sentence, fix)


def warning(check: str, sentence: str, fix: str) -> Finding:
    """What may not work, or could not be found out."""
    return Finding(check, Level.WARNING, sentence, fix)


def estimate(check: str, sentence: str, fix: str = "") -> Finding:
    """What the run will do or need."""
    return Finding(check, Level.ESTIMATE, sentence, fix)
