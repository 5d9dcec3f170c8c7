"""What did a job do when? Made from the marks in its log, its steps, and the times of its submission and its end; pure.

Times are epoch seconds. A job's log is written by its node's clock, a submission is noted by the login node's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache

from slurm.lib.observe.steps import Step

QUEUE, TRAINING, ENDED = "in the queue", "training", "ended"
ZONE_S = 900.0  # time zones differ by quarters of an hour
MOST_ZONES_S = 27 * 3600.0
_AFTER_STEPS = frozenset({"saving before the time limit", "stopping the trainer", "stopping", ENDED})


@dataclass(frozen=True)
class Mark:
    """From ``at`` on a job does what ``words`` say."""

    at: float
    words: str


@dataclass(frozen=True)
class Span:
    """What a job did from one moment to another; ``end`` is None for what goes on, or whose end is not known."""

    words: str
    begin: float
    end: float | None
    is_about: bool = False

    def seconds(self, now: float) -> float:
        """Its length, until ``now`` if it goes on."""
        return max(0.0, (now if self.end is None else self.end) - self.begin)


@lru_cache(maxsize=1024)
def local_epoch(stamp: str) -> float | None:
    """Epoch seconds of a log's ``2026-11-28 19:50:52``, which is in this host's time zone."""
    try:
        return datetime.fromisoformat(stamp[:19]).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def utc_epoch(stamp: str) -> float | None:
    """Epoch seconds of a record's ``2026-11-28T19:50:52+00:00``."""
    try:
        moment = datetime.fromisoformat(stamp)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def zone_shift(marks: Sequence[Mark], ended: float | None) -> float:
    """What to add to the times of a log whose node is in another time zone: the job's end is known in UTC, too."""
    if ended is None or not marks or marks[-1].words != ENDED:
        return 0.0
    shift = round((ended - marks[-1].at) / ZONE_S) * ZONE_S
    return shift if abs(shift) <= MOST_ZONES_S else 0.0


def spans(marks: Sequence[Mark], steps: Sequence[Step], ended: float | None, goes_on: bool) -> tuple[Span, ...]:
    """What a job did, one after the other. Steps are one span, from the begin of the first to what came after them."""
    points = _changes([*marks, *_training(marks, steps)])
    if len(points) > 1 and points[-1].words == ENDED and ended is not None:
        points.pop()  # told in whole seconds too, and perhaps in the one before
    if not points:
        return ()
    last = ended if ended is not None else None if goes_on else points[-1].at
    ends = [*[point.at for point in points[1:]], last]
    found = [Span(point.words, point.at, end) for point, end in zip(points, ends, strict=True)]
    about = bool(steps) and steps[0].is_about
    shown = (span for span in found if span.words != ENDED)
    return tuple(replace(span, is_about=about and span.words == TRAINING) for span in shown)


def _training(marks: Sequence[Mark], steps: Sequence[Step]) -> list[Mark]:
    """From when on there were steps. A first one without a length is taken to be as long as the one after it."""
    first = steps[0] if steps else None
    if first is None or first.at is None:
        return []
    second = steps[1].seconds if len(steps) > 1 else None
    length = first.seconds if first.seconds is not None else second or 0.0
    before = [mark.at for mark in marks if mark.words not in _AFTER_STEPS and mark.at <= first.at]
    return [Mark(max(first.at - length, *before) if before else first.at - length, TRAINING)]


def _changes(marks: Iterable[Mark]) -> list[Mark]:
    """The marks by time, each only where it says another thing than the one before."""
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.at, mark.words in _AFTER_STEPS)):  # logs tell whole seconds
        if not found or found[-1].words != mark.words:
            found.append(mark)
    return found


def first_step_begin(found: Iterable[Span]) -> float | None:
    """When the first step began."""
    return next((span.begin for span in found if span.words == TRAINING), None)
