"""In which order are the lines of several logs shown, and which of them twice? Pure; one line of each log is held."""

from __future__ import annotations

import heapq
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Origin:
    """Which log a line is from: ``attempt`` counts from 1, ``stream`` is ``out`` or ``err``."""

    kind: str
    job_id: str
    attempt: int
    stream: str

    @property
    def order(self) -> tuple[int, bool, int, str, bool]:
        """In which lines of one moment come: by attempt, the runtime first, ``.out`` before ``.err``."""
        return (self.attempt, self.kind != "runtime", len(self.job_id), self.job_id, self.stream != "out")


@dataclass(frozen=True)
class Line:
    """A line of a log; ``at`` in epoch seconds, its own word where ``is_own``, else an estimate."""

    at: float
    text: str
    origin: Origin
    is_own: bool = True


def merged(logs: Sequence[Iterable[Line]]) -> Iterator[Line]:
    """The lines of all logs by time, each log's own order kept; of one moment in the order of the logs.

    Where a log's time goes back, as with a clock that was set, its lines count as written at its latest time.
    """
    return (line for *_key, line in heapq.merge(*(_keyed(number, lines) for number, lines in enumerate(logs))))


def _keyed(number: int, lines: Iterable[Line]) -> Iterator[tuple[float, int, int, Line]]:
    latest = -math.inf
    for count, line in enumerate(lines):
        latest = max(latest, line.at)
        yield latest, number, count, line


_WARNING = re.compile(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \[(?:WARN|ERROR|CRITICAL)\] ")
REMEMBERED = 1000


@dataclass
class Repeats:
    """Our jobs say a warning in both of their logs: knows which of the two lines comes second."""

    _first: OrderedDict[tuple[str, str, str], int] = field(default_factory=OrderedDict)

    def is_repeat(self, line: Line) -> bool:
        """Whether the job's other log has had this line, which counts once."""
        if not _WARNING.match(line.text):
            return False
        job, text = line.origin.job_id, line.text
        other = (job, "err" if line.origin.stream == "out" else "out", text)
        if count := self._first.pop(other, 0):
            if count > 1:
                self._first[other] = count - 1
            return True
        own = (job, line.origin.stream, text)
        self._first[own] = self._first.pop(own, 0) + 1
        if len(self._first) > REMEMBERED:
            self._first.popitem(last=False)
        return False
