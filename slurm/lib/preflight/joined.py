"""Is the runtime that a training job is to join there, alive, and does its server take the key?

A training job that waits for a runtime which has ended holds its GPUs. From a login node a compute node may be out of
reach, so that a server that does not answer here is only a warning; its answer, where there is one, counts.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slurm.lib.coordination import CoordinationDir, Flag, FlagReader
from slurm.lib.plan import LaunchPlan
from slurm.lib.preflight.finding import Finding, error, estimate, warning
from slurm.lib.run_record import record_paths
from slurm.lib.runtime_client import Answer, RuntimeClient, address_of
from slurm.lib.scheduler import JobState, JobStatus, LocalJobs, Slurm
from slurm.lib.settings import Settings
from slurm.lib.trainer import KEY_NAME

CHECK = "runtime"
REACH_S = 1.5  # two questions to the server and one to Slurm stay below the deadline of a check
SLURM_S = 5.0
ANOTHER = "start another with --runtime-only, and join that"
REFUSED = frozenset({401, 403})


@dataclass(frozen=True)
class JoinedFolder:
    """A coordination directory: whether it is one, its runtime job's id (empty: not recorded), that job's flags."""

    path: Path
    is_run: bool
    job_id: str = ""
    ready: Flag | None = None
    failed: Flag | None = None
    complete: Flag | None = None

    @property
    def ended(self) -> Finding | None:
        """What its flags say of its end; one that a person made may be left from another attempt, and says nothing."""
        for name, flag in (("training_complete.flag", self.complete), ("runtime_failed.flag", self.failed)):
            if flag is not None and not flag.by_hand:
                sentence = (
                    f"the runtime job {self.job_id or '(unknown)'} in {self.path} has ended ({name}: exit code "
                    f"{flag.exit_code}, {flag.reason})"
                )
                return error(CHECK, sentence, ANOTHER)
        return None


@dataclass(frozen=True)
class JoinedServer:
    """A runtime's server: its address, what it answered to ``/health``, and to the key (None: not asked)."""

    url: str
    health: Answer
    key: Answer | None = None


def look_at_folder(path: Path, job_id: str) -> JoinedFolder:
    """The flags that belong to the runtime job ``job_id``."""
    directory = CoordinationDir(path)

    def flag(file: Path) -> Flag | None:
        return FlagReader.of_new_directory(file, lambda found: found.runtime_job_id == job_id).read()

    is_run = bool(record_paths(directory)) or directory.runtime_ready.exists() or directory.runtime_url.exists()
    flags = map(flag, (directory.runtime_ready, directory.runtime_failed, directory.training_complete))
    return JoinedFolder(path, is_run, job_id, *flags)


def ask_server(url: str, key: str | None) -> JoinedServer:
    """Ask for its health, and with the key if it is well."""
    client = RuntimeClient(url, key)
    health = client.ask("GET", "/health", timeout_s=REACH_S)
    return JoinedServer(url, health, client.ask("GET", "/list", timeout_s=REACH_S) if health.ok else None)


def folder_findings(settings: Settings, folder: JoinedFolder) -> Iterator[Finding]:
    """Whether it is a run's, and whether that runtime has ended or is not ready yet."""
    if not folder.is_run:
        sentence = (
            f"SKYRL_COORD_DIR={folder.path} is no run's directory: no run.json, runtime_ready.flag, runtime_url.txt"
        )
        yield error(CHECK, sentence, "set it to the coordination directory that --runtime-only printed")
    elif folder.ended:
        yield folder.ended
    elif folder.ready is None:
        sentence = (
            f"the runtime job {folder.job_id or '(unknown)'} is not ready yet: a training job that starts now holds "
            f"its GPUs until it is, at most RUNTIME_READY_TIMEOUT={settings.runtime_ready_timeout} s"
        )
        yield warning(CHECK, sentence, f"launch when {folder.path}/runtime_ready.flag is there")


def job_findings(job_id: str, status: JobStatus) -> Iterator[Finding]:
    """What Slurm says about the runtime job."""
    if status.state.is_final:
        yield error(CHECK, f"the runtime job {job_id} has ended, by Slurm's word: {status}", ANOTHER)
    elif status.state is JobState.UNKNOWN:
        sentence = f"whether the runtime job {job_id} lives is not known: {status}"
        yield warning(CHECK, sentence, f"does `squeue -j {job_id}` answer?")


def server_findings(server: JoinedServer) -> Iterator[Finding]:
    """Whether it answers from here, and takes the key."""
    if address_of(server.url) is None:
        yield error(CHECK, f"the runtime's address is none: {server.url[:100]!r}", ANOTHER)
    elif not server.health.ok:
        sentence = f"the runtime at {server.url} does not answer here ({server.health.words})"
        quoted = shlex.quote(f"{server.url}/health")
        fix = f"fine if only GPU nodes reach it: try `curl {quoted}` on one; the job looks again"
        yield warning(CHECK, sentence, fix)
    elif server.key is not None and server.key.status in REFUSED:
        fix = "give its own, the runtime_api_key.txt of its run: --api-key-file FILE"
        yield error(CHECK, f"the runtime at {server.url} refused the key ({server.key.words})", fix)
    else:
        takes = " and takes the key" if server.key is not None and server.key.ok else ""
        yield estimate(CHECK, f"the runtime at {server.url} answers{takes}")


def restart_findings(settings: Settings) -> Iterator[Finding]:
    """A run is restarted as a pair of jobs that was launched together."""
    if settings.restarts:
        sentence = (
            f"RESTARTS={settings.restarts} has no effect: this job is not one of a pair that is launched together"
        )
        yield warning(CHECK, sentence, "leave RESTARTS unset, or launch both jobs (without --skip-runtime)")


def ended(plan: LaunchPlan) -> Finding | None:
    """What the flags say of the end of the runtime that a plan joins by its directory."""
    path = plan.request.attach_dir
    return look_at_folder(path, plan.request.attach_id).ended if path else None


def joined_findings(plan: LaunchPlan, slurm: Slurm) -> list[Finding]:
    """All of it, for a plan without a runtime job of its own; nothing is asked of a runtime that has ended."""
    settings, path = plan.settings, plan.request.attach_dir
    found = list(restart_findings(settings))
    if path is None:
        url = plan.request.runtime_url
        return [*found, *(server_findings(ask_server(url, plan.secrets.get(KEY_NAME))) if url else ())]
    folder = look_at_folder(path, plan.request.attach_id)
    found += folder_findings(settings, folder)
    if not folder.is_run or folder.ended:
        return found
    if folder.job_id:
        local = LocalJobs(path / "local_jobs.txt") if folder.job_id.startswith("local") else None
        status = local.status(folder.job_id) if local else slurm.status(folder.job_id, SLURM_S)
        found += job_findings(folder.job_id, status)
        if status.state.is_final:
            return found
    url = CoordinationDir(path).read_url() if folder.ready else None
    return [*found, *(server_findings(ask_server(url, CoordinationDir(path).read_key())) if url else ())]
