"""What a run leaves to be read later: ``run.json``, copies of its .conf files, the code it runs; no secret in any."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm.lib.coordination import (
    JOINED_AGENT,
    LATE_S,
    CoordinationDir,
    host_name,
    is_listed,
    parse_object,
    utc_now,
    write_atomically,
)
from slurm.lib.errors import EnvironmentProblem, WaitTimeout

if TYPE_CHECKING:  # what writes a record imports it where it is used: 40 ms, felt in commands that only read one
    from slurm.lib.git import GitState
    from slurm.lib.plan import LaunchPlan
    from slurm.lib.settings import Settings

SCHEMA = 1
WORKERS, MORE_WORKERS = "workers", "more_workers"  # the kinds of worker arrays, in a plan and in a record
WORKER_KINDS = (WORKERS, MORE_WORKERS)
WORKER_NAME = "skyrl-worker"
KeptDiff = Mapping[str, object]  # what the record says of a tree's diff: the file's name, what was left out of it
CODE_PARTS = ("slurm", "slurm_runtime", "shell_rl", "local_verl", "pyproject.toml")


@dataclass(frozen=True)
class Provenance:
    """What a run was launched from: this suite's checkout, and skyrl-agent's tree, where there is one."""

    suite: GitState
    agent: GitState | None = None


def provenance(checkout: Path, settings: Settings) -> Provenance:
    """Ask git about both trees."""
    from slurm.lib.git import git_state
    from slurm.lib.trainer import agent_folder

    agent = agent_folder(settings)
    return Provenance(git_state(checkout), git_state(agent) if os.path.isdir(agent) else None)  # noqa: PTH112  Path's raises below a folder of somebody else's


def record(
    plan: LaunchPlan, jobs: Mapping[str, str], git: Provenance, python: str, diffs: Mapping[str, KeptDiff]
) -> dict[str, object]:
    """The contents of ``run.json``; ``diffs`` says by tree where what had changed stands."""
    import getpass

    from slurm.lib.secrets import is_secret_name, masked

    settings = masked(plan.settings.as_environment())
    return {
        "schema": SCHEMA,
        "created": utc_now(),
        "user": getpass.getuser(),
        "host": host_name(),
        "git": {**git.suite.as_record(), **diffs.get("suite", {})},
        "agent_git": {**git.agent.as_record(), **diffs.get("agent", {})} if git.agent else None,
        "interpreter": python,
        "config_files": [str(path) for path in plan.config.files],
        "settings": {name: value for name, value in settings.items() if not is_secret_name(name)},
        "sources": dict(plan.config.sources),
        "jobs": _recorded(plan, jobs),
        "pairing": plan.pairing,
    }


def _recorded(plan: LaunchPlan, jobs: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """The jobs by kind: id, name, and of an array the numbers of its tasks."""
    tasks = {job.kind: {"tasks": list(job.tasks)} for job in plan.workers}
    return {kind: {"id": job_id, "name": _ALL_NAMES[kind], **tasks.get(kind, {})} for kind, job_id in jobs.items()}


_NAMES = {"runtime": "skyrl-runtime", "training": "skyrl-train"}
_ALL_NAMES = {**_NAMES, **dict.fromkeys(WORKER_KINDS, WORKER_NAME)}
_OTHER = {"runtime": "training", "training": "runtime"}


def record_text(
    plan: LaunchPlan, jobs: Mapping[str, str], git: Provenance, python: str, diffs: Mapping[str, KeptDiff]
) -> str:
    """``run.json`` as text, with every secret value masked wherever it stands."""
    from slurm.lib.secrets import mask_values

    text = json.dumps(record(plan, jobs, git, python, diffs), indent=2, sort_keys=True)
    return mask_values(text, plan.secret_values) + "\n"


def furnish(
    directory: CoordinationDir, plan: LaunchPlan, jobs: Mapping[str, str], checkout: Path, added: list[Path]
) -> None:
    """Fill the run's directory, all but its record: code, .conf copies, task file; secrets last.

    What is made goes into ``added`` at once: on a failure that has to be taken back from a run that was joined.
    """
    from slurm.lib.plan import OWN_ID, secrets_file
    from slurm.lib.snapshot import take_snapshot
    from slurm.lib.task_yaml import write_matching
    from slurm.lib.trainer import agent_folder, task_example

    if copy_code(checkout, directory.code):
        added.append(directory.code)
    goes_on = plan.request.goes_on  # its jobs find the rest where those before them did
    if plan.settings.snapshot and plan.training and not goes_on:
        copy = agent_copy(directory, plan, jobs["training"])
        take_snapshot(agent_folder(plan.settings), copy)
        added.append(copy)
    copy_confs(directory, plan, added)
    example = task_example(plan.settings) if plan.training and not goes_on else None
    if example:
        added += [directory.task_yaml] if not directory.task_yaml.exists() else []
        write_matching(example, directory.task_yaml, plan.settings)
    if plan.secrets and not goes_on:
        path = directory.path / secrets_file(plan.request).replace(OWN_ID, next(iter(jobs.values())))
        added.append(path)
        write_atomically(path, json.dumps(dict(plan.secrets)), 0o600)


def agent_copy(directory: CoordinationDir, plan: LaunchPlan, training: str) -> Path:
    """The folder of the copy that SNAPSHOT=1 takes for the training job ``training``."""
    from slurm.lib.plan import OWN_ID

    return directory.path / plan.request.agent_name.replace(OWN_ID, training)


def agent_copy_of(directory: CoordinationDir, job_id: str) -> Path:
    """The copy of skyrl-agent of a training that joined the run in a directory."""
    return directory.path / JOINED_AGENT.replace("%j", job_id)


def ensure_task_yaml(settings: Settings, directory: CoordinationDir) -> None:
    """Make the task file of TASK_YAML=auto unless it is there: a launch has made it, perhaps the user edited it."""
    from slurm.lib.task_yaml import write_matching
    from slurm.lib.trainer import task_example

    example = task_example(settings)
    if example and not is_listed(directory.task_yaml):
        write_matching(example, directory.task_yaml, settings)


def write_record(directory: CoordinationDir, plan: LaunchPlan, jobs: Mapping[str, str], git: Provenance) -> Path:
    """Write the record: ``run.json``, or ``run_<id>.json`` in the directory of a run that is joined; returns which."""
    first = next(iter(jobs.values()))
    path = directory.path / f"run_{first}.json" if directory.run_record.exists() else directory.run_record
    diffs = _write_diffs(path, plan, git)
    write_atomically(path, record_text(plan, jobs, git, plan.jobs[0].environment["SKYRL_PYTHON"], diffs))
    return path


def _write_diffs(record: Path, plan: LaunchPlan, git: Provenance) -> dict[str, KeptDiff]:
    """Write what had changed in each tree beside the record, without secrets; returns what is to be said of it."""
    from slurm.lib.diff_text import open_diff

    kept: dict[str, KeptDiff] = {}
    for tree, state in (("suite", git.suite), ("agent", git.agent)):
        if state and state.diff:
            path = record.with_name(f"{record.stem}_{tree}.diff")
            cut = f"\n# cut after {len(state.diff)} bytes: there was more\n" if state.is_cut else ""
            text, left_out = open_diff(state.diff.decode("utf-8", "replace"), plan.secret_values)
            if text or cut:
                write_atomically(path, text + cut, 0o600)
            named = {"diff": path.name if text or cut else None}
            kept[tree] = {**named, "left_out": left_out} if left_out else named
    return kept


def secrets_of(directory: CoordinationDir, job_id: str) -> Path:
    """The secrets of a job that joined the run in a directory."""
    return directory.path / f"secrets_{job_id}.json"


def copy_code(checkout: Path, target: Path) -> bool:
    """Copy the suite's own code, so that an upgrade of the checkout does not change queued jobs; False if it is there.

    A copy that fails leaves nothing, which the next launch would take for the whole.
    """
    if target.exists():
        return False
    # A user's own .conf beside ours may hold a key; redacted copies of those in use lie in the run's directory.
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.conf")
    try:
        target.mkdir(mode=0o700)
    except FileExistsError:  # another launch was faster
        return False
    except OSError as problem:
        raise EnvironmentProblem(f"cannot make {target}: {problem.strerror}") from None
    try:
        for name in CODE_PARTS:
            source = checkout / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=ignored)
            elif source.is_file():
                shutil.copy2(source, target / name)
    except (OSError, shutil.Error) as problem:
        shutil.rmtree(target, ignore_errors=True)
        raise EnvironmentProblem(f"cannot copy the code into {target}: {problem}") from None
    return True


def copy_confs(directory: CoordinationDir, plan: LaunchPlan, added: list[Path]) -> None:
    """Copies of the .conf files beside the record, secrets left out; equal names get a number. Adds the copies."""
    from slurm.lib.secrets import redact_conf

    for path in plan.config.files:
        target = directory.path / path.name
        number = 1
        while target.exists():
            number += 1
            target = directory.path / f"{path.stem}.{number}{path.suffix}"
        text = path.read_text(encoding="utf-8", errors="replace")
        write_atomically(target, redact_conf(text, plan.secret_values))
        added.append(target)


def read_secrets(directory: CoordinationDir, job_id: str) -> dict[str, str]:
    """The secrets of a run by name, over them those that came with this job alone; empty where there are none."""
    return {**_read_secrets(directory.secrets), **_read_secrets(secrets_of(directory, job_id))}


def await_secrets(path: Path, still_possible: Callable[[], None], sleep: Callable[[float], None]) -> None:
    """Wait for a job's file of secrets, which its launch has written: without it another key would be used, or none."""
    from slurm.lib.waiting import wait_for

    try:
        wait_for(
            f"{path} to be seen on {host_name()}",
            lambda: is_listed(path) or None,
            LATE_S,
            still_possible=still_possible,
            sleep=sleep,
        )
    except WaitTimeout as problem:
        raise EnvironmentProblem(
            f"{problem}: the launch has put this run's secrets there; was it removed, or is the storage not well?"
        ) from None


def _read_secrets(path: Path) -> dict[str, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as problem:
        raise EnvironmentProblem(f"cannot read {path}: {problem}") from None
    if not isinstance(data, dict) or not all(map(_is_variable, data, data.values())):
        raise EnvironmentProblem(f"cannot read {path}: it holds no names with their values")
    return data


def _is_variable(name: str, value: object) -> bool:
    """Whether an environment can hold this."""
    return bool(name) and not {"=", "\0"} & set(name) and isinstance(value, str) and "\0" not in value


def record_paths(directory: CoordinationDir) -> list[Path]:
    """The records of a directory: ``run.json`` of the launch that made it, ``run_<id>.json`` of jobs that joined."""
    try:
        joined = sorted(directory.path.glob("run_*.json"), key=lambda path: (len(path.name), path.name))
        return [path for path in [directory.run_record, *joined] if path.is_file()]
    except OSError:  # a file server that stumbles says nothing of the records
        return []


def read_jobs(directory: CoordinationDir) -> dict[str, str]:
    """The ids of a run's jobs by kind; of several that joined the last one. Empty where there is no record."""
    jobs: dict[str, str] = {}
    for path in record_paths(directory):
        jobs |= recorded_jobs(path)
    return jobs


def partner_of(directory: CoordinationDir, kind: str, job_id: str) -> str | None:
    """The id of the other job of the pair that a runtime or training job belongs to; None while there is none.

    The one that was recorded with it, else the last that was recorded alone. Other attempts at the run are other pairs.
    """
    return partner_and_bond(directory, kind, job_id)[0]


def partner_and_bond(directory: CoordinationDir, kind: str, job_id: str) -> tuple[str | None, bool]:
    """The same, and whether the two were launched together: then no job that joins takes its place."""
    other = _OTHER[kind]
    recorded = list(map(recorded_jobs, record_paths(directory)))
    together = _together(recorded, kind, job_id)
    alone = [jobs[other] for jobs in recorded if other in jobs and kind not in jobs]
    return together or (alone[-1] if alone else None), together is not None


def recorded_with(directory: CoordinationDir, kind: str, job_id: str) -> str | None:
    """The id of the job that was launched together with this one; None for a job that was launched alone."""
    return _together(map(recorded_jobs, record_paths(directory)), kind, job_id)


def _together(recorded: Iterable[Mapping[str, str]], kind: str, job_id: str) -> str | None:
    other = _OTHER[kind]
    return next((jobs[other] for jobs in recorded if other in jobs and jobs.get(kind) == job_id), None)


def recorded_jobs(path: Path) -> dict[str, str]:
    """The ids of the jobs by kind in one record; empty for one that is half-written, or none of ours."""
    return job_ids(read_record(path).get("jobs"))


_JOB_ID = re.compile(r"\w[\w.+]*", re.ASCII)  # no option of a command, and no list of several


def job_ids(jobs: object) -> dict[str, str]:
    """The ids by kind in what a record says of jobs; without what is none of ours, as in a record that is foreign."""
    named = jobs.items() if isinstance(jobs, Mapping) else ()
    ids = {kind: job.get("id") if isinstance(job, Mapping) else job for kind, job in named}
    texts = {kind: str(job_id) for kind, job_id in ids.items() if type(job_id) in {str, int}}
    return {kind: job_id for kind, job_id in texts.items() if kind in _NAMES and _JOB_ID.fullmatch(job_id)}


@dataclass(frozen=True)
class WorkerArray:
    """A job array of a runtime's further nodes: its kind, ``workers`` or ``more_workers``, id, and tasks' numbers."""

    kind: str
    job_id: str
    tasks: tuple[int, ...]

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The ids of its tasks, ``124_1``, which are those of the workers."""
        return tuple(f"{self.job_id}_{task}" for task in self.tasks)


def worker_arrays(jobs: object) -> tuple[WorkerArray, ...]:
    """The worker arrays in what a record says of jobs; without what is none of ours."""
    named = jobs if isinstance(jobs, Mapping) else {}
    found = (_worker_array(kind, named.get(kind)) for kind in WORKER_KINDS)
    return tuple(array for array in found if array)


def _worker_array(kind: str, said: object) -> WorkerArray | None:
    job_id, tasks = (said.get("id"), said.get("tasks")) if isinstance(said, Mapping) else (None, None)
    if not isinstance(job_id, str) or not re.fullmatch(r"\d+", job_id, re.ASCII) or not isinstance(tasks, list):
        return None
    numbers = tuple(task for task in tasks if type(task) is int and task >= 0)
    return WorkerArray(kind, job_id, numbers) if numbers else None


def recorded_settings(directory: CoordinationDir) -> dict[str, str]:
    """The settings of a run by its record, without secrets; empty where there is none."""
    said = read_record(directory.run_record).get("settings")
    return (
        {str(name): value for name, value in said.items() if isinstance(value, str)} if isinstance(said, dict) else {}
    )


def join_worker(directory: CoordinationDir, job_id: str, launched: bool) -> None:
    """Record a worker that a person gave to sbatch; those of a launch are recorded, and a step is its job's."""
    array, _, task = job_id.partition("_")
    if launched:
        return
    worker = {WORKERS: {"id": array, "name": WORKER_NAME, "tasks": [int(task)]}}
    data = {"schema": SCHEMA, "created": utc_now(), "jobs": worker}
    write_atomically(directory.path / f"run_{job_id}.json", json.dumps(data, indent=2) + "\n")


def workers_of(directory: CoordinationDir, runtime_job_id: str) -> tuple[WorkerArray, ...]:
    """The worker arrays that were launched together with a runtime job; those of other attempts are other runtimes'."""
    records = (read_record(path).get("jobs") for path in record_paths(directory))
    return next((worker_arrays(jobs) for jobs in records if job_ids(jobs).get("runtime") == runtime_job_id), ())


def read_record(path: Path) -> dict[str, Any]:
    """What a file holds that a listing has just shown; nothing where it cannot be read, or holds no JSON object."""
    try:
        return parse_object(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def recorded_git(directory: CoordinationDir) -> Provenance:
    """What the run was launched from, as its record has it, for a record of jobs that go on with it."""
    from slurm.lib.git import GitState

    recorded = read_record(directory.run_record)
    suite, agent = (_recorded_state(recorded.get(name)) for name in ("git", "agent_git"))
    return Provenance(suite or GitState(None, None), agent)


def _recorded_state(said: object) -> GitState | None:
    from slurm.lib.git import GitState

    return GitState(said.get("commit"), said.get("dirty"), said.get("branch")) if isinstance(said, dict) else None


def join(directory: CoordinationDir, kind: str, job_id: str, launched: bool) -> None:
    """Record a job that is in no record yet, so that its partner can look it up.

    The record of a run that was ``launched`` is never written here: it may only be late.
    """
    if any(recorded_jobs(path).get(kind) == job_id for path in record_paths(directory)):
        return
    data = {"schema": SCHEMA, "created": utc_now(), "jobs": {kind: {"id": job_id, "name": _NAMES[kind]}}}
    beside = launched or directory.run_record.exists()
    path = directory.path / f"run_{job_id}.json" if beside else directory.run_record
    write_atomically(path, json.dumps(data, indent=2) + "\n")
