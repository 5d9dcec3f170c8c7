"""``launch.py wait``: block until a run has ended, through all its attempts, and end with its trainer's exit code.

The run's own files are looked at every second. Slurm is asked when they have changed, and else less and less often; its
silence is no end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slurm.lib.command_line import Parser, say
from slurm.lib.coordination import Presence, jobs_base
from slurm.lib.errors import EXIT_UNAVAILABLE, EnvironmentProblem, UsageError, WaitTimeout
from slurm.lib.logs import log
from slurm.lib.observe.record import RunRecord
from slurm.lib.observe.run_view import RunState, RunView
from slurm.lib.observe.survey import Survey, record_of
from slurm.lib.reports.run_words import SCHEMA, lead_of, phase_words, run_dict
from slurm.lib.runs import FoundRun, find
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.named import FIND_S, HELP, named

LOOK_EVERY_S = 1.0  # at the run's files
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0  # between two questions to Slurm while nothing changes
CERTAIN_S = 10.0  # a controller that was just started may not know a job yet
EPILOG = """\
exit codes: that of the run's trainer, of its last attempt (of a runtime that was launched alone, its own), whatever it
is; 2 there is no such run; 69 the run has ended, and no exit code is known of it (the message says what is); 71 its
directory is gone; 75 it has not ended after --timeout seconds; 128+N stopped by signal N: the run goes on.
"""


def build_parser() -> Parser:
    parser = Parser(prog="launch.py wait", description="Wait until a run has ended.", epilog=EPILOG)
    parser.add_argument("run", metavar="RUN", help=HELP)
    deadline = "give up after so many seconds (default: never)"
    parser.add_argument("--timeout", metavar="S", type=_seconds, default=math.inf, help=deadline)
    parser.add_argument("--json", action="store_true", help="how it ended as one JSON object")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    survey = Survey(Slurm(), notes)
    (run,) = named([arguments.run], survey.slurm)
    view = Wait(survey, run, notes, arguments.timeout).until_over()
    say(json.dumps({"schema": SCHEMA, **run_dict(view)}, indent=2) + "\n" if arguments.json else sentence(view))
    return end_with(view, survey.slurm)


@dataclass
class Wait:
    """Waits for a run's end; ``WaitTimeout`` after ``timeout_s`` seconds, ``Interrupted`` by a signal.

    ``meanwhile`` is done every second, with the run as it was found last.
    """

    survey: Survey
    run: FoundRun
    notes: SignalNotes
    timeout_s: float = math.inf
    meanwhile: Callable[[FoundRun], object] = lambda run: None
    begin: float = field(default_factory=time.monotonic)
    _told: tuple[RunState, bool] | None = None
    _over_since: float | None = None
    _presence: Presence | None = None

    def until_over(self) -> RunView:
        """The run, once it has ended."""
        pause = FIRST_PAUSE_S
        while True:
            view = self._look()
            if self._is_certain(view):
                return view
            changed = self._await_change(view.record, min(pause, CERTAIN_S) if self._over_since else pause)
            pause = FIRST_PAUSE_S if changed else min(LONGEST_PAUSE_S, pause * 1.5)

    def _look(self) -> RunView:
        if self.run.directory is None:  # perhaps it has begun by now
            self.run = _again(self.run, self.survey.slurm)
        (view,) = self.survey.look([self.run], servers=False)
        self._tell(view)
        return view

    def _tell(self, view: RunView) -> None:
        """Log what is new about the run's state, and about Slurm."""
        state, heard = self._told or (None, True)
        if heard and not self.survey.heard:
            log.warning("Slurm does not answer; waiting for it, and for the run's own files")
        if not heard and self.survey.heard:
            log.info("Slurm answers again")
        if state is not view.state:
            log.info("%s: %s%s", view.record.name, view.state.value, _more(view))
        self._told = (view.state, self.survey.heard)

    def _is_certain(self, view: RunView) -> bool:
        """Whether it is over: with an exit code or by Slurm's word at once, for want of any only after a while."""
        lead = lead_of(view)
        if not view.state.is_over or lead is None or view.lives:
            self._over_since = None
            return False
        is_told = lead.word and view.state is not RunState.CANCELLED  # else launch.py cancel is about to write the code
        if lead.exit_code is not None or is_told:
            return True
        self._over_since = self._over_since or time.monotonic()
        return time.monotonic() - self._over_since >= CERTAIN_S

    def _await_change(self, before: RunRecord, seconds: float) -> bool:
        """Whether the run's files have changed within so many seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.meanwhile(self.run)
            self._refuse_lost(before)
            rest = self.begin + self.timeout_s - time.monotonic()
            if rest <= 0:
                raise WaitTimeout(self._late(before))
            self.notes.sleep(min(left, rest, LOOK_EVERY_S))
            self.notes.check()
            if before.directory and (now := record_of(self.run)) != before and now.pairs:
                return True
        return False

    def _refuse_lost(self, record: RunRecord) -> None:
        if record.directory is None:
            return
        self._presence = self._presence or Presence(record.directory.path)
        if self._presence.is_lost():
            raise EnvironmentProblem(f"{self._presence.path} is gone, or cannot be read any more: its end is not seen")

    def _late(self, record: RunRecord) -> str:
        state = self._told[0].value if self._told else "unknown"
        return f"{record.name} has not ended within {self.timeout_s:g} s: it is {state}; launch.py status shows more"


def _again(run: FoundRun, slurm: Slurm) -> FoundRun:
    try:
        return find(run.name, jobs_base(os.environ), slurm, FIND_S)
    except UsageError:  # Slurm has forgotten the job, or is silent
        return run


def _more(view: RunView) -> str:
    words = phase_words(view)
    return f", {words}" if words else ""


def end_with(view: RunView, slurm: Slurm) -> int:
    """The exit code of a command that has waited for the run's end; one that nobody knows is said to be so."""
    code = code_of(view, slurm)
    if code is None:
        log.error("no exit code is known of %s: %s", view.record.name, _reason(view))
    return EXIT_UNAVAILABLE if code is None else code


def code_of(view: RunView, slurm: Slurm) -> int | None:
    """The exit code of a run that is over: its own word, else Slurm's; None where nobody knows one."""
    lead = lead_of(view)
    if lead is None or lead.exit_code is not None or not lead.job_id.isdigit():
        return lead.exit_code if lead else None
    return slurm.exit_code(lead.job_id) or None  # a job that was cancelled has ended with 0, says Slurm


def sentence(view: RunView) -> str:
    """How it ended, in a line."""
    return f"{view.record.name} {view.state.value}: {_reason(view)}\n"


def _reason(view: RunView) -> str:
    lead = lead_of(view)
    return (lead.end_reason if lead else "") or "nobody has said why"
