"""What serves sandboxes on one node, in a runtime job and in a worker: storage, Podman service, API server, samples.

The nested ``with`` blocks of ``serve`` are such a job, and its end: everything is stopped in reverse order, within
Slurm's KillWait. A ``ServingBody`` is the edge of the supervisor: it hands it what the watchers saw, and does what it
says.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from slurm.lib.api_server_child import ApiServer, Membership, api_server
from slurm.lib.errors import SuiteError
from slurm.lib.guardian import Guardian, guarded
from slurm.lib.images import load_images
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.lookout import answered
from slurm.lib.podman_service import PodmanService, podman_service
from slurm.lib.podman_storage import PodmanStorage, podman_storage, readable_stores
from slurm.lib.preflight.node import ready_runtime_node
from slurm.lib.registries import registries_conf, site_conf
from slurm.lib.runtime_client import QUICK_TIMEOUT_S, RuntimeClient
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.supervisor import (
    Action,
    AllStopped,
    Answers,
    Event,
    Failed,
    Outcome,
    Part,
    Recovered,
    Restart,
    State,
    Stop,
    StopSignal,
    Supervisor,
    step,
)
from slurm.lib.usage_sampler import published_statistics, sampled
from slurm.lib.waiting import wait_for

START_DEADLINE_S = 60.0  # as the bash suite: the API server has this long to answer /health
LOOK_EVERY_S = 0.05  # at our children and signals


class Stopping(Exception):
    """The work ends; the supervisor knows why."""


class Watch(Protocol):
    """What a body watches; ``server`` and ``service`` are its children, from their start on."""

    server: ApiServer | None
    service: PodmanService | None

    def look(self, state: State) -> Event | None: ...

    def asking(self) -> contextlib.AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Ground:
    """What a job has on its node before it serves: its guardian, its storage, and how long its end may take."""

    guardian: Guardian
    storage: PodmanStorage
    budget: StopBudget


@dataclass(frozen=True)
class StopBudget:
    """Seconds that each step of the end may take, so that all of them fit into Slurm's KillWait less a second.

    What the server does not remove in its share dies with the storage, whose end does not grow with the number of
    sandboxes.
    """

    server_s: float
    service_s: float

    @staticmethod
    def within(kill_wait_s: float) -> StopBudget:
        whole = max(2.0, kill_wait_s - 1.0)
        return StopBudget(server_s=min(5.0, whole / 3), service_s=min(1.0, whole / 8))


@dataclass
class ServingBody(ABC):
    """The edge of the supervisor: hands it what happens, and does what it says; ``kind`` is the job's."""

    job: JobContext
    notes: SignalNotes
    supervisor: Supervisor = field(default_factory=Supervisor)
    restarts: dict[Part, Callable[[], None]] = field(default_factory=dict)

    kind = ""

    @property
    @abstractmethod
    def watching(self) -> Watch:
        """What it watches."""

    @abstractmethod
    def membership(self, ground: Ground) -> contextlib.AbstractContextManager[tuple[str, Membership | None]]:
        """The key of its API server, and the head that this one joins, if any, for the length of the block."""

    @abstractmethod
    def do_own(self, action: Action) -> None:
        """Do what is not the same for every body."""

    def run(self) -> int:
        """From the start to the end with its reason; the exit code."""
        with contextlib.suppress(Stopping), self.judged(), self.watching.asking():
            serve(self)
        self.take(AllStopped())
        assert self.supervisor.outcome is not None
        return self.supervisor.outcome.exit_code

    @contextlib.contextmanager
    def judged(self) -> Iterator[None]:
        """An error or a signal in the block is a reason to stop, which is told at once; then ``Stopping``."""
        try:
            yield
        except Interrupted as stop:
            self.take(StopSignal(stop.number))
            raise Stopping from None
        except SuiteError as problem:
            self.take(Failed(problem.exit_code, str(problem)))
            raise Stopping from None

    def take(self, event: Event) -> None:
        """Have the supervisor judge an event, and do what it says."""
        self.supervisor, actions = step(self.supervisor, event, time.monotonic())
        for action in actions:
            self.do(action)

    def do(self, action: Action) -> None:
        if isinstance(action, Restart):
            log.warning("%s; starting it again, the sandboxes stay", action.why)
            self.restarts[action.part]()
        elif isinstance(action, Recovered):
            names = " and ".join(part.value for part in self.supervisor.parts)
            log.info("%s answer again, after %.1f s", names, action.seconds)
        else:
            if isinstance(action, Stop):
                log.info("stopping everything: %s", action.outcome.reason)
            self.do_own(action)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """After the block a job that was signalled says how it ends: what follows may outlast Slurm's KillWait."""
        try:
            yield
        finally:
            if self.supervisor.outcome and self.notes.stop_signal is not None:
                self.note_end(self.supervisor.outcome)

    @abstractmethod
    def note_end(self, outcome: Outcome) -> None:
        """Say how this job ends where a run's jobs say it; again, it says nothing new."""

    def look(self) -> None:
        """Look once for what has happened, and act on it."""
        event = self.watching.look(self.supervisor.state)
        if event is not None:
            self.take(event)

    def still_starting(self) -> None:
        """Raise ``Stopping`` if going on with the start has become pointless."""
        self.look()
        if self.supervisor.state is State.STOPPING:
            raise Stopping

    def supervise(self) -> None:
        """Serve until there is a reason to stop; what crashes is started again."""
        while self.supervisor.state is not State.STOPPING:
            self.notes.sleep(LOOK_EVERY_S)
            self.look()


def serve(body: ServingBody) -> None:
    """Bring everything up, say that it answers, serve until there is a reason to end, and leave in reverse order."""
    job, watch, check = body.job, body.watching, body.still_starting
    check()
    budget = StopBudget.within(answered(job.scheduler.kill_wait_s, body.notes))
    scratch = ready_runtime_node(job.settings, job.environment, job.job_id)
    registries = registries_conf(job.settings.registry_mirrors, site_conf(os.environ))
    stores = readable_stores(os.environ)
    with (
        guarded(job.code) as guardian,
        podman_storage(scratch, job.job_id, stores, registries, guardian.own_storage) as storage,
        body.noted(),
        sampled(job, body.kind, body.notes, storage) as usage,
        body.membership(Ground(guardian, storage, budget)) as (key, membership),
        api_server(job, storage, key, budget.server_s, guardian.own_session, membership) as server,
        published_statistics(job, storage),
    ):
        watch.server = server
        with podman_service(storage, job.open_environment, check, budget.service_s) as service, stopped(server):
            watch.service = service
            body.restarts |= {Part.SERVER: server.restart, Part.SERVICE: service.restart}
            with contextlib.closing(usage), body.judged():
                load_images(job, storage, check)
                await_health(server, body)
                body.take(Answers())
                body.supervise()


@contextlib.contextmanager
def stopped(server: ApiServer) -> Iterator[None]:
    """Stop the server at the end of the block, while the Podman service that it needs for that is there."""
    try:
        yield
    finally:
        server.stop()


def await_health(server: ApiServer, body: ServingBody) -> None:
    """Wait until the server answers; its death ends the wait at once."""
    client = RuntimeClient(server.local_url, None)
    wait_for(
        f"{server.name} to answer /health",
        lambda: True if client.ask("GET", "/health", QUICK_TIMEOUT_S).ok else None,
        START_DEADLINE_S,
        still_possible=body.still_starting,
        pause=lambda _elapsed: 0.02,
        sleep=body.notes.sleep,
    )
