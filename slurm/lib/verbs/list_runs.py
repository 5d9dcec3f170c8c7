"""``launch.py list``: the runs below SKYRL_JOBS_BASE, a line each, the newest first."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from slurm.lib.command_line import Parser, say
from slurm.lib.coordination import jobs_base
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK
from slurm.lib.logs import log
from slurm.lib.observe.run_view import RunView
from slurm.lib.observe.survey import Survey
from slurm.lib.reports.run_words import PAINT, SCHEMA, attempt_words, clock, exit_code, lead_of, phase_words, run_dict
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.named import runs_below, warn_of_silence
from slurm.lib.verbs.table import Column, lines_of, printed, terminal_width

NEWEST = 20
COLUMNS = (
    Column("RUN", least=19),
    Column("STATE"),
    Column("EXIT", loss=3),
    Column("PHASE", least=12, loss=2),
    Column("ELAPSED", loss=4),
    Column("ATTEMPT", loss=5),
    Column("JOBS", loss=6),
    Column("CONFIG", least=6, loss=7),
)
EPILOG = """\
exit codes: 0 also where there is no run; 2 the command line is wrong; 71 SKYRL_JOBS_BASE cannot be read.
Where Slurm does not answer, the runs are shown all the same, and a warning says so.
"""


def build_parser() -> Parser:
    parser = Parser(prog="launch.py list", description="List your runs below SKYRL_JOBS_BASE.", epilog=EPILOG)
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"all runs, also other users'; else yours: the newest {NEWEST}, and all that live",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    base = jobs_base(os.environ)
    survey, everything = Survey(Slurm(), notes), bool(arguments.all)
    runs = runs_below(base, others=everything)
    views = survey.look(runs, select=lambda found: found if everything else newest(found), servers=False)
    warn_of_silence(survey)
    if len(views) < len(runs):
        log.info("%d older runs are not shown: launch.py list --all", len(runs) - len(views))
    text = as_json(base, views, survey.heard) if arguments.json else as_text(base, views)
    return EXIT_OK if say(text) else EXIT_ENVIRONMENT


def newest(views: list[RunView]) -> list[RunView]:
    """The newest runs, and those that live, however old."""
    return [view for at, view in enumerate(views) if at < NEWEST or (view.lives and not view.state.is_over)]


def row(view: RunView) -> list[str]:
    """The cells of a run."""
    lead, code = lead_of(view), exit_code(view)
    jobs = ",".join(job.job_id for job in reversed(view.pair.jobs)) if view.pair else ""
    problem = "; ".join(view.record.problems)
    return [
        view.record.name,
        view.state.value,
        "" if code is None else str(code),
        problem or phase_words(view),
        clock(lead.elapsed_s) if lead else "",
        attempt_words(view),
        jobs,
        view.record.config,
    ]


def as_text(base: Path, views: Sequence[RunView]) -> str:
    """A table, or the sentence that there is nothing."""
    if not views:
        return f"no runs below SKYRL_JOBS_BASE={base}\n"
    return printed(lines_of(COLUMNS, [row(view) for view in views], terminal_width()), PAINT)


def as_json(base: Path, views: Sequence[RunView], heard: bool) -> str:
    """The same for scripts."""
    told = {"schema": SCHEMA, "base": str(base), "slurm_answers": heard, "runs": [run_dict(view) for view in views]}
    return json.dumps(told, indent=2) + "\n"
