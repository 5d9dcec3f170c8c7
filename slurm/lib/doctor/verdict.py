"""One line of the doctor's: what was looked at, where, whether it is well, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from slurm.lib.preflight.finding import Finding, Level


class Health(Enum):
    """How well something is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


OF_LEVEL = {Level.ERROR: Health.FAIL, Level.WARNING: Health.WARN, Level.ESTIMATE: Health.OK}


@dataclass(frozen=True)
class Verdict:
    """``check`` is what was looked at; ``sentence`` what was found; ``fix`` what to do, empty where all is well."""

    check: str
    health: Health
    sentence: str
    fix: str = ""


def ok(check: str, sentence: str) -> Verdict:
    """All is well."""
    return Verdict(check, Health.OK, sentence)


def warn(check: str, sentence: str, fix: str) -> Verdict:
    """What makes runs slower or less safe, or could not be found out."""
    return Verdict(check, Health.WARN, sentence, fix)


def fail(check: str, sentence: str, fix: str) -> Verdict:
    """What lets no run work."""
    return Verdict(check, Health.FAIL, sentence, fix)


def of_findings(check: str, found: Sequence[Finding], well: str) -> list[Verdict]:
    """What the checks before a submission say, as verdicts; the sentence ``well`` where they find nothing."""
    told = [Verdict(check, OF_LEVEL[each.level], each.sentence, each.fix) for each in found]
    return told or [ok(check, well)]


@dataclass(frozen=True)
class Section:
    """The verdicts about one place, such as ``cpu-a (partition test)``."""

    place: str
    verdicts: tuple[Verdict, ...]
