"""``launch.py status``: how each run is: its jobs, how far it is, its sandboxes, its last error, its end.

With ``--watch`` it looks again and again: it redraws a terminal, and elsewhere prints a line for each change.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slurm.lib.command_line import Parser, say
from slurm.lib.coordination import jobs_base
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK
from slurm.lib.observe.run_view import JobView, PairView, RunView, Stage
from slurm.lib.observe.survey import Survey
from slurm.lib.runs import FoundRun
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.list_runs import runs_below, warn_of_silence
from slurm.lib.verbs.named import HELP, named
from slurm.lib.verbs.run_words import (
    SCHEMA,
    attempt_words,
    job_words,
    lead_of,
    phase_words,
    run_dict,
    sandbox_words,
)
from slurm.lib.verbs.table import shortened, terminal_width

EVERY_S, LEAST_S = 10.0, 5.0  # between two looks; each costs Slurm one squeue
CLEAR = "\x1b[H\x1b[2J"
LABEL = 10
EPILOG = """\
exit codes: 0 the runs are shown, however they are (wait tells by its code); 2 a name means no run; 71 SKYRL_JOBS_BASE
cannot be read. --watch ends with 0 once all runs shown have ended, with 130 by Ctrl-C. Where Slurm does not answer,
what the runs' own files say is shown.
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="launch.py status",
        description="Show how runs are. Without RUN: all of yours that live below SKYRL_JOBS_BASE, else the latest.",
        epilog=EPILOG,
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", help=HELP)
    parser.add_argument("--watch", action="store_true", help="look again and again, until all have ended")
    every = f"seconds between two looks of --watch (at least {LEAST_S:g}; default: {EVERY_S:g})"
    parser.add_argument("--every", metavar="S", type=_interval, default=EVERY_S, help=every)
    parser.add_argument("--json", action="store_true", help="as one JSON object; with --watch a line for each change")
    return parser


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not LEAST_S <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from {LEAST_S:g} to 86400")
    return seconds


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    survey = Survey(Slurm())
    runs = named(arguments.runs, survey.slurm) if arguments.runs else runs_below(jobs_base(os.environ))
    views = survey.look(runs, select=(lambda found: found) if arguments.runs else living_or_latest)
    if arguments.watch and views:
        runs = [run for run in runs if any(is_of(view, run) for view in views)]
        return Watch(survey, runs, arguments.every, arguments.json, notes).go_on(views)
    warn_of_silence(survey)
    text = as_json(views, survey.heard) if arguments.json else as_text(views)
    return EXIT_OK if say(text) else EXIT_ENVIRONMENT


def living_or_latest(views: list[RunView]) -> list[RunView]:
    """The runs that live, else the newest that has jobs."""
    living = [view for view in views if view.lives and not view.state.is_over]
    return living or [view for view in views if view.pair][:1]


def is_of(view: RunView, run: FoundRun) -> bool:
    """Whether the view is one of this run."""
    return view.record.directory == run.directory if run.directory else view.record.name == run.name


# --- again and again --------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Looks at runs until all of them have ended; Ctrl-C raises ``Interrupted``."""

    survey: Survey
    runs: Sequence[FoundRun]
    every_s: float
    as_json: bool
    notes: SignalNotes
    _told: dict[str, object] = field(default_factory=dict)

    def go_on(self, views: Sequence[RunView]) -> int:
        """Show the runs, and again; returns the exit code."""
        show = self._redraw if sys.stdout.isatty() and not self.as_json else self._changes
        while True:
            if not say(show(views)):
                return EXIT_ENVIRONMENT
            if all(view.state.is_over or view.pair is None for view in views):
                return EXIT_OK
            self.notes.sleep(self.every_s)
            self.notes.check()
            views = self.survey.look(self.runs)
            self.notes.check()

    def _redraw(self, views: Sequence[RunView]) -> str:
        silent = "" if self.survey.heard else "; Slurm does not answer"
        title = f"every {self.every_s:g} s, now {time.strftime('%H:%M:%S')}{silent}; Ctrl-C ends this, not the runs\n\n"
        return CLEAR + title + as_text(views)

    def _changes(self, views: Sequence[RunView]) -> str:
        """A line for each run of which something has changed."""
        line: Callable[[RunView], str] = _json_line if self.as_json else _line
        changed = [view for view in views if self._told.get(view.record.name) != told(view)]
        self._told |= {view.record.name: told(view) for view in changed}
        return "".join(line(view) for view in changed)


def told(view: RunView) -> object:
    """What of a run is worth a line once it is another."""
    jobs = [(job.job_id, job.stage, job.word, job.reason) for job in view.pair.jobs] if view.pair else []
    return view.state, view.phase, jobs


def _line(view: RunView) -> str:
    lead = lead_of(view)
    jobs = f" ({job_words(lead, time.time())})" if lead else ""
    words = ", ".join(filter(None, (attempt_words(view), phase_words(view))))
    return f"{time.strftime('%H:%M:%S')} {view.record.name} {view.state.value}{': ' if words else ''}{words}{jobs}\n"


def _json_line(view: RunView) -> str:
    return json.dumps({"schema": SCHEMA, **run_dict(view)}) + "\n"


# --- how it is shown --------------------------------------------------------------------------------------------------


def as_text(views: Sequence[RunView]) -> str:
    """A block for each run; on a terminal its lines are cut to the width."""
    if not views:
        return f"no runs below SKYRL_JOBS_BASE={jobs_base(os.environ)}\n"
    width, now = terminal_width(), time.time()
    blocks = [[*_heading(view), *_body(view, now)] for view in views]
    return "\n".join("".join(f"{_fitting(line, width)}\n" for line in block) for block in blocks)


def _fitting(line: str, width: int | None) -> str:
    return line if width is None else shortened(line, width)


def _heading(view: RunView) -> list[str]:
    attempt = attempt_words(view)
    words = [view.record.name, view.state.value, f"attempt {attempt}" if attempt else "", view.record.config]
    return ["  ".join(filter(None, words))]


def _body(view: RunView, now: float) -> list[str]:
    lines = [] if view.state.is_over and not phase_words(view) else [("phase", phase_words(view))]
    for job in view.pair.jobs if view.pair else ():
        lines.append((job.kind, f"job {job.job_id}: {job_words(job, now)}"))
    lines += [("next", _next(view.following, now))] if view.following else []
    lines += [("sandboxes", sandbox_words(view.sandboxes))] if view.sandboxes else []
    lines += [(f"{job.kind} says", job.error) for job in _troubled(view)]
    lines += [("not known", problem) for problem in view.record.problems]
    lines += [("directory", str(view.record.directory.path))] if view.record.directory else []
    return [f"  {label:<{LABEL}} {words}" for label, words in lines]


def _next(pair: PairView, now: float) -> str:
    ids = ", ".join(job.job_id for job in pair.jobs)
    return f"attempt {pair.attempt}, jobs {ids}: {job_words(pair.lead, now)}"


def _troubled(view: RunView) -> list[JobView]:
    """The jobs whose last error is worth a line: not that of a run that went well, nor what its end says already."""
    jobs = view.pair.jobs if view.pair else ()
    well = view.pair is not None and view.pair.lead.exit_code == 0 and view.pair.lead.stage is Stage.ENDED
    return [job for job in jobs if job.error and not well and not (job.end_reason and job.end_reason in job.error)]


def as_json(views: Sequence[RunView], heard: bool) -> str:
    """The same for scripts."""
    told_of = {"schema": SCHEMA, "slurm_answers": heard, "runs": [run_dict(view) for view in views]}
    return json.dumps(told_of, indent=2) + "\n"
