"""Which runs does a command line mean: those that it names, or all below SKYRL_JOBS_BASE?"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from slurm.lib.coordination import CoordinationDir, jobs_base
from slurm.lib.errors import EnvironmentProblem, UsageError
from slurm.lib.logs import log
from slurm.lib.observe.survey import Survey
from slurm.lib.runs import FoundRun, find, run_folders
from slurm.lib.scheduler import Slurm

FIND_S = 10.0  # for all questions to Slurm about which runs are meant
HELP = "a run's directory, the beginning of its name, the id of any of its jobs, or latest"


def named(names: Sequence[str], slurm: Slurm) -> list[FoundRun]:
    """The runs in the order of their names, each once; one ``UsageError`` for all names that mean none."""
    until = time.monotonic() + FIND_S
    found: dict[object, FoundRun] = {}
    problems = []
    for name in names:
        try:
            run = find(name, jobs_base(os.environ), slurm, max(0.2, until - time.monotonic()))
        except UsageError as problem:
            problems.append(str(problem))
            continue
        found.setdefault(run.directory or run.alone, run)
    if problems:
        raise UsageError("\n".join(problems))
    return list(found.values())


def runs_below(base: Path, *, others: bool = False) -> list[FoundRun]:
    """The runs of this user below a jobs base, the newest first; with ``others`` all users'."""
    try:
        there = base.is_dir() and os.listdir(base)  # noqa: PTH208  whether it can be
    except OSError as problem:
        raise EnvironmentProblem(f"SKYRL_JOBS_BASE={base} cannot be read: {problem.strerror}") from None
    folders = run_folders(base) if there else []
    return [FoundRun(path.name, CoordinationDir(path)) for path in folders if others or _is_own(path)]


def _is_own(path: Path) -> bool:
    try:
        return path.is_dir() and path.stat().st_uid == os.getuid()
    except OSError:
        return False


def warn_of_silence(survey: Survey) -> None:
    """Say that Slurm was not heard, where it was asked."""
    if not survey.heard and survey.slurm.is_here:
        log.warning("Slurm does not answer: what is shown is what the runs' own files say")
