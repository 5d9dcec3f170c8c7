"""Which runs does a command line name? Each once; all names that mean none are reported together."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from slurm.lib.coordination import jobs_base
from slurm.lib.errors import UsageError
from slurm.lib.runs import FoundRun, find
from slurm.lib.scheduler import Slurm

FIND_S = 10.0  # for all questions to Slurm about which runs are meant
HELP = "a run's directory, the beginning of its name, the id of any of its jobs, or latest"


def named(names: Sequence[str], slurm: Slurm) -> list[FoundRun]:
    """The runs in the order of their names; ``UsageError`` for names that mean none."""
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
