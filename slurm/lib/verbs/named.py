"""Which runs does a command line mean: those that it names, or all below SKYRL_JOBS_BASE?"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slurm.lib.coordination import CoordinationDir, jobs_base
from slurm.lib.errors import EnvironmentProblem, UsageError
from slurm.lib.logs import log
from slurm.lib.runs import FoundRun, find, is_own, run_folders
from slurm.lib.scheduler import Slurm

if TYPE_CHECKING:  # cancel needs no survey of runs that are named: Python's start is a part of its 15 s
    from slurm.lib.observe.survey import Survey

FIND_S = 10.0  # for all questions to Slurm about which runs are meant
HELP = "a run's directory, the beginning of its name, the id of any of its jobs, or latest"


def named(
    names: Sequence[str],
    slurm: Slurm,
    until: float | None = None,
    *,
    refuse: Callable[[FoundRun], None] = lambda _: None,
    otherwise: str = "",
) -> list[FoundRun]:
    """The runs in the order of their names, each once; one ``UsageError`` for all names that mean none.

    Slurm is asked ``until`` then, by the monotonic clock. ``refuse`` raises ``UsageError`` for a run that cannot be
    meant; ``otherwise`` ends the message where other names mean runs: what has not been done with those.
    """
    until = time.monotonic() + FIND_S if until is None else until
    found: dict[object, FoundRun] = {}
    problems = []
    for name in names:
        try:
            run = find(name, jobs_base(os.environ), slurm, max(0.2, until - time.monotonic()))
            refuse(run)
        except UsageError as problem:
            problems.append(str(problem))
            continue
        found.setdefault(run.directory or run.alone, run)
    if problems:
        raise UsageError("\n".join([*problems, *([otherwise] if found and otherwise else [])]))
    return list(found.values())


def worker_name(text: str) -> str:
    """A worker as a command line names it; for argparse."""
    if not re.fullmatch(r"\d{1,7}|\d{1,12}_\d{1,7}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no worker's number, such as 1, and no id, such as 124_1")
    return text


def is_worker(job_id: str, name: str) -> bool:
    """Whether a worker is meant by its number, or its id."""
    return name in {job_id, job_id.rpartition("_")[2]}


def runs_below(base: Path, *, others: bool = False) -> list[FoundRun]:
    """The runs of this user below a jobs base, the newest first; with ``others`` all users'."""
    try:
        there = base.is_dir() and os.listdir(base)  # noqa: PTH208  whether it can be
    except OSError as problem:
        raise EnvironmentProblem(f"SKYRL_JOBS_BASE={base} cannot be read: {problem.strerror}") from None
    folders = run_folders(base) if there else []
    return [
        FoundRun(path.name, CoordinationDir(path)) for path in folders if others or (path.is_dir() and is_own(path))
    ]


def warn_of_silence(survey: Survey) -> None:
    """Say that Slurm was not heard, where it was asked."""
    if not survey.heard and survey.slurm.is_here:
        log.warning("Slurm does not answer: what is shown is what the runs' own files say")
