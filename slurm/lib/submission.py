"""Carries out a plan on Slurm, all or nothing.

The runtime job is submitted held, the training job depends on it (with PAIRING=het both are one job, held); only when
the run's directory is complete does one ``scontrol release`` let them start. Until then a failure cancels what was
submitted, and a launcher that is killed leaves nothing that can start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from slurm.lib.coordination import CoordinationDir, Flag, make_run_dir, remove_run_dir
from slurm.lib.errors import EnvironmentProblem, SubmissionError, SuiteError
from slurm.lib.logs import log
from slurm.lib.plan import JobPlan, LaunchPlan
from slurm.lib.run_record import GitState, furnish, write_record
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.trainer import KEY_NAME


@dataclass(frozen=True)
class Submitted:
    """The run that has been released: its directory and the ids of its jobs by kind, the one submitted first first."""

    directory: CoordinationDir
    jobs: dict[str, str]


@dataclass
class _Undo:
    """What has to be taken back if the commit is not reached; the training job first, which waits for the other."""

    slurm: Slurm
    job_ids: list[str]
    made: Path | None = None
    added: list[Path] = field(default_factory=list)
    failed: bool = False

    def __call__(self) -> str:
        complaint = self.slurm.cancel(list(reversed(self.job_ids)))
        if self.made is not None:
            remove_run_dir(self.made)
        for path in self.added:
            path.unlink(missing_ok=True)
        if complaint:
            self.failed = True
            return f"could not cancel {' '.join(self.job_ids)} ({complaint}): cancel by hand with scancel"
        return f"cancelled {' '.join(self.job_ids)}" if self.job_ids else "nothing was queued"


@contextlib.contextmanager
def _taken_back_on_failure(slurm: Slurm) -> Iterator[_Undo]:
    undo = _Undo(slurm, [])
    try:
        yield undo
    except SuiteError as problem:
        message = f"{problem}; {undo()}"
        leaves = undo.failed or (isinstance(problem, SubmissionError) and problem.leaves_jobs)
        raise SubmissionError(message, leaves_jobs=leaves) from None
    except Interrupted:
        log.warning("taking the submission back: %s", undo())
        raise
    except BaseException:
        undo()
        raise


def submit(
    plan: LaunchPlan,
    notes: SignalNotes,
    git: Callable[[], GitState],
    checkout: Path,
    release: Callable[[Slurm, str], None] = Slurm.release,
) -> Submitted:
    """Submit the plan's jobs and ``release`` the first.

    ``SubmissionError`` says why not, and names what could not be taken back.
    """
    jobs: dict[str, str] = {}
    slurm = Slurm({**plan.inherited, **plan.environment})  # a .conf may set PATH or SLURM_CONF
    joining = plan.request.attach_dir is not None
    with _taken_back_on_failure(slurm) as undo:
        for job in plan.submissions:
            notes.check()
            planned = job.with_runtime_id(jobs.get("runtime", ""))
            jobs[job.kind] = _slurm_for(plan, planned).submit(planned.argv)
            undo.job_ids.append(jobs[job.kind])
        if plan.combined:
            jobs["runtime"] = _runtime_component(slurm, jobs["training"])
        directory = _directory(plan, jobs, undo)
        added = furnish(directory, plan, jobs, checkout)
        undo.added += added if joining else []
        _publish_foreign_runtime(directory, plan)
        late = joining and plan.request.requeue is None
        if not late:
            undo.added.append(write_record(directory, plan, jobs, git()))
        notes.check()
        release(slurm, next(iter(jobs.values())))
    if late:  # only now: the runtime job takes a recorded job that is cancelled for a training that has failed
        _record_late(directory, plan, jobs, git)
    return Submitted(directory, jobs)


def _runtime_component(slurm: Slurm, job_id: str) -> str:
    """The id of the runtime in the heterogeneous job ``job_id``, which ends with it: there is nothing to undo."""
    components = slurm.components(job_id)
    if len(components) != 2:
        raise SubmissionError(f"job {job_id} has {len(components)} components in Slurm, not 2")
    return components[1]


def _slurm_for(plan: LaunchPlan, job: JobPlan) -> Slurm:
    return Slurm({**plan.inherited, **plan.environment, **job.environment})


def _directory(plan: LaunchPlan, jobs: dict[str, str], undo: _Undo) -> CoordinationDir:
    """The run's directory, which only now can have its name."""
    if plan.request.attach_dir:
        return CoordinationDir(plan.request.attach_dir)
    job = plan.submissions[0]
    directory = make_run_dir(Path(job.directory.replace("%j", jobs[job.kind])))
    undo.made = directory.path
    return directory


def _record_late(
    directory: CoordinationDir, plan: LaunchPlan, jobs: dict[str, str], git: Callable[[], GitState]
) -> None:
    try:
        write_record(directory, plan, jobs, git())
    except EnvironmentProblem as problem:
        log.warning("%s; the job has been released, and records itself when it starts", problem)


def _publish_foreign_runtime(directory: CoordinationDir, plan: LaunchPlan) -> None:
    """For --runtime-url: address, key and ready flag of a server that no job of this run is."""
    if plan.request.runtime_url is None:
        return
    directory.publish_server(plan.request.runtime_url, plan.secrets.get(KEY_NAME), Flag.of_this_host("", ""))
