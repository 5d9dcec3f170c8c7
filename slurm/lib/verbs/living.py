"""Which runs of this user live? Below SKYRL_JOBS_BASE by their records, all others by Slurm's word.

A job of a run below another jobs base, or of one that has not begun, has a name of ours. One that was given another
name is found by the records alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.coordination import host_name
from slurm.lib.errors import UsageError, WaitTimeout
from slurm.lib.job_arrays import arrays_of, is_slurms
from slurm.lib.logs import log
from slurm.lib.observe.run_view import RunView
from slurm.lib.observe.survey import Survey
from slurm.lib.runs import KINDS, FoundRun, find, stranger
from slurm.lib.scheduler import Slurm
from slurm.lib.verbs.named import FIND_S, runs_below

SILENT = "Slurm does not answer, so which runs live is not known; name them, or try again later"


@dataclass(frozen=True)
class Living:
    """The runs that live, and the names of local runs of other hosts, of which that is not known here."""

    runs: tuple[FoundRun, ...]
    elsewhere: tuple[str, ...] = ()


def living_runs(base: Path, survey: Survey) -> Living:
    """All runs of this user that live; ``WaitTimeout`` while Slurm is silent.

    On a host without Slurm's commands the local ones.
    """
    below, has_slurm = runs_below(base), survey.slurm.is_here
    views = survey.look(below, servers=False, logs=False)
    queued = survey.slurm.own_named(list(KINDS)) if has_slurm else []
    if queued is None or (not survey.heard and has_slurm):
        raise WaitTimeout(SILENT)
    if not has_slurm:
        log.info("this host has no Slurm commands (squeue), so only local runs are meant")
    until = time.monotonic() + FIND_S
    elsewhere = [view.record.name for view in views if _is_elsewhere(view) and view.unended]
    found = [run for run, view in zip(below, views, strict=True) if _lives(view, survey.slurm, until)]
    known = set(arrays_of(job.job_id for run in found for job in run.jobs()))
    others = _found([job_id for job_id in queued if job_id not in known], base, survey.slurm, until)
    return Living(tuple({run.directory or run.alone: run for run in [*found, *others]}.values()), tuple(elsewhere))


def _is_elsewhere(view: RunView) -> bool:
    return view.record.backend == "local" and view.record.host not in {"", host_name()}


def _lives(view: RunView, slurm: Slurm, until: float) -> bool:
    """Whether a job of it lives that is its own: a number of an old record may be another run's by now."""
    directory = view.record.directory
    if directory is None:
        return False
    if any(job.lives and not is_slurms(job.job_id) for job in view.unended):
        return True
    queued = arrays_of(job.job_id for job in view.unended if is_slurms(job.job_id) and slurm.is_here)
    return any(not stranger(job_id, directory, slurm, _left_s(until)) for job_id in queued)


def _found(job_ids: Iterable[str], base: Path, slurm: Slurm, until: float) -> list[FoundRun]:
    """The runs of jobs that no run below the jobs base tells of."""
    found: list[FoundRun] = []
    for job_id in job_ids:
        if job_id in arrays_of(job.job_id for run in found for job in run.jobs()):
            continue
        try:
            found.append(find(job_id, base, slurm, _left_s(until)))
        except UsageError:  # it has ended since, or Slurm is silent now
            if slurm.shown(job_id, _left_s(until)) is None:
                raise WaitTimeout(SILENT) from None
    return found


def _left_s(until: float) -> float:
    return max(0.2, until - time.monotonic())
