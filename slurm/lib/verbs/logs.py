"""``launch.py logs``: the logs of a run's jobs, of all its attempts, in the order of time.

With ``-f`` it goes on until the run has ended: it shows what comes, and waits as ``launch.py wait`` does.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import select
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import chain

from slurm.lib.command_line import Parser
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, EnvironmentProblem
from slurm.lib.logs import KIND_COLOURS, give_up, log, wants_colour
from slurm.lib.observe.log_files import JobLogs, Logs, log_names
from slurm.lib.observe.log_lines import RESET, cleaned
from slurm.lib.observe.log_merge import Line, Origin, merged
from slurm.lib.observe.record import RunRecord
from slurm.lib.observe.survey import Survey, record_of
from slurm.lib.observe.unknown import Unknown
from slurm.lib.runs import FoundRun
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.moment import WAYS, moment
from slurm.lib.verbs.named import HELP, named, worker_name

SCHEMA = 1
KINDS = ("runtime", "worker", "training")
RED = "\x1b[31m"
BUFFERED = 1 << 16  # characters before they are written
QUIET_S, DRAIN_S = 2.0, 15.0  # a run's last lines are seen some time after its end, on shared storage
EPILOG = """\
exit codes: 0 shown, also where there is no log yet; with -f that of the run's trainer, as launch.py wait has it; 2 the
command line is wrong, or there is no such run; 69 with -f: no exit code is known; 71 a log cannot be read (the others
are shown), or the run's directory is gone; 128+N stopped by signal N: the run goes on.
"""


def build_parser() -> Parser:
    parser = Parser(prog="launch.py logs", description="Show the logs of a run's jobs by time.", epilog=EPILOG)
    parser.add_argument("run", metavar="RUN", help=HELP)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--runtime", action="store_true", help="the runtime jobs' logs alone")
    which.add_argument("--training", action="store_true", help="the training jobs' logs alone")
    which.add_argument("--workers", action="store_true", dest="worker", help="the logs of the runtime's workers alone")
    which.add_argument("--worker", metavar="N", type=worker_name, dest="one", help="worker N's log alone")
    parser.add_argument("--since", metavar="TIME", type=_since, default=-math.inf, help=f"lines since then: {WAYS}")
    parser.add_argument("-n", "--lines", metavar="N", type=_count, help="begin with the last N lines of each job")
    parser.add_argument("--grep", metavar="REGEX", type=_pattern, help="lines that match, as Python's re.search")
    parser.add_argument("--json", action="store_true", help="each line as one JSON object")
    return parser


def _since(text: str) -> float:
    try:
        return moment(text, datetime.now().astimezone()).timestamp()
    except (ValueError, OverflowError) as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return int(text)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read differently
            return re.compile(text)
    except (re.error, OverflowError, RecursionError) as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {problem}") from None


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    survey = Survey(Slurm(), notes)
    (run,) = named([arguments.run], survey.slurm)
    chosen = [kind for kind in KINDS if getattr(arguments, kind)]
    kinds = ["worker"] if arguments.one else chosen or list(KINDS)
    shown = Shown(Logs(kinds, arguments.one or ""), Page(arguments.json, arguments.since, arguments.grep), notes)
    try:
        shown.begin(run, arguments.lines, follow=arguments.follow)
        if not shown.logs.jobs:
            explain_absence(survey, run, shown.logs)
        return followed(survey, run, shown) if arguments.follow else shown.exit_code
    except ReaderGone:
        return EXIT_OK


def explain_absence(survey: Survey, run: FoundRun, wanted: Logs) -> None:
    """Say why there is no log: the job is in the queue, or never began."""
    from slurm.lib.reports.run_words import job_words
    from slurm.lib.reports.worker_words import array_lines

    (view,) = survey.look([run], servers=False)
    now, pair = time.time(), view.pair
    words = (
        [f"{job.kind} job {job.job_id}: {job_words(job, now)}" for job in pair.jobs if job.kind in wanted.kinds]
        if pair
        else []
    )
    words += [f"workers {line}" for line in array_lines(pair.workers, now)] if pair and "worker" in wanted.kinds else []
    what = "no log" if len(wanted.kinds) == len(KINDS) else f"no {wanted.kinds[0]} log"
    what = f"no log of a worker {wanted.worker}" if wanted.worker else what
    yet = "" if view.state.is_over else " yet"
    log.info(
        "%s has %s%s: it is %s%s", view.record.name, what, yet, view.state.value, "".join(f"; {one}" for one in words)
    )


def followed(survey: Survey, run: FoundRun, shown: Shown) -> int:
    """Show what comes until the run has ended; the exit code is its trainer's."""
    from slurm.lib.verbs.wait import Wait, end_with

    wait = Wait(survey, run, shown.notes, meanwhile=shown.go_on)
    view = wait.until_over()
    shown.end(wait.run)
    return end_with(view, survey.slurm)


class ReaderGone(Exception):
    """Whoever read our stdout has left."""


@dataclass
class Shown:
    """The logs of a run, as far as they have been shown."""

    logs: Logs
    page: Page
    notes: SignalNotes
    _names: frozenset[str] = frozenset()
    _problems: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return EXIT_ENVIRONMENT if self._problems else EXIT_OK

    def begin(self, run: FoundRun, lines: int | None, *, follow: bool) -> None:
        """Show what is there; a last line without an end only if nothing more is to come."""
        for job in self._found(run):
            job.skip(lines, self.page.since)
        self._print(merged([chain(job.there(), () if follow else job.unfinished()) for job in self.logs.in_order]))

    def go_on(self, run: FoundRun) -> bool:
        """Show what has come since; returns whether something has."""
        self._found(run)
        now = time.time()
        some = self._print(merged([job.new(now) for job in self.logs.in_order]))
        bars = self._print(merged([job.bars(now) for job in self.logs.in_order]))
        for file in self.logs.files:
            if file.was_replaced:
                log.warning("%s was begun again, and is shown from its beginning", file.path.name)
                file.was_replaced = False
        if self.page.is_unread():
            raise ReaderGone
        return some or bars

    def end(self, run: FoundRun) -> None:
        """Show the last lines, which a shared directory may still hold back."""
        begin = quiet_since = time.monotonic()
        while (now := time.monotonic()) - begin < DRAIN_S and now - quiet_since < QUIET_S:
            quiet_since = now if self.go_on(run) else quiet_since
            self.notes.sleep(0.25)
            self.notes.check()
        self._print(merged([job.unfinished() for job in self.logs.in_order]))

    def _found(self, run: FoundRun) -> list[JobLogs]:
        """The jobs whose logs were not there before."""
        if run.directory is None:
            return []
        names = log_names(run.directory)
        if isinstance(names, Unknown):
            self._complain("", f"the run's directory cannot be read: {names.why}")
            return []
        if names == self._names:
            return []
        self._names = names
        record = record_of(run)
        new = self.logs.add(run.directory, record, names)
        self.page.know(record, [file.origin for file in self.logs.files])
        return new

    def _print(self, lines: Iterator[Line]) -> bool:
        some = False
        for line in lines:
            some = True
            self.page.add(line)
            self.notes.check()
        self.page.flush()
        for file in self.logs.files:
            self._complain(file.path.name, file.problem)
        return some

    def _complain(self, name: str, problem: str) -> None:
        if problem and self._problems.get(name) != problem:
            log.warning("%s; the other logs are shown", problem)
        if problem:
            self._problems[name] = problem


@dataclass
class Page:
    """Prints lines as a person or a script wants them, and only those that are wanted."""

    as_json: bool
    since: float
    wanted: re.Pattern[str] | None
    coloured: bool = field(default_factory=lambda: wants_colour(sys.stdout))
    _labels: dict[Origin, str] = field(default_factory=dict)
    _buffer: list[str] = field(default_factory=list)
    _size: int = 0

    def know(self, record: RunRecord, origins: Sequence[Origin]) -> None:
        """How the lines of each log begin: with the job's kind, and what sets it apart from others of the run."""
        self._labels = labels(record.attempts, origins)

    def add(self, line: Line) -> None:
        """Print a line, if it is wanted."""
        text = cleaned(line.text)
        if line.at < self.since or (self.wanted and not self.wanted.search(text)):
            return
        if not self.as_json and self.coloured:
            text = cleaned(line.text, colour=True)
        out = as_json(line, text) if self.as_json else self._as_text(line, text)
        self._buffer.append(out)
        self._size += len(out)
        if self._size >= BUFFERED:
            self.flush()

    def _as_text(self, line: Line, text: str) -> str:
        is_error = line.origin.stream == "err"
        label, mark = self._labels[line.origin], "!" if is_error else "|"
        if self.coloured:
            colour = KIND_COLOURS[line.origin.kind]
            label, mark = f"{colour}{label}", f"{RED if is_error else ''}{mark}{RESET}"
        return f"{label} {mark} {text}\n" if text else f"{label} {mark}\n"

    def flush(self) -> None:
        """Write what was printed; ``ReaderGone`` where nobody reads it any more."""
        text, self._buffer, self._size = "".join(self._buffer), [], 0
        try:
            sys.stdout.buffer.write(text.encode("utf-8", "replace"))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            give_up(sys.stdout)
            raise ReaderGone from None
        except OSError as problem:
            give_up(sys.stdout)
            raise EnvironmentProblem(f"cannot write to stdout: {problem.strerror}") from None

    def is_unread(self) -> bool:
        """Whether stdout is a pipe whose reader has left, which a write would tell: there may be none for hours."""
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _descriptor, event in poll.poll(0))


def labels(attempts: int, origins: Sequence[Origin]) -> dict[Origin, str]:
    """A name for the job of each log, all of one width: its kind, a worker's number; the attempt, or the id."""
    counted = max([attempts, *(origin.attempt for origin in origins)])

    def name(origin: Origin) -> str:
        attempt = f" {origin.attempt}" if counted > 1 else ""
        if origin.kind == "worker":
            return f"worker-{origin.task}{attempt}"
        same = {o.job_id for o in origins if (o.kind, o.attempt) == (origin.kind, origin.attempt)}
        return f"{origin.kind}{attempt}" + (f" ({origin.job_id})" if len(same) > 1 else "")

    named = {origin: name(origin) for origin in origins}
    width = max(map(len, named.values()), default=0)
    return {origin: text.ljust(width) for origin, text in named.items()}


def as_json(line: Line, text: str) -> str:
    """A line for scripts."""
    at = datetime.fromtimestamp(line.at, timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps(line_dict(line.origin, at, text, line.is_own)) + "\n"


def line_dict(origin: Origin, at: str, text: str, is_own: bool) -> dict[str, object]:
    """The fields of a line; ``estimated`` where it does not say itself when it was written."""
    return {
        "schema": SCHEMA,
        "at": at,
        "estimated": not is_own,
        "kind": origin.kind,
        "job": origin.job_id,
        "attempt": origin.attempt,
        "stream": origin.stream,
        "text": text,
    }
