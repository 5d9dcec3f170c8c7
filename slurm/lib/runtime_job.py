"""The runtime job: private Podman storage, Podman service, API server; its address is published once it answers.

The nested ``with`` blocks of ``serve`` are the job, and its end: everything is stopped in reverse order, within Slurm's
KillWait. ``watchers`` sees what happens, ``supervisor`` decides what it means, and here that is done.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from slurm.lib.api_server_child import ApiServer, api_server
from slurm.lib.attempts import refused, why_ended
from slurm.lib.coordination import Flag
from slurm.lib.endings import End, is_followed, note_ends
from slurm.lib.errors import EXIT_SIGNAL_BASE, EXIT_UNAVAILABLE, EnvironmentProblem, SuiteError
from slurm.lib.guardian import guarded
from slurm.lib.images import load_images
from slurm.lib.job_context import JobContext, run_body
from slurm.lib.logs import log
from slurm.lib.lookout import answered
from slurm.lib.notice import Ending
from slurm.lib.notify import Sending, ended_by, patience_s, tell, warn_of_mail
from slurm.lib.podman_service import podman_service
from slurm.lib.podman_storage import podman_storage, readable_stores
from slurm.lib.preflight.node import ready_runtime_node
from slurm.lib.registries import registries_conf, site_conf
from slurm.lib.restarts import Ended
from slurm.lib.run_record import partner_of
from slurm.lib.runs import stranger
from slurm.lib.runtime_client import QUICK_TIMEOUT_S, RuntimeClient
from slurm.lib.scheduler import JobState, Slurm
from slurm.lib.shared_images import removed_with_the_run
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.supervisor import (
    Action,
    AllStopped,
    Answers,
    Event,
    Failed,
    NoteEnd,
    Outcome,
    Part,
    Publish,
    Recovered,
    Restart,
    State,
    Stop,
    StopSignal,
    Supervisor,
    TellTraining,
    Withdraw,
    step,
)
from slurm.lib.usage_sampler import published_statistics, sampled
from slurm.lib.waiting import wait_for
from slurm.lib.watchers import RunWatch, TrainingWatcher

START_DEADLINE_S = 60.0  # as the bash suite: the API server has this long to answer /health
ASK_S = 5.0  # whose a training is
ASK_AT_END_S = 2.0  # how a training is, before this job has noted its own end
LOOK_EVERY_S = 0.05  # at our children and signals


class Stopping(Exception):
    """The work ends; the supervisor knows why."""


def main(argv: Sequence[str]) -> int:
    """Run the job; returns its exit code."""
    return run_body("runtime", "runtime_server.py", argv, run)


def run(job: JobContext, notes: SignalNotes) -> int:
    """Serve until there is a reason to end; the reason stands where the training job looks."""
    log.info("runtime job %s on %s, coordination directory %s", job.job_id, socket.gethostname(), job.directory.path)
    warn_of_mail(job)
    with removed_with_the_run(job):
        refusal = refused(job, "runtime", notes)
        return RuntimeJob(job, notes).run() if refusal is None else refusal


@dataclass
class RuntimeJob:
    """The edge of the supervisor: hands it what happens, and does what it says."""

    job: JobContext
    notes: SignalNotes
    supervisor: Supervisor = field(default_factory=Supervisor)
    restarts: Mapping[Part, Callable[[], None]] = field(default_factory=dict)
    withdrawn: tuple[End, ...] = ()
    watch: RunWatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = RunWatch(self.job, self.notes, TrainingWatcher.of(self.job))

    def run(self) -> int:
        """From the start to the end with its reason; the exit code."""
        with contextlib.suppress(Stopping), self.judged(), self.watch.asking():
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
        if isinstance(action, Publish):
            assert self.watch.server is not None
            self.watch.serves(self.watch.server)
            publish(self.job, self.watch.server)
        elif isinstance(action, Restart):
            log.warning("%s; starting it again, the sandboxes stay", action.why)
            self.restarts[action.part]()
        elif isinstance(action, Recovered):
            log.info("the API server and the Podman service answer again, after %.1f s", action.seconds)
        elif isinstance(action, Stop):
            log.info("stopping everything: %s", action.outcome.reason)
        elif isinstance(action, TellTraining):
            tell_training(self.job, action.outcome)
        elif isinstance(action, Withdraw):
            self.withdrawn = withdraw_training(self.job, action.outcome, self.watch.training.launched_with)
        else:
            self.conclude(action)

    def conclude(self, action: NoteEnd) -> None:
        """The last word, in the log and in the run's record."""
        outcome, job_id = action.outcome, self.job.job_id
        (log.info if outcome.as_planned else log.error)("runtime job %s ends: %s", job_id, outcome.reason)
        own = End("runtime", job_id, outcome.exit_code, outcome.reason, "runtime")
        ending = self.unsaid(outcome)
        told = tell(self.job, ending) if ending else Sending()
        note_ends(self.job.directory, own, *outcome.others, *self.withdrawn)
        told.finish(patience_s(self.notes))

    def unsaid(self, outcome: Outcome) -> Ending | None:
        """The end that this job tells people of: its own where it has no training, else that of one that is gone.

        A training that lives tells it itself, and one that another attempt follows is not the end.
        """
        job = self.job
        if not job.settings.notify:
            return None
        training = partner_of(job.directory, "runtime", job.job_id)
        if training is None:
            return Ending(job.job_id, self.how_alone(outcome), outcome.exit_code, outcome.reason)
        known = [end for end in (*outcome.others, *self.withdrawn) if end.kind == "training"]
        goes_on = is_followed(job.directory, training) or (outcome.as_planned and not known)
        if goes_on or not (known or job.scheduler.status(training, ASK_AT_END_S).state.is_final):
            return None
        end = known[0] if known else End("training", training, outcome.exit_code, outcome.reason, "runtime")
        return ended_by(job.directory, end.job_id, end.exit_code, end.reason)

    def how_alone(self, outcome: Outcome) -> Ended:
        """How the end of a runtime without a training is called."""
        if outcome.exit_code > EXIT_SIGNAL_BASE:
            return why_ended(self.job, "runtime", None).ended
        return Ended.FAILED if outcome.exit_code else Ended.COMPLETED

    def look(self) -> None:
        """Look once for what has happened, and act on it."""
        event = self.watch.look(self.supervisor.state)
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


def tell_training(job: JobContext, outcome: Outcome) -> None:
    """Say why this job ends before the training does."""
    flag = Flag.of_this_host(job.job_id, job.job_id, outcome.exit_code, outcome.reason, how_ended(job, outcome))
    try:
        job.directory.publish(job.directory.runtime_failed, flag)
    except EnvironmentProblem as problem:
        log.error("%s; the training job will notice that this job has ended", problem)


def how_ended(job: JobContext, outcome: Outcome) -> str:
    """Whether a person ended this job, or something that nobody wanted, after which a training may be restarted."""
    if not job.settings.restarts:
        return ""
    signalled = outcome.exit_code > EXIT_SIGNAL_BASE
    return why_ended(job, "runtime", None).ended if signalled else Ended.INTERRUPTED


def withdraw_training(job: JobContext, outcome: Outcome, known: str | None) -> tuple[End, ...]:
    """Take a training job that has not started out of the queue: it could only fail. Its flag says why; so it ended.

    ``known`` is its id where that need not be looked up.
    """
    training = known or partner_of(job.directory, "runtime", job.job_id)
    if not training or job.scheduler.status(training).state is not JobState.PENDING:
        return ()
    whose = stranger(training, job.directory, job.scheduler, ASK_S) if isinstance(job.scheduler, Slurm) else ""
    if whose:
        log.warning("a record here names the training job %s, which %s; it stays in the queue", training, whose)
        return ()
    complaint = job.scheduler.cancel([training])
    log.warning("cancelled the pending training job %s, which could only fail%s", training, complaint or "")
    reason = f"taken out of the queue before it began: the runtime job {job.job_id} failed: {outcome.reason}"
    flag = Flag.of_this_host(training, job.job_id, EXIT_UNAVAILABLE, reason, Ended.FAILED)
    try:
        job.directory.speak_for(job.directory.training_complete, flag)
    except EnvironmentProblem as problem:
        log.error("%s", problem)
    return (End("training", training, flag.exit_code, reason, "runtime"),)


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
        return StopBudget(server_s=min(5.0, whole / 2), service_s=min(1.0, whole / 8))


def serve(running: RuntimeJob) -> None:
    """Bring everything up, publish, serve until there is a reason to end, and leave in reverse order."""
    job, watch, check = running.job, running.watch, running.still_starting
    check()
    budget = StopBudget.within(answered(job.scheduler.kill_wait_s, running.notes))
    scratch = ready_runtime_node(job.settings, job.environment, job.job_id)
    registries = registries_conf(job.settings.registry_mirrors, site_conf(os.environ))
    stores = readable_stores(os.environ)
    with (
        guarded(job.code) as guardian,
        podman_storage(scratch, job.job_id, stores, registries) as storage,
        sampled(job, "runtime", running.notes, storage) as usage,
    ):
        guardian.own_storage(storage.root)
        with (
            api_server(job, storage, api_key(job), budget.server_s, guardian.own_session) as server,
            published_statistics(job, storage),
        ):
            watch.server = server
            with podman_service(storage, job.open_environment, check, budget.service_s) as service, stopped(server):
                watch.service = service
                running.restarts = {Part.SERVER: server.restart, Part.SERVICE: service.restart}
                with contextlib.closing(usage), running.judged():
                    load_images(job, storage, check)
                    await_health(server, running)
                    running.take(Answers())
                    running.supervise()


@contextlib.contextmanager
def stopped(server: ApiServer) -> Iterator[None]:
    """Stop the server at the end of the block, while the Podman service that it needs for that is there."""
    try:
        yield
    finally:
        server.stop()


def api_key(job: JobContext) -> str:
    """The key of this run's server: the configured one, else a new one."""
    return job.environment.get("ALLHANDS_API_KEY") or secrets.token_urlsafe(32)


def await_health(server: ApiServer, running: RuntimeJob) -> None:
    """Wait until the server answers; its death ends the wait at once."""
    client = RuntimeClient(server.local_url, None)
    wait_for(
        "the API server to answer /health",
        lambda: True if client.ask("GET", "/health", QUICK_TIMEOUT_S).ok else None,
        START_DEADLINE_S,
        still_possible=running.still_starting,
        pause=lambda _elapsed: 0.02,
        sleep=running.notes.sleep,
    )


def publish(job: JobContext, server: ApiServer) -> None:
    """Say where the server is, now that it answers."""
    job.directory.publish_server(server.url, server.key, Flag.of_this_host(job.job_id, job.job_id))
    log.info("API server ready at %s", server.url)
