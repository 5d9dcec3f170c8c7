"""What did launchers leave that were killed before their commit? The next launch removes it.

Nothing of it can start: its jobs are held. A job is removed if its comment names a launcher that is dead, and its run
was never finished: there is no directory yet, or an empty one, or ``submission_<launcher>.json`` lies in it, which goes
with the commit. So a job that a person holds stays, and what a living launcher is about to release too. The jobs base
is made before the first job: one that is not there is another host's, and nothing is known of its runs. Whether a
launcher on another host, or of another boot, lives cannot be seen from here; a launch takes seconds, so after a quarter
of an hour, by the controller's clock, it is dead. Whoever clears may be killed as well: a directory is renamed before
its files go.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.lib.coordination import (
    STAMP_FORMAT,
    CoordinationDir,
    parse_object,
    read_if_there,
    write_atomically,
)
from slurm.lib.launch_mark import Launcher, host_of, launcher_of, own_launcher, state_of
from slurm.lib.logs import log
from slurm.lib.mounts import mount_in
from slurm.lib.run_record import agent_copy_of, secrets_of
from slurm.lib.runs import is_own, run_folders, stamp_of
from slurm.lib.scheduler import QUESTION_TIMEOUT_S, QueuedJob, Slurm

SCHEMA = 1
DEAD_AFTER_S = 900.0  # of a launcher elsewhere, since its job was submitted
DISCARDED = ".discarded_"
MARKER = "submission_"
LOOK_BACK_S = 7 * 86400.0  # older directories are not looked into: a jobs base may hold thousands


@dataclass(frozen=True)
class Marker:
    """``submission_<launcher>.json``: a submission to a run's directory that is not finished.

    ``jobs``: its jobs, in the order of their submission, empty until all are known; ``made``: whether the directory was
    made for it.
    """

    path: Path
    launcher: str
    jobs: tuple[str, ...]
    made: bool


def write_marker(directory: CoordinationDir, jobs: Sequence[str], *, made: bool) -> Path:
    """Note that this process is submitting these jobs; the file goes once they can start, or are taken back.

    In a directory that is there already it is written before the first of them, without any.
    """
    launcher = own_launcher()
    host, _, _, pid, ticks = launcher.split("/")
    path = directory.path / f"{MARKER}{host}_{pid}_{ticks}.json"
    data = {"schema": SCHEMA, "launcher": launcher, "jobs": list(jobs), "made": made}
    write_atomically(path, json.dumps(data) + "\n")
    return path


def markers(folder: Path) -> list[Marker]:
    """The unfinished submissions to a directory."""
    found = [_marker(path) for path in sorted(folder.glob(f"{MARKER}*.json"))]
    return [marker for marker in found if marker]


def _marker(path: Path) -> Marker | None:
    data = parse_object(read_if_there(path))
    launcher, jobs = data.get("launcher"), data.get("jobs")
    if not isinstance(launcher, str) or not isinstance(jobs, list):
        return None
    ids = tuple(str(job) for job in jobs)
    return Marker(path, launcher, ids, data.get("made") is True) if all(map(str.isdigit, ids)) else None


def discard(folder: Path, between: Callable[[], None] = lambda: None) -> str:
    """Remove a run's directory, or the rest of one, in a way that can be gone on with; returns why it is still there.

    Empty where it is gone, also where somebody else removes it. ``between`` is called before each file.
    """
    doomed = folder if folder.name.startswith(DISCARDED) else folder.with_name(f"{DISCARDED}{folder.name}")
    try:
        if doomed != folder:
            folder.rename(doomed)
    except FileNotFoundError:  # another launch does the same, or it is gone
        return ""
    except OSError as problem:
        return f"{folder}: {problem.strerror}"
    return remove_run_dir(doomed, between)


def rests(base: Path) -> list[Path]:
    """What is left of this user's run directories that were being removed."""
    found = (path for path in base.glob(f"{DISCARDED}*") if stamp_of(path.name.removeprefix(DISCARDED)))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink() and is_own(path))


def remove_run_dir(folder: Path, between: Callable[[], None] = lambda: None) -> str:
    """Remove a folder with everything in it, the files at its top last: so its record tells until then whose it was.

    And markers after the record: so of what a launch left one of them tells that, whenever its removal breaks off.
    Returns why it is still there. What is mounted in it is not gone into, and nothing goes where that is known before.
    """
    if mounted := mount_in(folder):
        return f"another file system is mounted at {mounted}"
    complaints = []
    with contextlib.suppress(FileNotFoundError):  # somebody else removes it as well
        device = folder.lstat().st_dev
        for root, folders, files, descriptor in os.fwalk(folder, topdown=False):
            if os.fstat(descriptor).st_dev != device:
                continue
            for name in (*sorted(files, key=_is_marker), *folders):
                between()
                complaints.append(_removal(root, name, descriptor))
    complaints.append(_removal(str(folder.parent), folder.name, None))
    return next(filter(None, complaints), "")


def _is_marker(name: str) -> bool:
    return name.startswith(MARKER)


def _removal(root: str, name: str, descriptor: int | None) -> str:
    """Remove an entry of a folder, below the open one if there is one; returns why it is still there."""
    path = name if descriptor is not None else f"{root}/{name}"
    try:
        try:
            os.rmdir(path, dir_fd=descriptor)
        except NotADirectoryError:
            os.unlink(path, dir_fd=descriptor)
    except FileNotFoundError:
        return ""
    except OSError as problem:
        return f"{root}/{name}: {problem.strerror}"
    return ""


class Fate(enum.Enum):
    """What becomes of a held job with a launcher's mark."""

    STAYS = "stays"
    GOES = "goes"
    IS_UNSURE = "is unsure"


def fate(launcher: Launcher, age_s: float | None, is_finished: bool | None) -> Fate:
    """Whether a held job is a leftover; ``age_s`` is the time since its submission.

    What is not known is None: the age, or whether its run was finished.
    """
    if launcher is Launcher.LIVES or is_finished:
        return Fate.STAYS
    if is_finished is None:
        return Fate.IS_UNSURE
    if launcher is Launcher.IS_DEAD or (age_s is not None and age_s > DEAD_AFTER_S):
        return Fate.GOES
    return Fate.IS_UNSURE


def clear(slurm: Slurm, base: Path) -> None:
    """Remove what dead launchers left of this user; says so. A silent Slurm is left alone."""
    jobs = slurm.own_jobs(QUESTION_TIMEOUT_S)
    if jobs is None:
        log.debug("Slurm does not answer; what killed launchers left, if anything, stays")
        return
    with _readable(base):
        for doomed in rests(base):
            if _is_of_a_launch(doomed):
                remove_run_dir(doomed)
    for folder in _recent(base):
        with _readable(folder):
            for marker in markers(folder):
                _clear_folder(slurm, marker, jobs)
    for job in reversed(jobs):  # a training before its runtime
        if job.is_held and launcher_of(job.comment):
            with _readable(f"the run of job {job.job_id}"):
                _clear_job(slurm, job, jobs)


def _is_of_a_launch(rest: Path) -> bool:
    """Whether a rest is that of a launch; a run's may take minutes, and is for clean.

    A launch that was killed right before its commit has left its record, too, and its marker, which goes after that.
    """
    return not CoordinationDir(rest).run_record.exists() or any(marker.made for marker in markers(rest))


@contextlib.contextmanager
def _readable(what: object) -> Iterator[None]:
    """For what may lie in a folder that is stale or broken: that one stays as it is, and hinders no launch."""
    try:
        yield
    except OSError as problem:
        log.debug("%s cannot be looked into; what a killed launch left there, if anything, stays: %s", what, problem)


def _clear_job(slurm: Slurm, job: QueuedJob, jobs: Sequence[QueuedJob]) -> None:
    launcher = launcher_of(job.comment) or ""
    state = state_of(launcher, own_launcher())
    if state is Launcher.LIVES:
        return
    log_path = slurm.log_path(job.job_id)
    if log_path is None:  # out of the queue by now, with its partner
        return
    folder = log_path.parent
    marker = next((marker for marker in markers(folder) if job in _queued(marker, jobs)), None)
    age_s = _age_s(slurm, job) if state is Launcher.IS_ELSEWHERE else None
    is_finished = _is_finished(marker, _queued(marker, jobs)) if marker else _has_files(folder)
    decided = fate(state, age_s, is_finished)
    if is_finished is None:
        log.warning(
            "job %s is held, and this host does not see %s, where its run would be; if a killed launch left it, "
            "remove it with: scancel %s",
            *(job.job_id, folder.parent, job.job_id),
        )
    elif decided is Fate.IS_UNSURE:
        log.warning(
            "job %s is held by a launch on %s; if that was killed, remove it with: scancel %s",
            *(job.job_id, host_of(launcher), job.job_id),
        )
    if decided is Fate.GOES:
        if marker is None and stamp_of(folder.name) and folder.is_dir():  # killed before it wrote the marker
            discard(folder)
        _remove(slurm, _ids(marker, jobs) if marker else (job.job_id,), marker)


def _has_files(folder: Path) -> bool | None:
    """Whether anything but a half-written file lies in a run's folder; None where not even its jobs base is there."""
    try:
        return any(not entry.name.startswith(".") for entry in folder.iterdir())
    except FileNotFoundError:
        return False if folder.parent.is_dir() else None
    except OSError:  # it cannot be looked into
        return True


def _age_s(slurm: Slurm, job: QueuedJob) -> float | None:
    now = slurm.clock()
    return None if now is None or job.submitted_at is None else now - job.submitted_at


def _remove(slurm: Slurm, jobs: Sequence[str], marker: Marker | None) -> None:
    """Cancel the jobs, one after the other, so that none starts by the end of another; then remove their directory."""
    for job_id in reversed(jobs):
        complaint = slurm.cancel([job_id], QUESTION_TIMEOUT_S)
        if complaint:
            log.warning("a killed launch left the held job %s, which cannot be cancelled: %s", job_id, complaint)
            return
    log.info("removed what a killed launch left: the held %s %s", "jobs" if jobs[1:] else "job", " ".join(jobs))
    if marker:
        _remove_files(marker)


def _recent(base: Path) -> Iterator[Path]:
    """Run directories of the last days, by their names."""
    since = datetime.fromtimestamp(time.time() - LOOK_BACK_S).strftime(STAMP_FORMAT)
    yield from (path for path in run_folders(base) if stamp_of(path.name) >= since)


def _queued(marker: Marker, jobs: Sequence[QueuedJob]) -> list[QueuedJob]:
    """The jobs in the queue that a submission has submitted, known by their launcher.

    Those with a person's comment are known by their ids. With another launcher's they are another submission's, of
    which this marker is a copy, or which has got the same ids since.
    """

    def its_own(job: QueuedJob) -> bool:
        launcher = launcher_of(job.comment)
        return job.job_id in marker.jobs if launcher is None else launcher == marker.launcher

    return list(filter(its_own, jobs))


def _ids(marker: Marker, jobs: Sequence[QueuedJob]) -> tuple[str, ...]:
    """The ids of a submission's jobs, in the order of their submission; of a heterogeneous one that of the whole."""
    firsts = {job.comment: job.job_id for job in reversed(_queued(marker, jobs))}  # its components share their comment
    return marker.jobs or tuple(sorted(firsts.values(), key=int))


def _clear_folder(slurm: Slurm, marker: Marker, jobs: Sequence[QueuedJob]) -> None:
    """What was left of a directory, and of its jobs."""
    if state_of(marker.launcher, own_launcher()) is not Launcher.IS_DEAD:
        return
    left = _queued(marker, jobs)
    if not left:
        _remove_files(marker)
    elif _is_finished(marker, left):
        _unlink(marker)
    else:
        _remove(slurm, _ids(marker, jobs), marker)


def _is_finished(marker: Marker, left: Sequence[QueuedJob]) -> bool:
    """Whether the commit was reached, which releases the first of the jobs; a person may hold another one."""
    first = [job for job in left if job.job_id in marker.jobs[:1]]
    return bool(marker.jobs) and not any(job.is_held for job in first or left)


def _remove_files(marker: Marker) -> None:
    """The directory, if it was made for these jobs and none of them has ever been in it; else what is theirs alone."""
    folder = marker.path.parent
    if marker.made and not _was_used(folder):
        log.info("removing the unfinished run directory %s", folder)
        discard(folder)
        return
    for job_id in () if marker.made else marker.jobs:
        with contextlib.suppress(OSError):
            secrets_of(CoordinationDir(folder), job_id).unlink()
        shutil.rmtree(agent_copy_of(CoordinationDir(folder), job_id), ignore_errors=True)
    _unlink(marker)


def _unlink(marker: Marker) -> None:
    with contextlib.suppress(OSError):  # of a directory that cannot be written any more
        marker.path.unlink()


def _was_used(folder: Path) -> bool:
    """Whether a job has logged into a run's directory, or has said something there."""
    return any(any(folder.glob(pattern)) for pattern in ("*.out", "*.err", "*.flag", "heartbeat_*"))
