"""The further nodes of a runtime job with RUNTIME_MODE=allocation: on each of them a job step that runs a worker.

They join the job's head like the workers of an array, by what stands in the run's directory. A step's standard input is
the string by which it is held: when it closes, the worker ends. A step that ends by itself is a lost node and not the
job's end; the head is told at once.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import quote

from slurm.lib.api_server_child import ApiServer, available_cpus
from slurm.lib.coordination import tail_if_there
from slurm.lib.job_context import JobContext
from slurm.lib.job_environment import CONTRADICTING_PREFIXES
from slurm.lib.logs import log
from slurm.lib.lookout import Lookout
from slurm.lib.plan import WORKER_STEP
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.runtime_client import RuntimeClient
from slurm.lib.scheduler import Slurm, node_step_argv
from slurm.lib.secrets import is_secret_name
from slurm.lib.worker_plan import has_arrays, has_head

LOOK_EVERY_S = 0.5
TELL_S = 5.0  # the head, that a node is lost
IN_ORDER_S = 6.0  # from the end of the run to that of a worker's body, where Slurm's KillWait is not shorter
STEP_END_S = 2.0  # from that to the end of its srun
LAST_WORDS, SHOWN_LOG_LINES = 4096, 2


@dataclass
class WorkerStep:
    """One node's worker: ``worker`` is its id, which its log and its other files are named after."""

    node: str
    worker: str
    child: Child
    log: Path
    is_told: bool = False

    def ended(self) -> str | None:
        """How it has ended, with the end of its log; None while it runs."""
        code = self.child.exit_code
        if code is None:
            return None
        lines = tail_if_there(self.log, LAST_WORDS).strip().splitlines()[-SHOWN_LOG_LINES:]
        return f"its step has ended with exit code {code}{': ' if lines else ''}{' | '.join(lines)}"


@dataclass
class WorkerSteps:
    """The steps of a job; none where it has one node, or where its further nodes are jobs of their own."""

    steps: list[WorkerStep] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [step.node for step in self.steps]

    def living(self) -> tuple[str, ...]:
        """The nodes whose steps run."""
        return tuple(step.node for step in self.steps if step.child.exit_code is None)

    @contextlib.contextmanager
    def watched(self, head: ApiServer) -> Iterator[None]:
        """A step that ends during the block is told to the head, as the reason why its node is lost."""
        with Lookout(lambda: self.tell(head), LOOK_EVERY_S) if self.steps else contextlib.nullcontext():
            yield

    def tell(self, head: ApiServer) -> None:
        """Tell the head, and the log, of the steps that have ended since the last time."""
        for step in self.steps:
            why = None if step.is_told else step.ended()
            if why is None:
                continue
            step.is_told = True
            log.error("the worker on %s was lost: %s; its sandboxes are failed, the others go on", step.node, why)
            path = f"/nodes/{quote(step.node, safe='')}?reason={quote(why, safe='')}"
            RuntimeClient(head.local_url, head.key).ask("DELETE", path, TELL_S)

    def let_go(self) -> None:
        """Have all of them end, at the same time, and wait for none."""
        for step in self.steps:
            step.is_told = True
            with contextlib.suppress(OSError):
                assert step.child.process.stdin
                step.child.process.stdin.close()

    def stop(self, seconds: float) -> None:
        """Have all of them end; kill what has not after so many seconds."""
        self.let_go()
        end = time.monotonic() + seconds
        for step in self.steps:
            if not step.child.wait(max(0.0, end - time.monotonic())):
                log.warning("the worker on %s does not end; killing its step", step.node)
        for step in self.steps:
            step.child.stop()


@contextlib.contextmanager
def worker_steps(job: JobContext) -> Iterator[WorkerSteps]:
    """A step on each further node of the job, started; ended at the end of the block."""
    steps = WorkerSteps()
    if not has_head(job.settings) or has_arrays(job.settings):
        yield steps
        return
    slurm = Slurm(job.environment)
    own = job.environment.get("SLURMD_NODENAME", "")
    nodes = [node for node in slurm.hostnames(job.environment.get("SLURM_JOB_NODELIST", "")) if node != own]
    kill_wait_s = slurm.kill_wait_s()  # now: at the end there may be no time to wait for Slurm's answer
    with contextlib.ExitStack() as stack:
        stack.callback(steps.stop, min(kill_wait_s, IN_ORDER_S) + STEP_END_S)
        for number, node in enumerate(nodes, 1):
            steps.steps.append(start(job, node, f"{job.job_id}_{number}"))
        log.info("starting workers on %s", ", ".join(nodes) or "no further node: Slurm gave this job one")
        yield steps


def start(job: JobContext, node: str, worker: str) -> WorkerStep:
    """Start the worker of a node."""
    out, err = (job.directory.log("worker", worker, suffix) for suffix in ("out", "err"))
    with out.open("ab") as to_out, err.open("ab") as to_err:
        child = Child(child_spec(job, node, worker, to_out, to_err), stop_grace_s=STEP_END_S)
    return WorkerStep(node, worker, child, err)


def child_spec(job: JobContext, node: str, worker: str, out: IO[bytes], err: IO[bytes]) -> ChildSpec:
    """The process that holds a step.

    It does not die with this job's body, whose end is the end of the job: Slurm then ends the step, by SIGTERM first,
    and srun ends with its step. Of an srun that is killed the step is killed at once.
    """
    script = str(job.code / "slurm" / "jobs" / "runtime_worker.py")
    argv = node_step_argv(
        node, cpus=available_cpus(job.settings), name="skyrl-worker", cwd=job.code, command=(sys.executable, script)
    )
    return ChildSpec(
        argv,
        step_environment(job, worker),
        f"the worker's step on {node}",
        stdin_pipe=True,
        stdout=out,
        stderr=err,
        death_signal=0,
    )


def step_environment(job: JobContext, worker: str) -> Mapping[str, str]:
    """What a worker is started with: this job's environment without secrets, which it reads where this job has."""
    everything = {**job.environment, **job.settings.as_environment()}
    open_ones = {name: value for name, value in everything.items() if not is_secret_name(name)}
    kept = {name: value for name, value in open_ones.items() if not name.startswith(CONTRADICTING_PREFIXES)}
    own = {
        WORKER_STEP: job.job_id,
        "SKYRL_JOB_ID": worker,
        "SKYRL_RUNTIME_JOB_ID": job.job_id,
        "SKYRL_COORD_DIR": str(job.directory.path),
    }
    return {**kept, **own}
