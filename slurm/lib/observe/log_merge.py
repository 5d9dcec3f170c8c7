"""In which order are the lines of several logs shown, and which only once? Pure; few lines of each log are held."""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Origin:
    """Which log a line is from: ``attempt`` counts from 1, ``stream`` is ``out`` or ``err``."""

    kind: str
    job_id: str
    attempt: int
    stream: str

    @property
    def order(self) -> tuple[int, int, int, str, bool]:
        """In which lines of one moment come: by attempt, runtime and workers first, ``.out`` before ``.err``."""
        kind = ("runtime", "worker", "training").index(self.kind)
        return (self.attempt, kind, len(self.job_id), self.job_id, self.stream != "out")

    @property
    def task(self) -> str:
        """The number of a worker in its array; empty for other jobs."""
        return self.job_id.partition("_")[2] if self.kind == "worker" else ""


@dataclass(frozen=True)
class Line:
    """A line of a log; ``at`` in epoch seconds, its own word where ``is_own``, else an estimate."""

    at: float
    text: str
    origin: Origin
    is_own: bool = True


def merged(logs: Sequence[Iterable[Line]]) -> Iterator[Line]:
    """The lines of all logs by time, each log's own order kept; of one moment in the order of the logs.

    Where a log's time goes back, as with a clock that was set, its lines come at once.
    """
    return (line for *_key, line in heapq.merge(*(_keyed(number, lines) for number, lines in enumerate(logs))))


def _keyed(number: int, lines: Iterable[Line]) -> Iterator[tuple[float, int, int, Line]]:
    return ((line.at, number, count, line) for count, line in enumerate(lines))


WINDOW = 1000  # lines of each of a job's logs that are compared
HELD = 1 << 20  # characters of lines that wait
LONG = 256
TELLING = 20  # characters that no two lines have in common by accident
CLOCKS_S = 5.0  # whole seconds, and the clocks of nodes whose lines are in one log
SERVERS_S = 120.0  # the clock of a file server, by which a line's time may be estimated


@dataclass
class Pairing:
    """Makes one of a job's two logs: nearly all that its ``.err`` has stands in its ``.out`` too, in the same order.

    Such a line is shown once, where the ``.out`` has it, as one of the ``.err``. What the ``.err`` alone has, as
    Slurm's own words, comes before the next line that both have. ``is_whole`` where both are read from their beginning:
    else what comes before the first line that both have, or was written before ``begin``, is older than what is shown
    of the ``.out``.
    """

    is_whole: bool = True
    begin: float = -math.inf
    waiting: deque[Line] = field(default_factory=deque)  # of the .err, whose like has not been seen
    _texts: Counter[str] = field(default_factory=Counter)  # theirs
    _times: deque[float] = field(default_factory=deque)  # of those that say it
    _held: int = 0  # their characters
    _seen: deque[str] = field(default_factory=deque)  # of the .out, whose like has not been seen
    _seen_texts: Counter[str] = field(default_factory=Counter)

    @property
    def has_room(self) -> bool:
        return len(self.waiting) < WINDOW and self._held < HELD

    def take_err(self, line: Line) -> Iterator[Line]:
        """Take the next line of the ``.err``; returns what waits no longer."""
        if _sign(line.text) in self._seen_texts and (not self.waiting or _is_telling(line.text)):
            yield from self.rest()  # what waits stands before it in both
            if self._was_seen(line.text):
                return
        if not self.has_room:
            yield from self._alone()
        self.waiting.append(line)
        self._held += len(line.text)
        self._texts[line.text] += 1
        if line.is_own:
            self._times.append(line.at)

    def take_out(self, line: Line) -> Iterator[Line]:
        """The next line of the ``.out``, after what the ``.err`` alone has before it."""
        while line.is_own and self._times and self._times[0] + CLOCKS_S < line.at:
            yield from self._alone(line.at)
        if not self._is_like(line.text):
            self._remember(line.text)
            yield line
            return
        while self.waiting[0].text != line.text:
            is_shown = self.is_whole or self.waiting[0].is_own
            yield from [own for own in self._alone(line.at) if is_shown]
        self.is_whole = True
        yield replace(line, origin=self._next().origin)

    def rest(self) -> Iterator[Line]:
        """What still waits."""
        while self.waiting:
            yield from self._alone()

    def _is_like(self, text: str) -> bool:
        """Whether a line of the ``.out`` is one that waits: the first one, or one that is no accident."""
        return bool(self._texts[text]) and (self.waiting[0].text == text or _is_telling(text))

    def _alone(self, latest: float = math.inf) -> list[Line]:
        """The first line that waits, if it is to be shown without its like, which has not been seen."""
        line = self._next()
        is_old = line.at + (1.0 if line.is_own else SERVERS_S) <= self.begin  # a second may be cut off
        if is_old or self._was_seen(line.text):
            return []
        return [line if line.at <= latest else replace(line, at=latest)]

    def _next(self) -> Line:
        line = self.waiting.popleft()
        self._held -= len(line.text)
        _less(self._texts, line.text)
        if line.is_own:
            self._times.popleft()
        return line

    def _was_seen(self, text: str) -> bool:
        """Whether the ``.out`` has had such a line; it, and all before it, are forgotten then."""
        sign = _sign(text)
        if sign not in self._seen_texts:
            return False
        while self._forget() != sign:
            pass
        return True

    def _remember(self, text: str) -> None:
        self._seen.append(_sign(text))
        self._seen_texts[self._seen[-1]] += 1
        if len(self._seen) > WINDOW:
            self._forget()

    def _forget(self) -> str:
        text = self._seen.popleft()
        _less(self._seen_texts, text)
        return text


def _sign(text: str) -> str:
    """What a line is known by, which is never long."""
    return text if len(text) <= LONG else f"{text[:LONG]}{hash(text)}"


def _is_telling(text: str) -> bool:
    return len(text.strip()) >= TELLING


def _less(counts: Counter[str], text: str) -> None:
    counts[text] -= 1
    if not counts[text]:
        del counts[text]


def together(out: Iterator[Line], err: Iterator[Line], pairing: Pairing) -> Iterator[Line]:
    """Both logs of a job as one, from what is there of them; what may still find its like goes on waiting."""
    for line in out:
        while pairing.has_room and (own := next(err, None)):
            yield from pairing.take_err(own)
        yield from pairing.take_out(line)
    for own in err:
        yield from pairing.take_err(own)
