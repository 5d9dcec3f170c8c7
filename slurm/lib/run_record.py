"""What a run leaves to be read later: ``run.json``, copies of its .conf files, the code it runs; no secret in any."""

from __future__ import annotations

import contextlib
import getpass
import json
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.coordination import CoordinationDir, utc_now, write_atomically
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.plan import LaunchPlan
from slurm.lib.secrets import mask_values, masked, redact_conf

SCHEMA = 1
CODE_PARTS = ("slurm", "slurm_runtime", "shell_rl", "pyproject.toml")


@dataclass(frozen=True)
class GitState:
    """The commit that the code was launched from; None outside a checkout."""

    commit: str | None
    dirty: bool | None


def parse_git_status(text: str) -> GitState:
    """From ``git status --porcelain=v2 --branch``."""
    lines = text.splitlines()
    commits = [line.split(" ", 2)[2] for line in lines if line.startswith("# branch.oid ")]
    return GitState(commits[0] if commits else None, any(not line.startswith("#") for line in lines))


def git_state(checkout: Path) -> GitState:
    """The state of a checkout, or nothing known where git is missing or slow."""
    import sh  # 80 ms, so only where it is used

    try:
        text = sh.git("-C", str(checkout), "status", "--porcelain=v2", "--branch", _timeout=10, _tty_out=False)
    except (sh.CommandNotFound, sh.ErrorReturnCode, sh.TimeoutException):
        return GitState(None, None)
    return parse_git_status(str(text))


def record(plan: LaunchPlan, jobs: Mapping[str, str], git: GitState, python: str) -> dict[str, object]:
    """The contents of ``run.json``."""
    settings = masked(plan.settings.as_environment())
    return {
        "schema": SCHEMA,
        "created": utc_now(),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "git": {"commit": git.commit, "dirty": git.dirty},
        "interpreter": python,
        "config_files": [str(path) for path in plan.config.files],
        "settings": {name: value for name, value in settings.items() if name not in plan.secrets},
        "sources": dict(plan.config.sources),
        "jobs": {kind: {"id": job_id, "name": _NAMES[kind]} for kind, job_id in jobs.items()},
    }


_NAMES = {"runtime": "skyrl-runtime", "training": "skyrl-train"}


def record_text(plan: LaunchPlan, jobs: Mapping[str, str], git: GitState, python: str) -> str:
    """``run.json`` as text, with every secret value masked wherever it stands."""
    text = json.dumps(record(plan, jobs, git, python), indent=2, sort_keys=True)
    return mask_values(text, frozenset(plan.secrets.values())) + "\n"


def furnish(
    directory: CoordinationDir, plan: LaunchPlan, jobs: Mapping[str, str], git: GitState, checkout: Path
) -> None:
    """Fill the run's directory: code, .conf copies, secrets, and last the record, which says it is complete."""
    copy_code(checkout, directory.code)
    copy_confs(directory, plan)
    if plan.secrets and not directory.secrets.exists():
        write_atomically(directory.secrets, json.dumps(dict(plan.secrets)), 0o600)
    python = (plan.runtime or plan.training or plan.jobs[0]).environment["SKYRL_PYTHON"]
    first = next(iter(jobs.values()))
    path = directory.path / f"run_{first}.json" if directory.run_record.exists() else directory.run_record
    write_atomically(path, record_text(plan, jobs, git, python))


def copy_code(checkout: Path, target: Path) -> None:
    """Copy the suite's own code, so that an upgrade of the checkout does not change queued jobs."""
    if target.exists():
        return
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    try:
        target.mkdir(mode=0o700)
        for name in CODE_PARTS:
            source = checkout / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=ignored)
            elif source.is_file():
                shutil.copy2(source, target / name)
    except (OSError, shutil.Error) as problem:
        raise EnvironmentProblem(f"cannot copy the code into {target}: {problem}") from None


def copy_confs(directory: CoordinationDir, plan: LaunchPlan) -> None:
    """Copies of the .conf files beside the record, secrets left out; equal names get a number."""
    for path in plan.config.files:
        target = directory.path / path.name
        number = 1
        while target.exists():
            number += 1
            target = directory.path / f"{path.stem}.{number}{path.suffix}"
        text = path.read_text(encoding="utf-8", errors="replace")
        write_atomically(target, redact_conf(text, frozenset(plan.secrets.values())))


def read_secrets(directory: CoordinationDir) -> dict[str, str]:
    """The secrets of a run, by name; empty where there are none."""
    try:
        data = json.loads(directory.secrets.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        raise EnvironmentProblem(f"cannot read {directory.secrets}: {problem}") from None
    return {str(name): str(value) for name, value in data.items()}


def record_paths(directory: CoordinationDir) -> list[Path]:
    """The records of a directory: ``run.json`` of the launch that made it, ``run_<id>.json`` of jobs that joined."""
    return [path for path in [directory.run_record, *sorted(directory.path.glob("run_*.json"))] if path.is_file()]


def read_jobs(directory: CoordinationDir) -> dict[str, str]:
    """The ids of a run's jobs by kind; of several that joined the last one. Empty where there is no record."""
    jobs: dict[str, str] = {}
    for path in record_paths(directory):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            data = json.loads(path.read_text(encoding="utf-8"))
            jobs |= {kind: str(job["id"]) for kind, job in data["jobs"].items()}
    return jobs


def join(directory: CoordinationDir, kind: str, job_id: str) -> None:
    """Record a job that was submitted directly, so that its partner can look it up."""
    if read_jobs(directory).get(kind) == job_id:
        return
    data = {"schema": SCHEMA, "created": utc_now(), "jobs": {kind: {"id": job_id, "name": _NAMES[kind]}}}
    path = directory.path / f"run_{job_id}.json" if directory.run_record.exists() else directory.run_record
    write_atomically(path, json.dumps(data, indent=2) + "\n")
