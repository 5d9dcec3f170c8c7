"""Reads a run's logs: from their end backwards as far as is asked for, then on, however long they are.

A file is opened by its name for each piece, since an NFS client learns of growth at an opening, and a log may be
replaced. Trainers' lines seldom say when they were written: it is estimated from the lines around them that do.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from slurm.lib.coordination import CoordinationDir
from slurm.lib.observe.log_lines import STAMP, Anchor, Cutter, RawLine, between, stamp_of, time_of
from slurm.lib.observe.log_merge import Line, Origin, Pairing, together
from slurm.lib.observe.record import RunRecord
from slurm.lib.observe.run_files import names_in, opened
from slurm.lib.observe.unknown import Unknown

CHUNK = 1 << 16
BLOCK = 1 << 18  # bytes that are searched at once
FAR = 1 << 24  # bytes on each side of a line in which one with a time is looked for
HEAD = 1 << 16
PIECE = 1 << 16  # bytes without a time that stay together
JUST_S = 0.001
STAMP_ROOM = 512  # bytes of a line that its time is looked for in
CLOCKS_S = 120.0  # a node's clock may be so far before the file server's
BAR_EVERY_S = 30.0
HOLD_S = 3.0
_ID = r"\d{1,12}|local\d+\.\d+|(?<=worker_)\d{1,12}_\d{1,7}"
_LOG_NAME = re.compile(rf"(runtime|training|worker)_({_ID})\.(out|err)", re.ASCII)


def origins(record: RunRecord, names: frozenset[str]) -> list[Origin]:
    """The logs in a run's directory, in their order; one of a job that no record names is of the first attempt."""
    attempts: dict[str, int] = {}
    for pair in record.pairs:
        for job in pair.everybody:
            attempts.setdefault(job.job_id, pair.attempt)
    found = (Origin(m[1], m[2], attempts.get(m[2], 1), m[3]) for m in map(_LOG_NAME.fullmatch, names) if m)
    return sorted(found, key=lambda origin: origin.order)


def log_names(directory: CoordinationDir) -> frozenset[str] | Unknown:
    """The names of the logs in a run's directory."""
    names = names_in(directory.path)
    return names if isinstance(names, Unknown) else frozenset(filter(_LOG_NAME.fullmatch, names))


@dataclass
class LogFile:
    """A log that is read on from ``cutter.position``; ``problem`` says why it cannot be read, while that is so."""

    origin: Origin
    path: Path
    began: float | None = None  # when its job was recorded, for want of anything better
    cutter: Cutter = field(default_factory=Cutter)
    problem: str = ""
    was_replaced: bool = False
    changed: float = -math.inf  # when the file last was, by the clock of its server
    _read_to: int = 0
    _identity: tuple[int, int] | None = None
    _bar_shown: tuple[float, str] = (-math.inf, "")

    # --- what is there ---

    def skip(self, lines: int | None, since: float) -> int:
        """Begin only with its last lines, and where its first line since a moment can be; returns where that is."""
        with contextlib.suppress(OSError), self._open() as file:
            self._note(file)
            size = os.fstat(file.fileno()).st_size
            begin = 0 if lines is None else start_of_last(file, size, lines)
            if since > self._latest:
                begin = size
            elif since > -math.inf:
                last = last_stamp(file, size, self._latest, before=since)
                begin = max(begin, last.offset if last else 0)
            self._read_to = begin
            self.cutter = Cutter(begin)
        return self._read_to

    def there(self) -> Iterator[Line]:
        """The whole lines that are there now, with their times as well as they can be known."""
        times: _Times | None = None
        for raw in self._raw():
            times = times or _Times(self, self._anchor(raw.start))
            yield self._line(raw, *times.of(raw))

    def _anchor(self, offset: int) -> Anchor:
        with contextlib.suppress(OSError), self._open() as file:
            found = last_stamp(file, offset, self._latest, far=FAR)
            return found or Anchor(0, self._start(first_stamp_in(file, self._latest)))
        return Anchor(0, self._start(None))

    def _start(self, own: float | None) -> float:
        """When the file was begun: as its first line with a time says, or that of the job's other log."""
        suffix = ".err" if self.path.suffix == ".out" else ".out"
        other = None
        with contextlib.suppress(OSError), opened(self.path.with_suffix(suffix)) as file:
            other = first_stamp_in(file, self._latest)
        known = [moment for moment in (own, other) if moment is not None]
        return min(known) if known else self.began if self.began is not None else self.changed

    def first_time(self) -> float | None:
        """When the next line was written, which stays the next one."""
        probe = LogFile(self.origin, self.path, self.began, Cutter(self._read_to), _read_to=self._read_to)
        return next((line.at for line in probe.there()), None)

    # --- what comes ---

    def new(self, now: float) -> Iterator[Line]:
        """The whole lines that have come since; one that does not say when it was written was written now."""
        for raw in self._raw():
            own = self.believed(stamp_of(raw.data), now)
            yield self._line(raw, now if own is None else own, own is not None)

    def unfinished(self, now: float) -> Iterator[Line]:
        """The last line, which has no end."""
        if raw := self.cutter.rest():
            own = self.believed(stamp_of(raw.data), now)
            self.cutter = Cutter(self.cutter.position)
            yield self._line(raw, now if own is None else own, own is not None)

    def bar(self, now: float) -> Iterator[Line]:
        """The state of a progress bar that has no end yet, from time to time where it changes."""
        raw = self.cutter.rest() if self.cutter.is_overwriting else None
        shown_at, text = self._bar_shown
        if raw and now - shown_at >= BAR_EVERY_S and raw.text() != text:
            self._bar_shown = now, raw.text()
            yield self._line(raw, now, False)

    def believed(self, stamp: float | None, now: float = -math.inf) -> float | None:
        """A time that a line says, unless it is later than its file: then it is about something else."""
        return stamp if stamp is not None and stamp <= max(self._latest, now + CLOCKS_S) else None

    def _line(self, raw: RawLine, at: float, is_own: bool) -> Line:
        return Line(at, raw.text(), self.origin, is_own)

    # --- reading ---

    @property
    def _latest(self) -> float:
        return self.changed + CLOCKS_S

    def _raw(self) -> Iterator[RawLine]:
        """The lines that end before what is the file's end now."""
        end = self._size()
        while self._read_to < end and (data := self._read(min(CHUNK, end - self._read_to))):
            yield from self.cutter.feed(data)

    def _size(self) -> int:
        """The file's size; one that is shorter than what was read of it, or another, is begun again."""
        try:
            with self._open() as file:
                status = os.fstat(file.fileno())
                is_other = self._identity not in {None, (status.st_dev, status.st_ino)}
                if is_other or status.st_size < self._read_to:
                    self.was_replaced, self._read_to, self.cutter = True, 0, Cutter()
                self._note(file)
                return status.st_size
        except OSError as problem:
            self._complain(problem)
            return 0

    def _read(self, size: int) -> bytes:
        try:
            with self._open() as file:
                file.seek(self._read_to)
                data = file.read(size)
        except OSError as problem:
            self._complain(problem)
            return b""
        self._read_to += len(data)
        return data

    def _open(self) -> BinaryIO:
        file = opened(self.path)
        self.problem = ""
        return file

    def _note(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        self._identity, self.changed = (status.st_dev, status.st_ino), status.st_mtime

    def _complain(self, problem: OSError) -> None:
        why = problem.strerror or "it is no regular file"
        with contextlib.suppress(OSError):
            why = f"it is a link to {self.path.readlink()}: {why}"
        self.problem = f"{self.path.name} cannot be read: {why}"


@dataclass
class _Times:
    """When the lines of a file were written: one that does not say it just before the next one that does.

    So a traceback stays whole, and comes before what it led to. Where more lies between, each piece of that has its
    share of the time.
    """

    file: LogFile
    before: Anchor
    _after: Anchor | None = None
    _valid_to: int = 0
    _last: Anchor | None = None  # the file's last line that says its time, once that was looked for

    def of(self, raw: RawLine) -> tuple[float, bool]:
        """A line's time, and whether the line says it itself; lines come in their order."""
        own = self.file.believed(stamp_of(raw.data))
        if own is not None:
            self.before = Anchor(raw.start, own)
            return own, True
        if self._after is None or raw.start >= self._valid_to:
            self._after, self._valid_to = self._look_ahead(raw.start)
        pieces_after = max(0, self._after.offset - raw.start - 1) // PIECE
        at = between(self.before, self._after, self._after.offset - pieces_after * PIECE)
        return max(self.before.at, at - JUST_S), False

    def _look_ahead(self, offset: int) -> tuple[Anchor, int]:
        """What comes next of which the time is known, and up to where that need not be looked for again."""
        try:
            with opened(self.file.path) as file:
                size = os.fstat(file.fileno()).st_size
                latest = self.file.changed + CLOCKS_S
                if found := next_stamp(file, offset, min(size, offset + FAR), latest):
                    return found, found.offset
                self._last = self._last or last_stamp(file, size, latest, far=FAR) or Anchor(0, 0)
        except OSError:
            return self.before, offset + FAR
        is_ahead = self._last.offset > offset
        return (self._last if is_ahead else Anchor(size, self.file.changed)), offset + FAR


def _is_out_too(path: Path) -> bool:
    """Whether an ``.err`` is its job's ``.out``: a job that was given to sbatch directly may write one file."""
    try:
        return path.suffix == ".err" and path.is_symlink() and path.resolve() == path.with_suffix(".out").resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False


# --- places in a file -------------------------------------------------------------------------------------------------


def stamps_in(file: BinaryIO, begin: int, end: int, latest: float) -> Iterator[Anchor]:
    """The lines that begin in a part of a file and say when they were written."""
    first = max(0, begin - 1)  # tells whether a line begins with the part
    file.seek(first)
    data = file.read(end - first + STAMP_ROOM)
    for match in STAMP.finditer(data):
        offset, at = first + match.start(), time_of(match)
        if begin <= offset < end and at is not None and at <= latest:
            yield Anchor(offset, at)


def first_stamp_in(file: BinaryIO, latest: float) -> float | None:
    """The first time in a file's beginning."""
    found = next(stamps_in(file, 0, HEAD, latest), None)
    return found.at if found else None


def next_stamp(file: BinaryIO, begin: int, end: int, latest: float) -> Anchor | None:
    """The next line in a part of a file that says when it was written."""
    for start in range(begin, end, BLOCK):
        if found := next(stamps_in(file, start, min(end, start + BLOCK), latest), None):
            return found
    return None


def last_stamp(
    file: BinaryIO, end: int, latest: float, *, before: float = math.inf, far: float = math.inf
) -> Anchor | None:
    """The last line before an offset, at most ``far`` bytes away, that was written before a moment by its own word."""
    stop = end
    while stop > 0 and end - stop < far:
        start = max(0, stop - BLOCK)
        found = [anchor for anchor in stamps_in(file, start, stop, latest) if anchor.at < before]
        if found:
            return found[-1]
        stop = start
    return None


def start_of_last(file: BinaryIO, size: int, lines: int) -> int:
    """Where the last lines of a file begin, so many."""
    if not lines:
        return size
    missing, stop = lines + 1, size
    while stop > 0:
        start = max(0, stop - BLOCK)
        file.seek(start)
        data = file.read(stop - start)
        if stop == size and not data.endswith(b"\n"):
            missing -= 1  # what has no end yet is a line, too
        at = len(data)
        while missing and (at := data.rfind(b"\n", 0, at)) >= 0:
            missing -= 1
            if not missing:
                return start + at + 1
        stop = start
    return 0


# --- the logs of a run ------------------------------------------------------------------------------------------------


def created_at(record: RunRecord, job_id: str) -> float | None:
    """When the launch of a job was recorded."""
    times = [pair.created for pair in record.pairs if any(job.job_id == job_id for job in pair.everybody)]
    with contextlib.suppress(ValueError, OverflowError):
        return datetime.fromisoformat(next(iter(times), "")).timestamp()
    return None


@dataclass
class JobLogs:
    """The two logs of a job, as one. A job that was given to sbatch directly may write but one."""

    out: LogFile | None = None
    err: LogFile | None = None
    pairing: Pairing = field(default_factory=Pairing)
    _held: tuple[Line, float] | None = None

    @property
    def files(self) -> list[LogFile]:
        return [file for file in (self.out, self.err) if file]

    def skip(self, lines: int | None, since: float) -> None:
        """Begin with the last lines of the ``.out``, and what the ``.err`` has had since."""
        begun = [file.skip(lines, since) for file in self.files[:1]]
        if self.out and self.err:
            first = self.out.first_time() if lines is not None else None
            if first is not None:
                since = self.pairing.begin = max(since, first)
            begun.append(self.err.skip(lines, since))
        self.pairing.is_whole = not any(begun)

    def there(self) -> Iterator[Line]:
        """The whole lines that are there now."""
        out, err = (file.there() if file else iter(()) for file in (self.out, self.err))
        return together(out, err, self.pairing)

    def new(self, now: float) -> Iterator[Line]:
        """The whole lines that have come since; the ``.err`` is read first, what it has stands in the ``.out`` by then.

        What only the ``.err`` has is held back for a moment: shared storage may show the ``.out`` later.
        """
        for line in self.err.new(now) if self.err else ():
            yield from self.pairing.take_err(line)
        for line in self.out.new(now) if self.out else ():
            yield from self.pairing.take_out(line)
        head = self.pairing.waiting[0] if self.pairing.waiting else None
        if head is None or self._held is None or self._held[0] is not head:
            self._held = (head, now) if head else None
        elif now - self._held[1] >= HOLD_S:
            yield from self.pairing.rest()

    def bars(self, now: float) -> Iterator[Line]:
        """The progress bar that has changed, where there is one."""
        return self.files[0].bar(now)

    def unfinished(self) -> Iterator[Line]:
        """What is left: the last lines, where they have no end."""
        for line in self.err.unfinished(self.err.changed) if self.err else ():
            yield from self.pairing.take_err(line)
        for line in self.out.unfinished(self.out.changed) if self.out else ():
            yield from self.pairing.take_out(line)
        yield from self.pairing.rest()


@dataclass
class Logs:
    """The logs of a run, of these kinds of jobs, each read on from where it was left.

    With ``worker`` those of that one alone, by its number in the array, or its id.
    """

    kinds: Sequence[str]
    worker: str = ""
    jobs: dict[str, JobLogs] = field(default_factory=dict)

    def add(self, directory: CoordinationDir, record: RunRecord, names: frozenset[str]) -> list[JobLogs]:
        """Take up those that were not known before; returns the jobs that were not."""
        new = []
        for origin in origins(record, names):
            path = directory.log(origin.kind, origin.job_id, origin.stream)
            if not self._is_wanted(origin) or _is_out_too(path):
                continue
            if origin.job_id not in self.jobs:
                self.jobs[origin.job_id] = JobLogs()
                new.append(self.jobs[origin.job_id])
            job = self.jobs[origin.job_id]
            if getattr(job, origin.stream) is None:
                setattr(job, origin.stream, LogFile(origin, path, created_at(record, origin.job_id)))
        return new

    def _is_wanted(self, origin: Origin) -> bool:
        return origin.kind in self.kinds and self.worker in {"", origin.task, origin.job_id}

    @property
    def files(self) -> list[LogFile]:
        return [file for job in self.in_order for file in job.files]

    @property
    def in_order(self) -> list[JobLogs]:
        return sorted(self.jobs.values(), key=lambda job: job.files[0].origin.order)
