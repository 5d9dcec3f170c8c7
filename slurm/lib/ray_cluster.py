"""Ray on all nodes of the training job: started before the trainer, complete before it begins, ended after it.

Each node's part is a job step that runs ``ray_node``; its standard input is the string by which it is held. A probe
beside the trainer asks Ray itself who is in the cluster. Two witnesses tell that a node was lost: its step has ended
(at once, for whatever ends with its processes), or Ray says so (a node that went silent, within about a minute).
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from slurm.lib.coordination import read_if_there
from slurm.lib.errors import EnvironmentProblem, WaitTimeout
from slurm.lib.guardian import Guardian
from slurm.lib.job_context import JobContext
from slurm.lib.job_environment import CONTRADICTING_PREFIXES
from slurm.lib.logs import log
from slurm.lib.node_environment import TrainerEnvironment
from slurm.lib.processes import Child, ChildSpec, copy_lines
from slurm.lib.ray_node import Announcement, NodeSpec, parse_announcement
from slurm.lib.ray_ports import DEFAULT_RANGE
from slurm.lib.ray_steps import node_step, ray_python, wanted
from slurm.lib.scheduler import Slurm
from slurm.lib.settings import Settings
from slurm.lib.trainer import TRAINER_MARKER, Trainer
from slurm.lib.waiting import wait_for

T = TypeVar("T")
LONGEST_GRACE_S = 5.0  # what gcs_server gets before it is killed; in an ordered end it needs less than a second
STEP_END_S = 2.0  # from the last process of a step to the end of its srun
SHOWN_LOG_LINES = 3


@dataclass(frozen=True)
class SeenNode:
    """A node as Ray shows it; ``name`` is Slurm's."""

    name: str
    alive: bool
    gpus: float


def parse_seen(line: bytes) -> tuple[SeenNode, ...] | None:
    """One line of the probe; None for anything else that a Python with Ray prints."""
    try:
        return tuple(SeenNode(str(n["name"]), bool(n["alive"]), float(n["gpus"])) for n in json.loads(line))
    except (ValueError, KeyError, TypeError):
        return None


def missing(names: Sequence[str], gpus: int, seen: Sequence[SeenNode]) -> list[str]:
    """What the cluster lacks, a clause for each node of the job; empty where it is complete."""
    found = {node.name: node for node in seen if node.alive}
    absent = [f"{name} is not in the cluster" for name in names if name not in found]
    fewer = [
        f"{name} has {found[name].gpus:g} of {gpus} GPUs" for name in names if name in found and found[name].gpus < gpus
    ]
    return absent + fewer


def grace_s(kill_wait_s: float) -> float:
    """Seconds that Ray gets to end in order: a quarter of what Slurm leaves a job that it cancels, at most 5."""
    return min(LONGEST_GRACE_S, kill_wait_s / 4)


def node_specs(
    settings: Settings, names: Sequence[str], job_id: str, interface: str, grace: float, integer_devices: bool
) -> list[NodeSpec]:
    """What each node is told; the first is the head."""
    ports = settings.ray_port_range or DEFAULT_RANGE
    scratch = str(settings.local_scratch or "")
    return [
        NodeSpec(
            job_id=job_id,
            node=name,
            rank=rank,
            python=ray_python(settings),
            cpus=settings.training_cpus,
            gpus=settings.gpus_per_node,
            peer=names[1] if rank == 0 and len(names) > 1 else "",
            interface=interface,
            ports=(ports.start, ports[-1]),
            scratch=scratch,
            grace_s=grace,
            integer_devices=integer_devices,
        )
        for rank, name in enumerate(names)
    ]


def head_first(names: Sequence[str], own: str) -> list[str]:
    """The job's nodes, with the one first on which the trainer runs: Ray's head is there."""
    return [own, *(name for name in names if name != own)] if own in names else list(names)


def shared_environment(base: Mapping[str, str], token: str) -> dict[str, str]:
    """What all of the run's Ray has in common: nothing is reported to Ray's makers, and strangers are turned away.

    Newer Ray asks whoever connects for a token, by default (2.60.0) one from a file in the home directory; 2.51.1
    ignores it. A user's own choice stays.
    """
    own = {} if "RAY_AUTH_MODE" in base else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return {"RAY_USAGE_STATS_ENABLED": base.get("RAY_USAGE_STATS_ENABLED", "0"), **own}


def step_environment(base: Mapping[str, str], code: Path) -> dict[str, str]:
    """What a step is started with: the trainer's environment, since Ray's workers inherit that of ``ray start``.

    Not the mark of the trainer's own processes: whoever has it is killed with the body, and a node's part, which ends
    in order then, would be too.
    """
    dropped = (*CONTRADICTING_PREFIXES, TRAINER_MARKER)
    kept = {name: value for name, value in base.items() if not name.startswith(dropped)}
    return {**kept, "PYTHONPATH": f"{code}:{kept['PYTHONPATH']}" if kept.get("PYTHONPATH") else str(code)}


@dataclass
class Step:
    """One node's part: its ``srun``, and where its words go."""

    node: str
    child: Child
    log: Path

    def ended(self) -> str | None:
        """How it has ended, with the last lines of its log; None while it runs."""
        code = self.child.exit_code
        return None if code is None else f"its step has ended with exit code {code}{self.last_words()}"

    def last_words(self) -> str:
        lines = (read_if_there(self.log) or "").strip().splitlines()[-SHOWN_LOG_LINES:]
        return f"; the end of {self.log}: {' | '.join(lines)}" if lines else ""


@dataclass
class RayCluster:
    """A run's cluster: ``environment`` leads the trainer to it. Without steps it is none, and nothing can be lost."""

    environment: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    gpus: int = 0
    probe: Child | None = None
    seen: tuple[SeenNode, ...] = ()
    node_state: Callable[[str], str] = lambda node: ""

    @property
    def pids(self) -> set[int]:
        """Our children that the cluster depends on."""
        return {child.pid for child in [*(step.child for step in self.steps), *([self.probe] if self.probe else [])]}

    @property
    def names(self) -> list[str]:
        return [step.node for step in self.steps]

    def note(self, line: bytes) -> None:
        """Take a line of the probe."""
        seen = parse_seen(line)
        self.seen = self.seen if seen is None else seen

    def ended_step(self) -> str | None:
        """The first step that has ended, as a sentence, or None."""
        return next((f"Ray on {step.node}: {end}" for step in self.steps if (end := step.ended())), None)

    def lost(self) -> str | None:
        """Why the cluster is no longer complete, with the node's name, or None. For a cluster that has been."""
        for step in self.steps:
            end = step.ended()
            left = [node for node in self.seen if node.name == step.node and not node.alive]
            if end or left:
                state = self.node_state(step.node)
                said = f" (Slurm's state of the node: {state})" if state else ""
                return f"node {step.node} was lost: {end or 'Ray does not hear of it any more'}{said}"
        return None

    def stop(self, deadline_s: float) -> None:
        """End all steps at once, each in order; kill what has not ended after ``deadline_s`` seconds."""
        for step in self.steps:
            assert step.child.process.stdin
            with contextlib.suppress(OSError):
                step.child.process.stdin.close()
        end = time.monotonic() + deadline_s
        for step in self.steps:
            if not step.child.wait(max(0.0, end - time.monotonic())):
                log.warning("Ray on %s does not end; killing its step", step.node)
        for step in self.steps:
            step.child.stop()


@contextlib.contextmanager
def ray_cluster(
    job: JobContext,
    trainer: Trainer,
    environment: TrainerEnvironment,
    guardian: Guardian,
    still_possible: Callable[[], None],
    sleep: Callable[[float], None],
) -> Iterator[RayCluster]:
    """The cluster for the length of the block, with every node and GPU in it; an empty one where none is wanted.

    ``still_possible`` raises the reason to give up the wait. ``EnvironmentProblem`` says why Ray did not start on a
    node, ``WaitTimeout`` which nodes were missing after RAY_READY_TIMEOUT.
    """
    if not wanted(job.settings):
        yield RayCluster()
        return
    shared = shared_environment(environment.variables, secrets.token_hex(32))
    starter = _Starter(job, trainer, environment.plus(shared), guardian, still_possible, sleep)
    with contextlib.ExitStack() as stack:
        yield starter.start(stack)


class _Starter:
    """Brings a cluster up, one thing after the other."""

    def __init__(
        self,
        job: JobContext,
        trainer: Trainer,
        environment: TrainerEnvironment,
        guardian: Guardian,
        still_possible: Callable[[], None],
        sleep: Callable[[float], None],
    ) -> None:
        self.job = job
        self.cwd = trainer.cwd
        self.environment = environment.variables
        self.integer_devices = environment.integer_devices
        self.guardian = guardian
        self.still_possible = still_possible
        self.sleep = sleep
        self.slurm = Slurm(job.environment)
        self.deadline = time.monotonic() + job.settings.ray_ready_timeout
        self.cluster = RayCluster(gpus=job.settings.gpus_per_node, node_state=self.slurm.node_state)

    def start(self, stack: contextlib.ExitStack) -> RayCluster:
        """The complete cluster; ``stack`` ends it."""
        began = time.monotonic()
        specs = self.specs()
        stack.callback(self.cluster.stop, specs[0].grace_s + STEP_END_S)
        head = self.start_head(specs[0])
        for spec in specs[1:]:
            host = head.address.rpartition(":")[0]
            self.start_step(replace(spec, head=head.address, folder=head.folder, peer=host))
        self.start_probe(specs[0].python, head, stack)
        self.await_all()
        log.info("Ray is complete after %.1f s: %s", time.monotonic() - began, ", ".join(self.cluster.names))
        shared = {name: value for name, value in self.environment.items() if name.startswith("RAY_")}
        self.cluster.environment = {**shared, "RAY_ADDRESS": head.address, "RAY_TMPDIR": head.folder}
        return self.cluster

    def specs(self) -> list[NodeSpec]:
        environment = self.job.environment
        names = self.slurm.hostnames(environment.get("SLURM_JOB_NODELIST", ""))
        names = head_first(names, environment.get("SLURMD_NODENAME", ""))
        interface = self.environment.get("NETWORK_INTERFACE", "")
        log.info("starting Ray on %s, with its head on the first", ", ".join(names))
        grace = grace_s(self.job.scheduler.kill_wait_s())
        return node_specs(self.job.settings, names, self.job.job_id, interface, grace, self.integer_devices)

    def start_head(self, spec: NodeSpec) -> Announcement:
        announced = self.job.directory.ray_head(self.job.job_id)
        announced.unlink(missing_ok=True)
        self.start_step(replace(spec, announce=str(announced)))
        return self.wait(
            f"Ray's head on {spec.node}",
            lambda: parse_announcement(read_if_there(announced), self.job.job_id),
        )

    def start_step(self, spec: NodeSpec) -> None:
        settings, path = self.job.settings, self.job.directory.ray_log(self.job.job_id, spec.node)
        argv = node_step(settings, spec.node, self.cwd, self.environment["SKYRL_PYTHON"], spec.to_text())
        environment = step_environment(self.environment, self.job.code)
        with path.open("ab") as output:
            step = ChildSpec(
                argv,
                environment,
                f"Ray's step on {spec.node}",
                stdin_pipe=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            child = Child(step, stop_grace_s=STEP_END_S)
        self.cluster.steps.append(Step(spec.node, child, path))
        self.guardian.own_session(child.pid)

    def start_probe(self, python: Sequence[str], head: Announcement, stack: contextlib.ExitStack) -> None:
        argv = (*python, "-m", "slurm.lib.ray_probe", head.address)
        environment = {
            **step_environment(self.environment, self.job.code),
            "RAY_ADDRESS": head.address,
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else Ray would pack the folder up for this one driver
        }
        path = self.job.directory.ray_log(self.job.job_id, "probe")
        with path.open("ab") as output:
            spec = ChildSpec(
                argv,
                environment,
                "the probe of Ray",
                cwd=self.cwd,
                stdin_pipe=True,
                stdout=subprocess.PIPE,
                stderr=output,
            )
            probe = stack.enter_context(Child(spec))
        assert probe.process.stdout
        copy_lines(probe.process.stdout, [self.cluster.note])
        self.guardian.own_session(probe.pid)
        self.cluster.probe = probe

    def await_all(self) -> None:
        cluster = self.cluster
        what = f"every node and GPU in the Ray cluster (RAY_READY_TIMEOUT={self.job.settings.ray_ready_timeout})"
        try:
            self.wait(what, lambda: None if missing(cluster.names, cluster.gpus, cluster.seen) else True)
        except WaitTimeout as problem:
            lacks = missing(cluster.names, cluster.gpus, cluster.seen)
            absent = [step for step in cluster.steps if any(step.node in clause for clause in lacks)]
            words = absent[0].last_words() if absent else ""
            raise WaitTimeout(f"{problem}: {', '.join(lacks)}{words}") from None

    def wait(self, what: str, probe: Callable[[], T | None]) -> T:
        left = float(math.ceil(max(0.0, self.deadline - time.monotonic())))
        return wait_for(what, probe, left, still_possible=self.check, sleep=self.sleep)

    def check(self) -> None:
        self.still_possible()
        ended = self.cluster.ended_step()
        if ended:
            raise EnvironmentProblem(ended)
        probe = self.cluster.probe
        if probe and probe.exit_code is not None:
            path = self.job.directory.ray_log(self.job.job_id, "probe")
            raise EnvironmentProblem(f"the probe of Ray has ended with exit code {probe.exit_code}; see {path}")
