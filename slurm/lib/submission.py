"""Carries out a plan on Slurm, all or nothing.

Both jobs are submitted held, and the training job depends on the runtime job (with PAIRING=het both are one job), as do
the arrays of the runtime's further nodes. When the run's directory is complete all the others are released, which still
wait for the runtime job, and last that one: this is the commit. Until then a failure cancels what was submitted, and a
launcher that is killed leaves nothing that can start; ``submission_<launcher>.json`` tells the next launch that it was
never finished (leftovers.py).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm.lib.coordination import CoordinationDir, Flag, make_base, make_run_dir
from slurm.lib.errors import EnvironmentProblem, SubmissionError, SuiteError
from slurm.lib.launch_mark import new_mark
from slurm.lib.leftovers import discard, write_marker
from slurm.lib.logs import log
from slurm.lib.plan import LaunchPlan
from slurm.lib.run_record import Provenance, furnish, write_record
from slurm.lib.scheduler import Slurm
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.trainer import KEY_NAME
from slurm.lib.unheard import Insistence, cancelled, released, submitted


@dataclass(frozen=True)
class Submitted:
    """The run that has been released: its directory and the ids of its jobs by kind, the one submitted first first."""

    directory: CoordinationDir
    jobs: dict[str, str]


@dataclass
class _Undo:
    """What has to be taken back if the commit is not reached; the training job first, which waits for the other.

    The files of a job that may live are left to it. So is ``marker``, by which the next launch knows what to remove.
    """

    slurm: Slurm
    job_ids: list[str]
    insistence: Insistence
    made: Path | None = None
    added: list[Path] = field(default_factory=list)
    marker: Path | None = None
    is_unsure: bool = False  # whether there is a job that is not among job_ids
    failed: bool = False

    def __call__(self) -> str:
        complaint = cancelled(self.slurm, list(reversed(self.job_ids)), self.insistence)
        if complaint:
            self.failed = True
            by_hand = f"cancel by hand with scancel{', or let the next launch do it' if self.marker else ''}"
            return (
                f"could not cancel {' '.join(self.job_ids)} ({complaint}): {by_hand}; until then nothing of it starts"
            )
        if self.made is not None:
            discard(self.made)
        for path in [*self.added, *([self.marker] if self.marker and not self.is_unsure else [])]:
            _remove(path)
        nothing = "nothing else was queued" if self.is_unsure else "nothing was queued"
        return f"cancelled {' '.join(self.job_ids)}" if self.job_ids else nothing


def _remove(path: Path) -> None:
    if path.is_dir():  # the copy of SNAPSHOT=1
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _taken_back_on_failure(slurm: Slurm, insistence: Insistence) -> Iterator[_Undo]:
    undo = _Undo(slurm, [], insistence)
    try:
        yield undo
    except SubmissionError as problem:
        if problem.may_start:
            raise
        message = f"{problem}; {undo()}"
        raise SubmissionError(message, leaves_jobs=undo.failed or problem.leaves_jobs) from None
    except SuiteError as problem:
        message = f"{problem}; {undo()}"
        raise SubmissionError(message, leaves_jobs=undo.failed) from None
    except Interrupted:
        log.warning("taking the submission back: %s", undo())
        raise
    except BaseException:
        undo()
        raise


def submit(
    plan: LaunchPlan,
    notes: SignalNotes,
    git: Callable[[], Provenance],
    checkout: Path,
    release: Callable[[Slurm, str], None] | None = None,
    patience_s: float = 0.0,
) -> Submitted:
    """Submit the plan's jobs and let them start; in place of the last step, the first job's release, ``release``.

    A Slurm that is silent is waited for, ``patience_s`` seconds in all. ``SubmissionError`` says why not, and names
    what could not be taken back.
    """
    jobs: dict[str, str] = {}
    slurm = Slurm({**plan.inherited, **plan.environment})  # a .conf may set PATH or SLURM_CONF
    joining = plan.request.attach_dir is not None
    insistence = Insistence(notes, patience_s)
    make_base(Path(plan.directory))  # without one no launch would know later what became of these jobs
    # A pair in place of another is what is left of the run if its submitter dies: a person decides about it.
    is_marked = plan.request.requeue is None
    with _taken_back_on_failure(slurm, insistence) as undo:
        if joining and is_marked:
            undo.marker = write_marker(_directory(plan, jobs, undo), [], made=False)
        for job in plan.submissions:
            notes.check()
            mark = new_mark()
            planned = job.with_ids(jobs).with_mark(mark)
            jobs[job.kind] = _submitted(slurm.plus(planned.environment), planned.argv, mark, undo)
        if plan.combined:
            jobs["runtime"] = _runtime_component(slurm, jobs["training"])
        directory = _directory(plan, jobs, undo)
        if is_marked:
            undo.marker = write_marker(directory, undo.job_ids, made=not joining)
        furnish(directory, plan, jobs, checkout, undo.added if joining else [])
        _publish_foreign_runtime(directory, plan)
        late = joining and is_marked
        if not late:
            undo.added.append(write_record(directory, plan, jobs, git()))
        notes.check()
        # They wait for the first all the same; of equals Slurm starts first what was released first.
        for job_id in undo.job_ids[1:]:
            released(slurm, job_id, insistence)
        first = undo.job_ids[0]
        release(slurm, first) if release else _commit(slurm, first, directory, insistence)
    if undo.marker:
        _unmark(undo.marker)
    if late:  # only now: the runtime job takes a recorded job that is cancelled for a training that has failed
        _record_late(directory, plan, jobs, git)
    return Submitted(directory, jobs)


def _commit(slurm: Slurm, job_id: str, directory: CoordinationDir, insistence: Insistence) -> None:
    """Release the first job, which is what all wait for; if it may or may not be released, nothing is taken back."""
    try:
        released(slurm, job_id, insistence)
    except SubmissionError as problem:
        if not problem.leaves_jobs:
            raise
        advice = f"look with squeue --me, or end it with: launch.py cancel {directory.path}"
        raise SubmissionError(
            f"{problem}; the run {directory.path} is complete, and may start: {advice}",
            leaves_jobs=True,
            may_start=True,
        ) from None


def _submitted(slurm: Slurm, argv: Sequence[str], mark: str, undo: _Undo) -> str:
    """Submit a job that is taken back if the commit is not reached; returns its id."""
    undo.is_unsure = True
    try:
        job_id = submitted(slurm, argv, mark, undo.insistence)
    except SuiteError as problem:
        undo.is_unsure = isinstance(problem, SubmissionError) and problem.leaves_jobs
        raise
    undo.is_unsure = False
    undo.job_ids.append(job_id)
    return job_id


def _unmark(marker: Path) -> None:
    """After the commit nothing may hide which jobs there are."""
    try:
        marker.unlink(missing_ok=True)
    except OSError as problem:
        log.warning("cannot remove %s: %s; the jobs have been released all the same", marker, problem.strerror)


def _runtime_component(slurm: Slurm, job_id: str) -> str:
    """The id of the runtime in the heterogeneous job ``job_id``, which ends with it: there is nothing to undo."""
    components = slurm.components(job_id)
    if len(components) != 2:
        raise SubmissionError(f"job {job_id} has {len(components)} components in Slurm, not 2")
    return components[1]


def _directory(plan: LaunchPlan, jobs: dict[str, str], undo: _Undo) -> CoordinationDir:
    """The run's directory, which only now can have its name."""
    if plan.request.attach_dir:
        return CoordinationDir(plan.request.attach_dir)
    job = plan.submissions[0]
    directory = make_run_dir(Path(job.directory.replace("%j", jobs[job.kind])))
    undo.made = directory.path
    return directory


def _record_late(
    directory: CoordinationDir, plan: LaunchPlan, jobs: dict[str, str], git: Callable[[], Provenance]
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
