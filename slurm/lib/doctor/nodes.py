"""Who looks at the nodes for the doctor: a small Slurm job for each partition, or a process of this host.

All of them end with the ``with`` block, whatever ends it; if the doctor is killed, they end by their own clock.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from slurm.lib.doctor.exchange import log_file
from slurm.lib.logs import log
from slurm.lib.plan import SBATCH, runtime_options, training_options
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.scheduler import JobState, JobStatus, Slurm
from slurm.lib.settings import Settings

MODULE = "slurm.lib.doctor.node"
LOOK_S = 120  # seconds that one look may take once its job runs
END_S = 15.0  # a cancelled job has so long to go
SLACK_S = 60
CPUS, MEMORY, TRAINER_MEMORY = 2, "1G", "1G"
ASK_S = 5.0


@dataclass(frozen=True)
class Wanted:
    """A node to look at: by a job of ``kind`` on ``partition``, empty for this host."""

    name: str
    kind: str
    partition: str = ""

    @property
    def place(self) -> str:
        """Where it is, for people; the node's name comes first once it is known."""
        return f"partition {self.partition}, as the {self.kind} job" if self.partition else "this host"


def wanted_nodes(settings: Settings) -> list[Wanted]:
    """One for each partition of each job; this host where nothing goes to Slurm."""
    if settings.skyrl_backend == "local":
        return [Wanted("local", "local")]
    kinds = {"runtime": settings.cpu_partition, "training": settings.gpu_partition}
    pairs = [(kind, name) for kind, names in kinds.items() for name in dict.fromkeys(names.split(",")) if name]
    return [Wanted(f"{kind}-{number}", kind, name) for number, (kind, name) in enumerate(pairs)]


class Nodes(Protocol):
    """Who starts and ends them."""

    def start(self, wanted: Wanted) -> str: ...

    def statuses(self, job_ids: Sequence[str]) -> Mapping[str, JobStatus]: ...

    def cancel(self, job_ids: Sequence[str]) -> str | None: ...


@dataclass(frozen=True)
class Command:
    """What is started on a node: ``python`` with the code of ``checkout``, which works in ``folder``."""

    python: str
    checkout: Path
    folder: Path

    def words(self, name: str) -> tuple[str, ...]:
        return (self.python, "-m", MODULE, str(self.folder), name)


def job_argv(wanted: Wanted, settings: Settings, command: Command, wait_s: float) -> tuple[str, ...]:
    """The submission: small and short, whatever *_SBATCH_ARGS say, and gone from the queue if it does not start."""
    minutes = math.ceil((wait_s + LOOK_S + SLACK_S) / 60)
    small = replace(
        settings,
        cpus_for_runtime=CPUS,
        runtime_memory=MEMORY,
        training_cpus=1,
        training_memory=TRAINER_MEMORY,
        gpu_nodes=1,
        gpus_per_node=min(1, settings.gpus_per_node),
        restarts=0,
    )
    options = runtime_options(small) if wanted.kind == "runtime" else training_options(small)
    ours = (
        f"--partition={wanted.partition}",
        f"--time={minutes}",
        f"--deadline=now+{round(wait_s) + minutes * 60 + SLACK_S}",
        "--job-name=skyrl-doctor",
        f"--output={str(log_file(command.folder, wanted.name)).replace('%', '%%')}",
        "--open-mode=truncate",
    )
    checkout = shlex.quote(str(command.checkout))  # where Python looks first, not where a person stands
    line = f"cd {checkout} && PYTHONPATH={checkout} exec {shlex.join(command.words(wanted.name))}"
    return (*SBATCH, *options, *ours, f"--wrap={line}")


@dataclass(frozen=True)
class SlurmNodes:
    """By jobs."""

    slurm: Slurm
    settings: Settings
    command: Command
    wait_s: float

    def start(self, wanted: Wanted) -> str:
        return self.slurm.submit(job_argv(wanted, self.settings, self.command, self.wait_s))

    def statuses(self, job_ids: Sequence[str]) -> Mapping[str, JobStatus]:
        return self.slurm.statuses(job_ids, timeout_s=ASK_S)

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        return self.slurm.cancel(job_ids, timeout_s=ASK_S)


class OwnHost:
    """By a process of this host."""

    def __init__(self, command: Command, environment: Mapping[str, str]) -> None:
        self._command = command
        self._environment = {**environment, "PYTHONPATH": str(command.checkout)}
        self._children: dict[str, Child] = {}

    def start(self, wanted: Wanted) -> str:
        with log_file(self._command.folder, wanted.name).open("wb") as out:
            words = self._command.words(wanted.name)
            spec = ChildSpec(
                words,
                self._environment,
                "the look at this host",
                cwd=self._command.checkout,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            child = Child(spec)
        self._children[str(child.pid)] = child
        return str(child.pid)

    def statuses(self, job_ids: Sequence[str]) -> Mapping[str, JobStatus]:
        return {job_id: self._status(self._children[job_id].exit_code) for job_id in job_ids}

    @staticmethod
    def _status(code: int | None) -> JobStatus:
        if code is None:
            return JobStatus(JobState.RUNNING, "RUNNING")
        return JobStatus(JobState.ENDED_BADLY if code else JobState.ENDED_WELL, f"exit code {code}")

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        for job_id in job_ids:
            self._children[job_id].stop(END_S / 2)
        return None


@contextlib.contextmanager
def ended_afterwards(nodes: Nodes, job_ids: list[str]) -> Iterator[None]:
    """Whatever is in ``job_ids`` at the end of the block has ended, or it is said that it may not have."""
    try:
        yield
    finally:
        end_all(nodes, list(job_ids))


def end_all(nodes: Nodes, job_ids: Sequence[str]) -> None:
    """Cancel what has not ended, and wait for its end."""
    left = not_ended(nodes, job_ids)
    complaint = nodes.cancel(left) if left else None
    end = time.monotonic() + END_S
    while (left := not_ended(nodes, left)) and time.monotonic() < end:
        time.sleep(0.2)
    if left:
        said = f" ({complaint})" if complaint else ""
        log.warning(
            "not seen to end: job %s%s; it ends by itself within minutes, or: scancel %s",
            ", ".join(left),
            said,
            " ".join(left),
        )


def not_ended(nodes: Nodes, job_ids: Sequence[str]) -> list[str]:
    """Those that have not ended as far as is known."""
    if not job_ids:
        return []
    statuses = nodes.statuses(job_ids)
    return [job_id for job_id in job_ids if not statuses[job_id].state.is_final]
