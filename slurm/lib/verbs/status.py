"""``launch.py status``: how each run is: its jobs, how far it is, its sandboxes, its last error, its end.

With ``--watch`` it looks again and again: it redraws a terminal, and elsewhere prints a line for each change.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from slurm.lib.command_line import Parser, say
from slurm.lib.coordination import jobs_base
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, UsageError
from slurm.lib.observe.survey import Survey
from slurm.lib.runs import FoundRun
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.named import HELP, named, runs_below, warn_of_silence

if TYPE_CHECKING:
    from slurm.lib.observe.run_view import RunView

EVERY_S, LEAST_S = 10.0, 5.0  # between two looks; each costs Slurm one squeue
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
    gpu = "how busy the GPUs are, by nvidia-smi as a step in each training job that runs; not with --watch"
    parser.add_argument("--gpu", action="store_true", help=gpu)
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
    if arguments.gpu and arguments.watch:
        raise UsageError("--gpu does not go with --watch: each look would be a step in every training job")
    survey = Survey(Slurm(), notes)
    runs = named(arguments.runs, survey.slurm) if arguments.runs else runs_below(jobs_base(os.environ))
    chosen = (lambda found: found) if arguments.runs else living_or_latest
    views = survey.look(runs, select=chosen, meanwhile=import_words)
    if arguments.watch and views:
        runs = [run for run in runs if any(is_of(view, run) for view in views)]
        from slurm.lib.verbs.status_watch import Watch

        return Watch(survey, runs, arguments.every, arguments.json, notes).go_on(views)
    warn_of_silence(survey)
    views = with_gpus(views, survey.slurm) if arguments.gpu else views
    from slurm.lib.verbs import status_text

    text = status_text.as_json(views, survey.heard) if arguments.json else status_text.as_text(views)
    return EXIT_OK if say(text) else EXIT_ENVIRONMENT


def import_words() -> None:
    """Import what shows runs, while Slurm is asked: both take some ten milliseconds."""
    from slurm.lib.verbs import status_text  # noqa: F401


def living_or_latest(views: list[RunView]) -> list[RunView]:
    """The runs that live, else the newest that has jobs."""
    living = [view for view in views if view.lives and not view.state.is_over]
    return living or [view for view in views if view.pair][:1]


def with_gpus(views: Sequence[RunView], slurm: Slurm) -> list[RunView]:
    """The runs with what their GPUs do, one run after the other."""
    from slurm.lib.observe import gpus

    def shown(view: RunView) -> RunView:
        training = view.pair.job("training") if view.pair else None
        is_het = view.record.pairing == "het"
        return replace(view, gpus=gpus.ask(slurm, training, is_het=is_het)) if training else view

    return [shown(view) for view in views]


def is_of(view: RunView, run: FoundRun) -> bool:
    """Whether the view is one of this run."""
    return view.record.directory == run.directory if run.directory else view.record.name == run.name
