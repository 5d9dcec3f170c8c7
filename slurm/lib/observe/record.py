"""What does a run's directory say of the run: its pairs of jobs, which attempt each is, and how they ended?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.observe.run_files import names_in, printable, read_flag, read_object
from slurm.lib.observe.unknown import Unknown
from slurm.lib.run_record import WORKERS, worker_arrays

KINDS = ("training", "runtime")
_LOG_NAME = re.compile(r"(runtime|training)_(\d{1,12}|local\d+\.\d+)\.out", re.ASCII)
_RECORD_NAME = re.compile(r"run(_[\w.]+)?\.json")
_JOB_ID = re.compile(r"\d{1,12}|local\d+\.\d+", re.ASCII)
_ATTEMPT_NAME = re.compile(r"attempt_(\d+)\.json", re.ASCII)


@dataclass(frozen=True)
class End:
    """How a job ended: in its own words where ``is_own``, else in those of whoever spoke for it.

    ``ended`` is a word of ``restarts.Ended``, empty where that is not known.
    """

    exit_code: int | None
    reason: str
    time: str = ""
    is_own: bool = True
    ended: str = ""


@dataclass(frozen=True)
class RecordedJob:
    """A job of a run, how it ended where the directory says so, and whether it has begun to write its log.

    ``array`` is the array of a worker, empty for a step, and ``is_needed`` whether the training waits for its start.
    """

    kind: str
    job_id: str
    end: End | None = None
    has_log: bool = False
    array: str = ""
    is_needed: bool = False


@dataclass(frozen=True)
class Pair:
    """The jobs that make one attempt, a training job first; ``attempt`` counts from 1.

    ``workers`` are those of its runtime, whose end is no end of the run: tasks of arrays, or steps of the runtime job.
    """

    jobs: tuple[RecordedJob, ...]
    attempt: int = 1
    created: str = ""
    workers: tuple[RecordedJob, ...] = ()

    @property
    def everybody(self) -> tuple[RecordedJob, ...]:
        return (*self.jobs, *self.workers)

    @property
    def is_left(self) -> bool:
        """Whether its runtime job has said that it ended: it takes its workers with it."""
        runtime = self.job("runtime")
        return runtime is not None and runtime.end is not None and runtime.end.is_own

    def job(self, kind: str) -> RecordedJob | None:
        return next((job for job in self.jobs if job.kind == kind), None)


@dataclass(frozen=True)
class RunRecord:
    """All that a run's directory says, but for its logs.

    ``pairs`` in the order in which they were submitted; ``attempts`` at most, by RESTARTS; ``nodes`` that its runtime
    is to have, by RUNTIME_NODES; the flags as they lie there;
    ``problems`` are sentences about what could not be read. A run that has no directory yet has one job.
    """

    directory: CoordinationDir | None
    pairs: tuple[Pair, ...] = ()
    created: str = ""
    user: str = ""
    host: str = ""
    pairing: str = ""
    backend: str = "slurm"
    config: str = ""
    attempts: int = 1
    nodes: int = 1
    completion: Flag | None = None
    failure: Flag | None = None
    ready: Flag | None = None
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The directory's name; of a run without one, the id of its job."""
        if self.directory is not None:
            return printable(self.directory.path.name)
        return next((job.job_id for pair in self.pairs for job in pair.jobs), "")


def read_record(directory: CoordinationDir) -> RunRecord:
    """The record of a run, as far as there is one."""
    names = names_in(directory.path)
    if isinstance(names, Unknown):
        return RunRecord(directory, problems=(f"its directory cannot be read: {names.why}",))
    records = {name: read_object(directory.path / name) for name in sorted(names) if _RECORD_NAME.fullmatch(name)}
    attempts = {int(m[1]): read_object(directory.path / m[0]) for m in map(_ATTEMPT_NAME.fullmatch, names) if m}
    flags = [
        read_flag(path) if path.name in names else None
        for path in (directory.training_complete, directory.runtime_failed, directory.runtime_ready)
    ]
    return make_record(directory, records, attempts, flags, names)


def make_record(
    directory: CoordinationDir,
    records: Mapping[str, dict[str, object] | Unknown],
    attempts: Mapping[int, dict[str, object] | Unknown],
    flags: Sequence[Flag | None],
    names: frozenset[str],
) -> RunRecord:
    """The record from what was read: ``run*.json`` by name, attempts by number, the flags of completion, failure and
    readiness, and the names in the directory."""
    read = {name: data for name, data in records.items() if isinstance(data, dict)}
    problems = [data.why for data in (*records.values(), *attempts.values()) if isinstance(data, Unknown)]
    problems += [] if "run.json" in records else ["run.json is missing"]
    whole = {number: data for number, data in attempts.items() if isinstance(data, dict)}
    completion, failure, ready = flags
    found = [_pair(data) for _name, data in sorted(read.items(), key=lambda item: _order(item[0]))]
    pairs = _numbered(_joined(_with_unrecorded(found, whole) or _by_logs(names)), whole)
    ends = _told(completion, failure)
    pairs = [_with_ends(pair, ends, names) for pair in _with_unrecorded_workers(pairs, names)]
    first = read.get("run.json", {})
    settings = _mapping(first.get("settings"))
    config = _texts(first.get("config_files"))
    return RunRecord(
        directory,
        tuple(pairs),
        created=_text(first.get("created")),
        user=_text(first.get("user")),
        host=_text(first.get("host")),
        pairing=_text(first.get("pairing")),
        backend=_text(settings.get("SKYRL_BACKEND")) or ("local" if "local_jobs.txt" in names else "slurm"),
        config=config[-1].rpartition("/")[2].removesuffix(".conf") if config else "",
        attempts=_number(settings.get("RESTARTS")) + 1,
        nodes=max(1, _number(settings.get("RUNTIME_NODES"))),
        completion=completion,
        failure=failure,
        ready=ready,
        problems=tuple(problems),
    )


def _order(name: str) -> tuple[int, str]:
    """``run.json`` first, then by the number of the job in the name, as that grows."""
    return (0, "") if name == "run.json" else (len(name), name)


def _pair(data: Mapping[str, object]) -> Pair:
    jobs = _mapping(data.get("jobs"))
    found = [_job(kind, jobs[kind]) for kind in KINDS if kind in jobs]
    return Pair(tuple(job for job in found if job.job_id), created=_text(data.get("created")), workers=_workers(jobs))


def _workers(jobs: Mapping[str, object]) -> tuple[RecordedJob, ...]:
    return tuple(
        RecordedJob("worker", task_id, array=array.job_id, is_needed=array.kind == WORKERS)
        for array in worker_arrays(jobs)
        for task_id in array.task_ids
    )


def _job(kind: str, data: object) -> RecordedJob:
    said = _mapping(data)
    ended = _mapping(said.get("ended"))
    end = None
    if ended:
        code, is_own = ended.get("exit_code"), ended.get("said_by") == kind
        end = End(code if isinstance(code, int) else None, _text(ended.get("reason")), _text(ended.get("time")), is_own)
    job_id = _text(said.get("id"))
    return RecordedJob(kind, job_id if _JOB_ID.fullmatch(job_id) else "", end)


def _with_unrecorded(pairs: list[Pair], attempts: Mapping[int, Mapping[str, object]]) -> list[Pair]:
    """The pairs, and those that only the attempts name: a record may be lost, or not be written yet."""
    found = [pair for pair in pairs if pair.jobs]
    known = {job.job_id for pair in found for job in pair.jobs}
    for _number, data in sorted(attempts.items()):
        for named in (_mapping(data.get("jobs")), _mapping(data.get("successor"))):
            pair = _pair({"jobs": {kind: {"id": named[kind]} for kind in KINDS if kind in named}})
            found += [pair] if pair.jobs and known.isdisjoint(job.job_id for job in pair.jobs) else []
            known |= {job.job_id for job in pair.jobs}
    return found


def _by_logs(names: frozenset[str]) -> list[Pair]:
    """The jobs as the names of their logs tell them, where no record does; the last of each kind."""
    last: dict[str, str] = {}
    for kind, job_id in sorted((m[1], m[2]) for m in map(_LOG_NAME.fullmatch, names) if m):
        last[kind] = max(last.get(kind, ""), job_id, key=lambda found: (len(found), found))
    return [Pair(tuple(RecordedJob(kind, last[kind]) for kind in KINDS if kind in last))] if last else []


def _joined(pairs: list[Pair]) -> list[Pair]:
    """A training job that was launched alone goes with the runtime job that was before it."""
    found: list[Pair] = []
    alone: Pair | None = None
    for pair in pairs:
        runtime, training = pair.job("runtime"), pair.job("training")
        if runtime and not training:
            alone = pair
        if training and not runtime and alone:
            found = [other for other in found if other.jobs != alone.jobs]
            pair = replace(pair, jobs=(training, *alone.jobs), workers=alone.workers)
        found.append(pair)
    return found


def _numbered(pairs: list[Pair], attempts: Mapping[int, Mapping[str, object]]) -> list[Pair]:
    """The pairs with their attempts. One that nothing is said of was queued again in place of the one before it."""
    numbers: dict[str, int] = {}
    for number, data in sorted(attempts.items()):
        following, own = _mapping(data.get("successor")).get("training"), _mapping(data.get("jobs")).get("training")
        numbers |= {_text(following): number + 1, _text(own): number}
    found, last = [], 1
    for pair in pairs:
        training = pair.job("training")
        last = numbers.get(training.job_id, last) if training else last
        found.append(replace(pair, attempt=last))
    return found


def _told(*flags: Flag | None) -> dict[str, End]:
    """What flags say of the ends of jobs."""
    told = [flag for flag in flags if flag and flag.job_id and not flag.by_hand]
    return {flag.job_id: End(flag.exit_code, _text(flag.reason), _text(flag.time), True, flag.ended) for flag in told}


def _with_ends(pair: Pair, told: Mapping[str, End], names: frozenset[str]) -> Pair:
    jobs, workers = (tuple(_known(job, told, names) for job in some) for some in (pair.jobs, pair.workers))
    return replace(pair, jobs=jobs, workers=workers)


def _with_unrecorded_workers(pairs: list[Pair], names: frozenset[str]) -> list[Pair]:
    """The pairs with the workers that only their logs tell of: steps of a runtime job, and what a person submitted.

    Those join the head of the last one.
    """
    runtimes = [job.job_id for pair in pairs for job in pair.jobs if job.kind == "runtime"]
    known = {worker.job_id for pair in pairs for worker in pair.workers}
    logs = [match for match in map(_WORKER_LOG.fullmatch, names) if match and f"{match[1]}_{match[2]}" not in known]
    found = []
    for pair in pairs:
        runtime = pair.job("runtime")
        own = runtime.job_id if runtime else ""
        ids = [match for match in logs if match[1] == own or (own == runtimes[-1] and match[1] not in runtimes)]
        found.append(replace(pair, workers=(*pair.workers, *_by_log(ids, own))) if own else pair)
    return found


_WORKER_LOG = re.compile(r"worker_(\d{1,12})_(\d{1,7})\.out", re.ASCII)


def _by_log(logs: Sequence[re.Match[str]], runtime: str) -> list[RecordedJob]:
    """Workers by the names of their logs, ``worker_123_1.out``: a step where 123 is the runtime job, else a task."""
    ordered = sorted(logs, key=lambda match: (int(match[1]), int(match[2])))
    return [RecordedJob("worker", f"{m[1]}_{m[2]}", array="" if m[1] == runtime else m[1]) for m in ordered]


def _known(job: RecordedJob, told: Mapping[str, End], names: frozenset[str]) -> RecordedJob:
    """The job with what the directory says of its end: in the record, in a flag, or in both."""
    end, flag = job.end, told.get(job.job_id)
    if end and flag:
        end = replace(end, ended=flag.ended, exit_code=flag.exit_code if end.exit_code is None else end.exit_code)
    return replace(job, end=end or flag, has_log=f"{job.kind}_{job.job_id}.out" in names)


# --- texts that others have written -----------------------------------------------------------------------------------


def _mapping(data: object) -> Mapping[str, object]:
    return data if isinstance(data, dict) else {}


def _text(data: object) -> str:
    """A text or a number as one printable line; empty for anything else."""
    is_plain = isinstance(data, (str, int)) and not isinstance(data, bool)
    return " ".join(printable(str(data)).split()) if is_plain else ""


def _texts(data: object) -> list[str]:
    return [_text(item) for item in data] if isinstance(data, list) else []


def _number(data: object) -> int:
    text = _text(data)
    return int(text) if re.fullmatch(r"\d{1,6}", text, re.ASCII) else 0
