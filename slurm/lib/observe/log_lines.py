"""What are the lines of a log, when were they written, and what of them may a terminal see? Pure, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import lru_cache

from slurm.lib.observe.run_files import printable

LONGEST = 1 << 16  # bytes that are kept of a line


@dataclass(frozen=True)
class RawLine:
    """A line as it stands in the file at ``start``, without its end; ``lost`` bytes of it were too many to keep."""

    data: bytes
    start: int
    lost: int = 0

    def text(self) -> str:
        more = f" … ({self.lost} more bytes)" if self.lost else ""
        return self.data.decode("utf-8", "replace") + more


@dataclass
class Cutter:
    """Cuts what is read of a log, a piece at a time, into lines.

    Of a line that overwrote itself (carriage returns, as a progress bar's) only its last state is a line.
    """

    position: int = 0  # of the next byte
    _begin: int = field(init=False)
    _state: bytearray = field(default_factory=bytearray)
    _lost: int = 0
    _before: RawLine | None = None  # the last state that was overwritten

    def __post_init__(self) -> None:
        self._begin = self.position

    def feed(self, data: bytes) -> Iterator[RawLine]:
        """The lines that end in the next piece."""
        *whole, rest = data.split(b"\n")
        for piece in whole:
            yield self._ended(piece)
            self.position += len(piece) + 1
            self._clear()
        self._take(rest)
        self.position += len(rest)

    def rest(self) -> RawLine | None:
        """The line that has no end yet, if it has begun."""
        return self._line() if self.position > self._begin else None

    @property
    def is_overwriting(self) -> bool:
        """Whether that line overwrites itself."""
        return self._before is not None

    def _ended(self, piece: bytes) -> RawLine:
        if self.position == self._begin and len(piece) <= LONGEST and b"\r" not in piece:
            return RawLine(piece, self._begin)  # as nearly all are
        self._take(piece)
        return self._line()

    def _take(self, piece: bytes) -> None:
        for number, state in enumerate(piece.split(b"\r")):
            if number:
                self._overwrite()
            room = LONGEST - len(self._state)
            self._state += state[:room]
            self._lost += max(0, len(state) - room)

    def _overwrite(self) -> None:
        if self._state.strip():
            self._before = RawLine(bytes(self._state), self._begin, self._lost)
        self._state.clear()
        self._lost = 0

    def _line(self) -> RawLine:
        if self._before and not self._state.strip():
            return self._before
        return RawLine(bytes(self._state), self._begin, self._lost)

    def _clear(self) -> None:
        self._begin, self._before, self._lost = self.position, None, 0
        self._state.clear()


# --- times ------------------------------------------------------------------------------------------------------------

# How lines begin that say when they were written: those of our jobs, of Ray and Python's logging, of Podman, of Slurm;
# also behind Ray's mark of the process that wrote them.
STAMP = re.compile(
    rb"^(?:\x1b\[[\d;]{0,9}m)*(?:\([\w. ]{1,60} pid=\d{1,10}(?:, ip=[\d.]{1,40})?\)(?:\x1b\[[\d;]{0,9}m)* )?"
    rb'(?:\[|time="|slurmstepd[\w.-]{0,80}: error: \*\*\* [^\n]{0,120}? AT )?'
    rb"(20\d\d-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,6})\d*)?(Z|[+-]\d\d:?\d\d)?",
    re.MULTILINE,
)


def stamp_of(data: bytes) -> float | None:
    """When a line says that it was written, in epoch seconds; None where it does not say."""
    return time_of(match) if (match := STAMP.match(data)) else None


def time_of(match: re.Match[bytes]) -> float | None:
    """The moment that a match of ``STAMP`` is about; without a zone it is in this host's."""
    day, clock, fraction, zone = match.groups()
    whole = _epoch(day, clock, zone)
    return None if whole is None else whole + (float(b"0." + fraction) if fraction else 0.0)


@lru_cache(maxsize=4096)  # lines of one second stand together
def _epoch(day: bytes, clock: bytes, zone: bytes | None) -> float | None:
    try:
        moment = datetime.fromisoformat(f"{day.decode()}T{clock.decode()}")
        return moment.replace(tzinfo=_zone(zone) if zone else None).timestamp()
    except (ValueError, OverflowError):
        return None


def _zone(text: bytes) -> timezone:
    if text == b"Z":
        return timezone.utc
    ahead = timedelta(hours=int(text[1:3]), minutes=int(text[-2:]))
    return timezone(-ahead if text.startswith(b"-") else ahead)


@dataclass(frozen=True)
class Anchor:
    """A place in a file that was written at a known time."""

    offset: int
    at: float


def between(before: Anchor, after: Anchor, offset: int) -> float:
    """When what stands between two places was written, as if as many bytes had been written in each second."""
    if after.offset <= before.offset or after.at <= before.at:
        return before.at
    share = (offset - before.offset) / (after.offset - before.offset)
    return min(after.at, before.at + (after.at - before.at) * min(1.0, max(0.0, share)))


# --- what a terminal may see ------------------------------------------------------------------------------------------

_ODD = re.compile(r"[^\t -~\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")
_ESCAPE = re.compile(
    r"((?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, the cursor's moves
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # a title, the clipboard, a link
    r"|\x1b[ -/]*[0-~])"  # a reset, another set of characters
)
_COLOUR = re.compile(
    r"\x1b\[(?:(?:0?|[1-4]|7|2[1-4]|27|[349][0-79]|10[0-7]|[34]8;5;\d{1,3}|[34]8;2;\d{1,3};\d{1,3};\d{1,3})(?:;|(?=m)))*m"
)
RESET = "\x1b[0m"


def cleaned(text: str, *, colour: bool = False) -> str:
    """The line without what would steer a terminal; with ``colour`` it may be coloured, up to its own end."""
    if not _ODD.search(text):
        return text
    parts = _ESCAPE.split(text)
    shown = "".join(_shown(part, bool(at % 2), colour) for at, part in enumerate(parts))
    return shown + RESET if "\x1b" in shown else shown


def _shown(part: str, is_escape: bool, colour: bool) -> str:
    if not is_escape:
        return printable(part).replace("\n", "")
    return part if colour and _COLOUR.fullmatch(part) else ""
