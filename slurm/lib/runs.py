"""Which run does a person mean, and which jobs has it?

It is named by its directory, a unique prefix of that one's name, the id of any of its jobs, or ``latest``. A number
alone is a job's id and never a prefix: a wrong id would otherwise mean some run of this year, which may be cancelled.
A worker is a task of an array, ``124_1``, and its run is meant by that, or by ``124``.

A run is a directory: all its attempts, and jobs that joined it, are its jobs. What is known of them stands in its
records, and Slurm knows the directory of a job by its log. A job that has not recorded itself yet (submitted with
sbatch directly, and pending) is a run of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.lib.coordination import CoordinationDir
from slurm.lib.errors import UsageError
from slurm.lib.job_arrays import array_of, is_slurms, is_task
from slurm.lib.run_record import WORKER_NAME, job_ids, read_record, record_paths, worker_arrays
from slurm.lib.scheduler import Slurm, parse_array, parse_log, parse_name

LATEST = "latest"
KINDS = {"skyrl-runtime": "runtime", "skyrl-train": "training", WORKER_NAME: "worker"}  # by the names of our jobs
SHOWN = 5  # names of runs in a message
_NAME = re.compile(r"((\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)(\d\d))_[^_]+", re.ASCII)
_LOCAL_ID = re.compile(r"local\d+\.\d+")


@dataclass(frozen=True)
class RunJob:
    """One job of a run; ``leader`` is the job that acts for it: the first part of a heterogeneous job, or the array.

    A worker is a task of an array.
    """

    kind: str
    job_id: str
    leader: str = ""

    @property
    def is_local(self) -> bool:
        """Whether it is a process of the machine that it was launched on."""
        return bool(_LOCAL_ID.fullmatch(self.job_id))


@dataclass(frozen=True)
class FoundRun:
    """A run as a person named it: its directory, or the one job that is known of it."""

    name: str
    directory: CoordinationDir | None
    alone: RunJob | None = None

    def jobs(self) -> list[RunJob]:
        """Its jobs as its records have them at this moment, a training job before its runtime job; workers last."""
        if self.directory is None:
            return [self.alone] if self.alone else []
        found = {job.job_id: job for jobs, het in _pairs(self.directory) for job in _as_jobs(jobs, het)}
        return list((found | {job.job_id: job for job in _workers(self.directory)}).values())

    @property
    def host(self) -> str:
        """The host that it was launched from; empty where that is not known."""
        return str(read_record(self.directory.run_record).get("host", "")) if self.directory else ""


def _as_jobs(jobs: Mapping[str, str], het: bool) -> Iterator[RunJob]:
    for kind in sorted(jobs, reverse=True):
        yield RunJob(kind, jobs[kind], jobs["training"] if het and kind == "runtime" and len(jobs) == 2 else "")


def _workers(directory: CoordinationDir) -> Iterator[RunJob]:
    """The tasks of the worker arrays in each record, and of those that a person submitted, by their logs."""
    runtimes = set()
    for path in record_paths(directory):
        jobs = read_record(path).get("jobs")
        runtimes.add(job_ids(jobs).get("runtime"))
        for array in worker_arrays(jobs):
            for task_id in array.task_ids:
                yield RunJob("worker", task_id, array.job_id)
    for log in sorted(directory.path.glob("worker_*.out")):
        worker_id = log.stem.removeprefix("worker_")
        if is_task(worker_id) and array_of(worker_id) not in runtimes:  # else a step of that job
            yield RunJob("worker", worker_id, array_of(worker_id))


def _has_job(directory: CoordinationDir, job_id: str) -> bool:
    """Whether a record names a job: also an array, or a task of one."""
    if any(job_id in jobs.values() for jobs, _het in _pairs(directory)):
        return True
    return any(job_id in {worker.job_id, worker.leader} for worker in _workers(directory))


def _pairs(directory: CoordinationDir) -> Iterator[tuple[dict[str, str], bool]]:
    """The ids of jobs by kind, of each record; and whether they are one heterogeneous job."""
    het = False
    for path in record_paths(directory):
        data = read_record(path)
        het = het or data.get("pairing") == "het"
        yield job_ids(data.get("jobs")), data.get("pairing") == "het"
    for path in sorted(directory.path.glob("attempt_*.json")):
        yield job_ids(read_record(path).get("successor")), het


def run_folders(base: Path) -> list[Path]:
    """The folders in a jobs base that are named like runs, the newest first; of one second by the jobs' numbers."""
    try:
        found = [path for path in base.iterdir() if stamp_of(path.name)]
    except OSError:
        return []
    return sorted(found, key=lambda path: (stamp_of(path.name), len(path.name), path.name), reverse=True)


def is_own(path: Path) -> bool:
    """Whether a folder, or the link to one, is this user's; not where that cannot be seen."""
    try:
        return path.lstat().st_uid == os.getuid()
    except OSError:
        return False


def stamp_of(name: str) -> str:
    """The time in a run directory's name, as it stands there; empty for any other name."""
    match = _NAME.fullmatch(name)  # datetime.strptime, for STAMP_FORMAT, would be felt in the start-up
    with contextlib.suppress(ValueError):
        if match and datetime(*(int(part) for part in match.groups()[1:])):  # type: ignore[arg-type]  # six numbers
            return match[1]
    return ""


def find(name: str, base: Path, slurm: Slurm, ask_s: float) -> FoundRun:
    """The run that a person means; ``UsageError`` with what there is instead. Slurm has ``ask_s`` seconds to answer."""
    if name == LATEST:
        found = next((path for path in run_folders(base) if record_paths(CoordinationDir(path))), None)
    elif _is_id(name, base):
        return _by_id(name, base, slurm, ask_s)
    else:
        found = _folder(name, base) or _by_prefix(name, base)
    if found is None:
        raise UsageError(f"there is no run {name!r}{_what_there_is(base)}")
    return FoundRun(name, CoordinationDir(found))


def _is_id(name: str, base: Path) -> bool:
    """Whether a job is meant; by ``20261128_18``, which could be a task of an array, a run whose name begins so."""
    if is_task(name):
        return not any(path.name.startswith(name) for path in run_folders(base))
    return is_slurms(name) or bool(_LOCAL_ID.fullmatch(name))


def refuse_unknown_jobs(run: FoundRun) -> None:
    """``UsageError`` for a run of which no record names a job: nothing that is to reach its jobs can."""
    if run.directory and not run.jobs():
        records = ", ".join(path.name for path in record_paths(run.directory))
        raise UsageError(
            f"no job of the run {run.directory.path} is known: {records} in it is not whole, or none of ours"
        )


def stranger(job_id: str, directory: CoordinationDir, slurm: Slurm, ask_s: float) -> str | None:
    """Whose a living job is, where the record that names it is foreign, or older than the job.

    Empty for a run's own; None while Slurm is not heard. It knows the directory of a job by its log. One that lies
    elsewhere is believed to be of a job that was submitted directly, as long as no other run's records tell of it: such
    a job has linked its log into the run's directory, or is pending and has a name of ours.
    """
    shown = slurm.shown(job_id, ask_s)
    if shown is None:
        return None
    log, name = parse_log(shown, job_id), parse_name(shown)
    if log is None or _is_same(log.parent, directory.path):
        return ""
    if _has_job(CoordinationDir(log.parent), job_id):
        return f"is of the run {log.parent}"
    if not name or name in KINDS or any(_links(directory.log(kind, job_id, "out"), log) for kind in KINDS.values()):
        return ""
    return f"is another job, {name}, with its log in {log.parent}"


def _links(link: Path, log: Path) -> bool:
    """Whether a job's log in the directory is a link to this one, which need not be seen from this host."""
    with contextlib.suppress(OSError):
        return link.readlink() == log
    return False


def _is_same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return one == other


def _folder(name: str, base: Path) -> Path | None:
    """A run's directory by its path, or by its name alone; ``UsageError`` where one is there that tells nothing."""
    places = [Path(name).expanduser().absolute(), base / name] if not name.startswith("~") else [_home(name)]
    found = next((path for path in places if record_paths(CoordinationDir(path))), None)
    if found is None and (closed := next(filter(_is_closed, places), None)):
        raise UsageError(f"{closed} cannot be read: it is {_owner(closed)}'s, who alone can look at that run")
    if found is None and (empty := next((path for path in places if stamp_of(path.name) and path.is_dir()), None)):
        what = "its launch has not come so far, or was killed, or somebody removed the file"
        raise UsageError(f"there is no run in {empty}: no run.json is there ({what}){_what_there_is(base)}")
    return found


def _is_closed(path: Path) -> bool:
    """Whether it is a folder that this user may not read; one below such a folder is, too."""
    try:
        return path.is_dir() and not os.access(path, os.R_OK | os.X_OK)
    except OSError:  # a folder above it may not be entered
        return True


def _owner(path: Path) -> str:
    """Whose it is; of one that may not even be looked up, the folder's above it."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError, KeyError):
            return place.owner()
    return "somebody"


def _by_prefix(prefix: str, base: Path) -> Path | None:
    """The one run whose directory's name begins so; ``UsageError`` lists them where there are several."""
    found = [path for path in run_folders(base) if prefix and path.name.startswith(prefix)]
    if len(found) > 1:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        names = ", ".join(path.name for path in found[:SHOWN])
        raise UsageError(f"{prefix!r} is the beginning of {len(found)} runs' names: {names}{more}; write more of one")
    return next((path for path in found if record_paths(CoordinationDir(path))), None)


def _home(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user
        return Path(name)


def _by_id(job_id: str, base: Path, slurm: Slurm, ask_s: float) -> FoundRun:
    """By the directory's name, by Slurm's word about the job's log, by all records; else the job alone."""
    folders = run_folders(base)
    likely = [path for path in folders if path.name.endswith(f"_{job_id}")]
    shown = (slurm.shown(job_id, ask_s) or "") if is_slurms(job_id) else ""
    log = parse_log(shown, job_id)
    for path in [*likely, *([log.parent] if log else []), *folders]:
        directory = CoordinationDir(path)
        if _has_job(directory, job_id):
            return FoundRun(job_id, directory)
    array = parse_array(shown)
    if array and array != job_id and not is_task(job_id):  # Slurm's own number of a task
        return _by_id(array, base, slurm, ask_s)
    kind = KINDS.get(parse_name(shown) or "") if log else None
    if kind is None:
        hint = " (a number alone is a job's id)" if any(path.name.startswith(job_id) for path in folders) else ""
        raise UsageError(f"there is no run with a job {job_id}{hint}{_what_there_is(base)}")
    return FoundRun(job_id, None, RunJob(kind, job_id))


def _what_there_is(base: Path) -> str:
    known = [path.name for path in run_folders(base)[:SHOWN]]
    where = f" below SKYRL_JOBS_BASE={base}"
    return f"; the newest{where}: {', '.join(known)}" if known else f"; there are no runs{where}"
