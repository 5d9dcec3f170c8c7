"""The runtime of a heterogeneous job (PAIRING=het): its body is a job step, which the training job starts and ends.

Slurm starts one batch script for all components of such a job, in the first, which is the training's. So the training's
first act is to start the runtime's body in the second component, by ``srun``. Its step is a further witness: Slurm
calls a component running for as long as the job runs, whatever became of what ran in it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slurm.lib.coordination import CoordinationDir, read_if_there
from slurm.lib.job_context import JobContext
from slurm.lib.job_environment import CONTRADICTING_PREFIXES, DEVICE_NAMES
from slurm.lib.logs import log
from slurm.lib.plan import AFTER
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.scheduler import Slurm, component_step_argv
from slurm.lib.settings import Settings

GROUP = 1  # the runtime's place in the job, counted from 0
FIRST_COMPONENT, COMPONENT_NAME = "SLURM_JOB_ID_HET_GROUP_0", f"SLURM_JOB_ID_HET_GROUP_{GROUP}"
CPUS_NAME = f"SLURM_CPUS_PER_TASK_HET_GROUP_{GROUP}"
SHOWN_LOG_LINES = 3
SIGNAL_SOON_S = 1.0  # from the end of a cancelled job's step to the signal that its batch script gets
# From the flag by which the runtime's body ends to the end of srun, beyond what the body itself takes (KillWait).
STEP_END_S = 2.0
# Its logs are opened on its own node: srun, which would write them, is the training's.
INTO_LOGS = 'exec "$@" >>"$0.out" 2>>"$0.err"'


def component_of(settings: Settings, environment: Mapping[str, str]) -> str:
    """The runtime's job id, where this training job is the first component of a heterogeneous job; else empty.

    Not where the names of components are another job's, from whose shell this one was submitted.
    """
    is_first = environment.get(FIRST_COMPONENT) == environment.get("SLURM_JOB_ID")
    return environment.get(COMPONENT_NAME, "") if settings.pairing == "het" and is_first else ""


def as_a_job_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The first component's environment with the names that Slurm gives a job of its own, such as SLURM_CPUS_PER_TASK.

    In a heterogeneous job's batch script some stand with the component's number alone (22.05).
    """
    end = "_HET_GROUP_0"
    own = {name[: -len(end)]: value for name, value in environment.items() if name.endswith(end)}
    return {**own, **environment}


def step_environment(base: Mapping[str, str], directory: Path, job_id: str) -> dict[str, str]:
    """What the runtime's body is started with: ``base``, the training's as Slurm gave it, less what is the training's.

    That is its GPUs, its sizes, which would contradict the step's, and the job that a restart waited for: whether it
    goes on is the training's to judge. SLURM_JOB_ID is the training's in every component.
    """
    alien = {*DEVICE_NAMES, AFTER}
    kept = {
        name: value for name, value in base.items() if name not in alien and not name.startswith(CONTRADICTING_PREFIXES)
    }
    return {**kept, "SKYRL_JOB_ID": job_id, "SKYRL_COORD_DIR": str(directory), "SKYRL_CODE_DIR": f"{directory}/code"}


def step_argv(job: JobContext, job_id: str, base: Mapping[str, str]) -> tuple[str, ...]:
    """The command that runs the runtime's body in its component; CPUs as the component has them."""
    cpus = base.get(CPUS_NAME, "")
    prefix = str(job.directory.log("runtime", job_id, "out").with_suffix(""))
    script = str(job.code / "slurm" / "jobs" / "runtime_server.py")
    command = ("bash", "-c", INTO_LOGS, prefix, sys.executable, script)
    asked = int(cpus) if cpus.isdigit() else job.settings.cpus_for_runtime
    return component_step_argv(GROUP, cpus=asked, name="skyrl-runtime", command=command)


@dataclass
class RuntimeStep:
    """The step of a run's runtime; with no ``child`` it is a job of its own, or none, and nothing is known here."""

    job_id: str = ""
    child: Child | None = None
    directory: CoordinationDir = field(default_factory=lambda: CoordinationDir(Path()))
    said: str = ""
    _seen_at: float | None = None

    @property
    def pids(self) -> set[int]:
        """The process that holds the step."""
        return {self.child.pid} if self.child else set()

    def note(self, line: bytes) -> None:
        """Take a line of srun's."""
        self.said = line.decode(errors="replace").strip()
        log.info("runtime's step: %s", self.said)

    def ended(self) -> str | None:
        """How it has ended, as a sentence, with srun's word about it; None while it runs."""
        if self.child is None or (code := self.child.exit_code) is None:
            return None
        said = f" ({self.said})" if self.said else ""
        return f"the runtime job {self.job_id} has ended: exit code {code} of its step{said}{self.last_words()}"

    def ended_by_itself(self) -> str | None:
        """The same once that is sure: of a job that is cancelled the step may go before this body gets its signal."""
        why = self.ended()
        if why is not None and self._seen_at is None:
            self._seen_at = time.monotonic()
        return why if self._seen_at is not None and time.monotonic() - self._seen_at >= SIGNAL_SOON_S else None

    def last_words(self) -> str:
        """The end of the runtime's log."""
        path = self.directory.log("runtime", self.job_id, "err")
        lines = (read_if_there(path) or "").strip().splitlines()[-SHOWN_LOG_LINES:]
        return f"; the end of {path}: {' | '.join(lines)}" if lines else ""

    def stop(self, slurm: Slurm, kill_wait_s: float) -> None:
        """See its end, which the completion flag has brought about: wait, ask, then kill what holds it.

        Its body ends in order within KillWait. What is left then ends with the job.
        """
        if self.child is None:
            return
        if not self.child.wait(kill_wait_s + STEP_END_S):
            log.warning("the runtime job %s has not ended by its flag; asking it by SIGTERM", self.job_id)
            slurm.end_steps(self.job_id)
        if self.child.wait(kill_wait_s + STEP_END_S):
            log.info("the runtime job %s has ended with exit code %s", self.job_id, self.child.exit_code)
        else:
            log.error("the runtime job %s does not end; leaving it to Slurm, which ends it with this job", self.job_id)


@contextlib.contextmanager
def runtime_step(job: JobContext) -> Iterator[RuntimeStep]:
    """The runtime's step for the length of the block; none where the runtime is not of this heterogeneous job.

    Its body ends by the run's completion flag, which should be written before the end of the block.
    """
    job_id = component_of(job.settings, job.environment)
    if not job_id:
        yield RuntimeStep()
        return
    log.info("starting the runtime job %s as the second component of this job", job_id)
    kill_wait_s = job.scheduler.kill_wait_s()  # now: at the end there may be no time to wait for Slurm's answer
    with Child(child_spec(job, job_id, os.environ)) as child:
        step = RuntimeStep(job_id, child, job.directory)
        child.copy_stderr(step.note)
        try:
            yield step
        finally:
            step.stop(Slurm(job.environment), kill_wait_s)


def child_spec(job: JobContext, job_id: str, base: Mapping[str, str]) -> ChildSpec:
    """The process that holds the step.

    It does not die with the training's body, whose end is the end of the job: Slurm then ends the step, by SIGTERM
    first, and srun ends with its step. Of an srun that is killed a process of its own remains (22.05), which has the
    step killed at once.
    """
    return ChildSpec(
        step_argv(job, job_id, base),
        step_environment(base, job.directory.path, job_id),
        "the runtime's step",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        death_signal=0,
    )
