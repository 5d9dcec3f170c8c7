"""``launch.py report``: what there is to learn from a run, as text, as JSON, or as a page with plots."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm.lib.command_line import Parser, say
from slurm.lib.coordination import write_atomically
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, EnvironmentProblem, UsageError
from slurm.lib.logs import log
from slurm.lib.observe.run_report import RunReport, read_report
from slurm.lib.observe.survey import Survey
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import SignalNotes
from slurm.lib.verbs.named import HELP, named, warn_of_silence
from slurm.lib.verbs.table import terminal_width

STDOUT = "-"
EPILOG = """\
exit codes: 0 the report is made, however the run is; 2 RUN means no run, or FILE is there and no report of ours; 71
FILE cannot be written, or matplotlib is missing, which --html alone needs; 128+N ended by signal N. What is not known
of a run is said to be unknown. Where Slurm does not answer, the run's own files tell.
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="launch.py report",
        description="Report on a run: queue, start-up, steps, sandboxes, use of CPUs, memory and GPUs, how it ended.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help=HELP)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    page = "a page with plots to this file, or to stdout for -; what is printed then is the file's path"
    parser.add_argument("--html", metavar="FILE", help=page)
    parser.add_argument("--force", action="store_true", help="replace FILE even if it is no report of ours")
    return parser


def main(argv: Sequence[str], notes: SignalNotes) -> int:
    """The verb; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.json and arguments.html == STDOUT:
        raise UsageError("--json does not go with --html -: both would be on stdout; give --html a file")
    if arguments.force and arguments.html in {None, STDOUT}:
        raise UsageError("--force goes with --html FILE")
    if arguments.html == "":
        raise UsageError("--html needs the name of a file, or - for stdout")
    if arguments.html and arguments.html != STDOUT:
        check_target(Path(arguments.html), arguments.force)
    report = look(arguments.run, notes)
    page = page_of(report) if arguments.html else ""
    if page and arguments.html != STDOUT:
        write_page(Path(arguments.html), page)
    return EXIT_OK if say(_shown(report, arguments, page)) else EXIT_ENVIRONMENT


def look(name: str, notes: SignalNotes) -> RunReport:
    """The report of the run that is meant."""
    survey = Survey(Slurm(), notes)
    (view,) = survey.look(named([name], survey.slurm), servers=False)
    warn_of_silence(survey)
    return read_report(view, survey.slurm, notes, heard=survey.heard)


def _shown(report: RunReport, arguments: argparse.Namespace, page: str) -> str:
    """What goes to stdout."""
    if arguments.json:
        from slurm.lib.verbs.report_json import report_dict

        return json.dumps(report_dict(report), indent=2, allow_nan=False) + "\n"
    if arguments.html:
        return page if arguments.html == STDOUT else f"{arguments.html}\n"
    from slurm.lib.verbs.report_text import as_text

    return as_text(report, terminal_width())


# --- the page ---------------------------------------------------------------------------------------------------------


def page_of(report: RunReport) -> str:
    """The page; ``EnvironmentProblem`` where matplotlib is missing."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it can keep no cache, which is no matter
    try:
        from slurm.lib.reports.page import page
    except ImportError as problem:
        if (problem.name or "").startswith("slurm"):
            raise
        raise EnvironmentProblem(
            f"the page needs matplotlib, which this Python cannot import ({problem}); install it with:  "
            f"'{sys.executable}' -m pip install 'matplotlib>=3.7'  (the text and --json need nothing)"
        ) from None
    return page(report)


def check_target(path: Path, force: bool) -> None:
    """``UsageError`` for a file that is there and that somebody may miss; a report of ours is made anew."""
    from slurm.lib.reports import MARK

    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(2048)
    except OSError as problem:
        raise EnvironmentProblem(f"--html {path}: {problem.strerror}; choose another file") from None
    if head and MARK.encode() not in head and not force:
        raise UsageError(f"--html {path}: the file is there and is no report of ours; choose another, or add --force")


def write_page(path: Path, page: str) -> None:
    """Replace the file as a whole; what is no file, such as a pipe, is written to.

    ``EnvironmentProblem`` says why that is not possible.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            path.write_text(page, encoding="utf-8")
        else:
            write_atomically(path, page, 0o666 & ~_umask())
    except OSError as problem:
        raise EnvironmentProblem(f"--html {path}: cannot be written: {problem.strerror}; choose another file") from None
    log.info("wrote %s (%d kB)", path, max(1, len(page.encode()) // 1000))


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
