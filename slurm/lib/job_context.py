"""What both job bodies begin with: who am I, where do we meet, what was asked for."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from slurm.lib.config import Check, LoadedConfig, load_config
from slurm.lib.coordination import AGENT, STAMP_FORMAT, CoordinationDir, Flag, make_run_dir
from slurm.lib.errors import EXIT_INTERNAL, EXIT_SIGNAL_BASE, EnvironmentProblem, SuiteError, UsageError
from slurm.lib.interpreter import MARK_NAME, changes, mark
from slurm.lib.job_arrays import is_task
from slurm.lib.launch_mark import PREFIX
from slurm.lib.logs import flush_or_give_up, log, setup_job_logging
from slurm.lib.plan import AGENT_COPY, SECRETS_FILE, WORKER_STEP
from slurm.lib.run_record import await_secrets, join, join_worker, read_jobs, read_secrets, recorded_settings
from slurm.lib.scheduler import LocalJobs, Scheduler, Slurm
from slurm.lib.secrets import is_secret_name
from slurm.lib.settings import Settings, contradictions
from slurm.lib.signals import Interrupted, SignalNotes, noted_signals
from slurm.lib.under_way import end_those_of_other_threads

LOCAL_JOBS_NAME = "SKYRL_LOCAL_JOBS"


@dataclass(frozen=True)
class JobContext:
    """A running job: its id, its coordination directory, its settings, its environment with the run's secrets.

    ``own_dir`` is true where the directory was made for this attempt, so that all in it belongs to it.
    """

    job_id: str
    directory: CoordinationDir
    settings: Settings
    environment: Mapping[str, str]
    scheduler: Scheduler
    code: Path
    own_dir: bool

    @property
    def open_environment(self) -> dict[str, str]:
        """The environment without secrets, for processes that need none: Podman and the API server."""
        return {name: value for name, value in self.environment.items() if not is_secret_name(name)}

    @property
    def was_launched(self) -> bool:
        """Whether launch.py brought this job, and all that it makes; not so for one given to sbatch directly."""
        return was_launched(self.environment)

    @property
    def is_local(self) -> bool:
        return isinstance(self.scheduler, LocalJobs)


def was_launched(environment: Mapping[str, str]) -> bool:
    """Whether launch.py made this environment: it alone says where the run's copy of the code is."""
    return bool(environment.get("SKYRL_CODE_DIR"))


def own_job_id(environment: Mapping[str, str], kind: str = "") -> str:
    """Slurm's id of this job; for a process that Slurm did not start, one made of host and pid.

    A worker in an array is called ``124_1``, by which people, and the runtime job, know it.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    if kind == "worker" and array and task and not environment.get(WORKER_STEP):
        return f"{array}_{task}"
    return environment.get("SKYRL_JOB_ID") or environment.get("SLURM_JOB_ID") or f"pid{os.getpid()}"


def code_folder() -> Path:
    """The folder that this code runs from: the run's own copy, or a checkout."""
    return Path(__file__).resolve().parent.parent.parent


def load_job_config(
    config: str | None, overrides: Sequence[str], environment: Mapping[str, str], check: Check = contradictions
) -> LoadedConfig:
    """The settings of a job: --config and --set where given, else what launch.py put into the environment."""
    code = code_folder()
    checkout = Path(environment.get("SKYRL_CHECKOUT") or code)
    folder = code / "slurm" / "config"
    return load_config(config, overrides, environment, folder, datetime.now(), checkout.parent, contradictions=check)


def context(
    kind: str,
    config: str | None,
    overrides: Sequence[str],
    coord_dir: str | None,
    environment: Mapping[str, str],
    notes: SignalNotes,
) -> JobContext:
    """The context of the job that this process is the body of."""
    job_id = own_job_id(environment, kind)
    launched = was_launched(environment)
    named = coord_dir or environment.get("SKYRL_COORD_DIR", "").replace("%j", job_id) or None
    secrets = _secrets(CoordinationDir(Path(named)), job_id, environment, notes) if named else {}
    if kind == "worker" and named:  # one that was given to sbatch knows nothing else of the run
        environment = {**recorded_settings(CoordinationDir(Path(named))), **environment}
    loaded = load_job_config(config, overrides, {**secrets, **environment})
    if rebuilt := ", ".join(changes(environment.get(MARK_NAME, ""), mark())):
        log.warning("the environment of %s was rebuilt since this job was submitted: %s", sys.executable, rebuilt)
    for warning in loaded.warnings:
        log.debug("%s", warning)
    if kind == "worker" and not named:
        raise UsageError("a worker joins a run: set SKYRL_COORD_DIR to the directory of one with RUNTIME_NODES")
    if kind == "worker" and not is_task(job_id):
        raise UsageError("a worker is a task of a job array: submit it with sbatch --array=1-N")
    directory = _existing(named) if named else _made(loaded.settings, job_id)
    directory = replace(directory, agent_name=environment.get(AGENT_COPY, AGENT).replace("%j", job_id))
    scheduler = _scheduler(environment)
    # A launch recorded its jobs; one that joins does so late, and may have been killed.
    is_step = WORKER_STEP in environment  # of a job that is recorded, and has opened its log
    if kind == "worker" and not is_step:
        join_worker(directory, job_id, launched)
    elif kind != "worker":
        join(directory, kind, job_id, launched)
    if not (launched or is_step):
        _link_logs(kind, job_id, directory, scheduler)
    return JobContext(
        job_id=job_id,
        directory=directory,
        settings=loaded.settings,
        environment={**environment, **loaded.exported, **secrets},
        scheduler=scheduler,
        code=code_folder(),
        own_dir=launched or not named,
    )


def _secrets(
    directory: CoordinationDir, job_id: str, environment: Mapping[str, str], notes: SignalNotes
) -> dict[str, str]:
    expected = environment.get(SECRETS_FILE, "").replace("%j", job_id)
    if expected:
        await_secrets(directory.path / expected, notes.check, notes.sleep)
    return read_secrets(directory, job_id)


def _scheduler(environment: Mapping[str, str]) -> Scheduler:
    local = environment.get(LOCAL_JOBS_NAME)
    return Slurm() if local is None else LocalJobs(Path(local))


def _existing(name: str) -> CoordinationDir:
    path = Path(name).absolute()
    if not path.is_dir():
        raise EnvironmentProblem(
            f"the coordination directory {path} does not exist on {socket.gethostname()}; the launch was taken back, "
            "or SKYRL_JOBS_BASE is not on storage that this node shares"
        )
    return CoordinationDir(path)


def _made(settings: Settings, job_id: str) -> CoordinationDir:
    """A directory of this job's own, for one that was submitted directly."""
    directory = make_run_dir(settings.skyrl_jobs_base / f"{time.strftime(STAMP_FORMAT)}_{job_id}")
    log.info("coordination directory: %s", directory.path)
    return directory


def _link_logs(kind: str, job_id: str, directory: CoordinationDir, scheduler: Scheduler) -> None:
    """For a job submitted directly, whose logs lie where its submitter's folder is: names where people look."""
    if not isinstance(scheduler, Slurm):
        return
    for field, suffix in (("StdOut", "out"), ("StdErr", "err")):
        target = scheduler.log_path(job_id, field)
        link = directory.log(kind, job_id, suffix)
        if target and not os.path.lexists(link):
            link.symlink_to(target)


def body_parser(kind: str, script: str) -> argparse.ArgumentParser:
    """The command line of a job script."""
    parser = argparse.ArgumentParser(prog=script, description=f"The {kind} job; submit it with sbatch.")
    parser.add_argument("--config", metavar="NAME|PATH", help="settings, as for launch.py")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="one setting; repeatable")
    parser.add_argument("--coord-dir", metavar="DIR", help="an existing coordination directory to meet in")
    return parser


def run_body(kind: str, script: str, argv: Sequence[str], run: Callable[[JobContext, SignalNotes], int]) -> int:
    """The edge of both job bodies: command line, logging, signals, context; returns the job's exit code."""
    arguments = body_parser(kind, script).parse_args(argv)
    setup_job_logging()
    with noted_signals() as notes:
        try:
            job = context(kind, arguments.config, arguments.set, arguments.coord_dir, dict(os.environ), notes)
            if job.settings.skyrl_debug:
                setup_job_logging(debug=True)
            return run(job, notes)
        except SuiteError as problem:
            log.error("%s", problem)
            tell_partner(kind, arguments.coord_dir, os.environ, str(problem), problem.exit_code)
            return problem.exit_code
        except Interrupted as stop:
            log.error("ended by %s before it began", stop)
            code = EXIT_SIGNAL_BASE + stop.number
            tell_partner(kind, arguments.coord_dir, os.environ, f"ended by {stop} before it began", code)
            return code
        except Exception as fault:  # the edge of the process: what no code of ours expected ends here
            log.exception("an internal error of the %s job", kind)
            words = f"an internal error of the {kind} job ({type(fault).__name__}: {fault}); see its .err"
            tell_partner(kind, arguments.coord_dir, os.environ, words, EXIT_INTERNAL)
            return EXIT_INTERNAL
        finally:
            end_those_of_other_threads()
            if complaint := flush_or_give_up():
                say_at_slurm(complaint, os.environ)


def say_at_slurm(complaint: str, environment: Mapping[str, str]) -> None:
    """Say in this job's comment why its log has no end; the one place left where a person may look."""
    scheduler = _scheduler(environment)
    if isinstance(scheduler, Slurm):
        scheduler.note(own_job_id(environment), f"{PREFIX} its log could not be written: {complaint}")


def tell_partner(kind: str, coord_dir: str | None, environment: Mapping[str, str], reason: str, exit_code: int) -> None:
    """Say in the coordination directory that this job could not begin, where that much is known.

    Not of a worker, whose end is not the run's.
    """
    if kind == "worker":
        return
    job_id = own_job_id(environment)
    path = Path(coord_dir or environment.get("SKYRL_COORD_DIR", "").replace("%j", job_id) or "/nonexistent")
    if not path.is_dir():
        return
    directory = CoordinationDir(path)
    runtime_id = job_id if kind == "runtime" else environment.get("SKYRL_RUNTIME_JOB_ID", "")
    runtime_id = runtime_id or read_jobs(directory).get("runtime", "")
    flag = Flag.of_this_host(job_id, runtime_id, exit_code, reason)
    with contextlib.suppress(EnvironmentProblem):  # it has been logged; the partner will notice the job's end
        directory.publish(directory.runtime_failed if kind == "runtime" else directory.training_complete, flag)
