"""The runtime job: private Podman storage, Podman service, API server; its address is published once it answers.

Then it waits for the first of: the training's completion flag, the training job's end, a signal, the death of its own
server. It stops everything in order within Slurm's KillWait. The nested ``with`` blocks of ``serve`` are the job.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.lib.api_server_child import ApiServer, api_server
from slurm.lib.attempts import refused, why_ended
from slurm.lib.coordination import Counter, CounterWatch, Flag, FlagReader
from slurm.lib.endings import End, note_ends
from slurm.lib.errors import (
    EXIT_OK,
    EXIT_SIGNAL_BASE,
    EXIT_TIMEOUT,
    EXIT_UNAVAILABLE,
    EnvironmentProblem,
    SuiteError,
)
from slurm.lib.guardian import guarded
from slurm.lib.idle import IdleWatch
from slurm.lib.images import load_images
from slurm.lib.job_context import JobContext, run_body
from slurm.lib.logs import log
from slurm.lib.partner import FLAG_LATE_S, PartnerWatch
from slurm.lib.podman_service import PodmanService, podman_service
from slurm.lib.podman_storage import podman_storage, readable_stores
from slurm.lib.preflight.node import ready_runtime_node
from slurm.lib.registries import registries_conf, site_conf
from slurm.lib.restarts import Ended
from slurm.lib.run_record import partner_of
from slurm.lib.runtime_client import RuntimeClient
from slurm.lib.scheduler import JobState
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.waiting import wait_for

START_DEADLINE_S = 60.0  # as the bash suite: the API server has this long to answer /health
LOOK_EVERY_S = 0.4
SAME_SIGNAL_S = 0.3  # between one process's TERM and another's, when slurmstepd signals a whole job


@dataclass(frozen=True)
class Outcome:
    """Why the job ends: its exit code, a sentence, and whether that is as planned: no training loses its runtime.

    ``others``: how the training ended, as far as that is known.
    """

    exit_code: int
    reason: str
    as_planned: bool = False
    others: tuple[End, ...] = ()


def main(argv: Sequence[str]) -> int:
    """Run the job; returns its exit code."""
    return run_body("runtime", "runtime_server.py", argv, run)


def run(job: JobContext, notes: SignalNotes) -> int:
    """Serve until there is a reason to end; the reason stands where the training job looks."""
    log.info("runtime job %s on %s, coordination directory %s", job.job_id, socket.gethostname(), job.directory.path)
    refusal = refused(job, "runtime", notes)
    if refusal is not None:
        return refusal
    try:
        outcome = serve(job, notes)
    except Interrupted as stop:
        outcome = Outcome(EXIT_SIGNAL_BASE + stop.number, f"ended by {stop}")
        tell_training(job, outcome)
    except SuiteError as problem:
        outcome = Outcome(problem.exit_code, str(problem))
        tell_training(job, outcome)
    (log.info if outcome.as_planned else log.error)("runtime job %s ends: %s", job.job_id, outcome.reason)
    withdrawn = () if outcome.as_planned else withdraw_training(job, outcome)
    own = End("runtime", job.job_id, outcome.exit_code, outcome.reason, "runtime")
    note_ends(job.directory, own, *outcome.others, *withdrawn)
    return outcome.exit_code


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


def withdraw_training(job: JobContext, outcome: Outcome) -> tuple[End, ...]:
    """Take a training job that has not started out of the queue: it could only fail. Its flag says why; so it ended."""
    training = partner_of(job.directory, "runtime", job.job_id)
    if not training or job.scheduler.status(training).state is not JobState.PENDING:
        return ()
    complaint = job.scheduler.cancel([training])
    log.warning("cancelled the pending training job %s, which could only fail%s", training, complaint or "")
    reason = f"taken out of the queue before it began: the runtime job {job.job_id} failed: {outcome.reason}"
    flag = Flag.of_this_host(training, job.job_id, EXIT_UNAVAILABLE, reason, Ended.FAILED)
    try:
        job.directory.publish(job.directory.training_complete, flag)
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


def serve(job: JobContext, notes: SignalNotes) -> Outcome:
    """Bring everything up, publish, wait for the reason to end, and leave in reverse order."""
    budget = StopBudget.within(job.scheduler.kill_wait_s())
    scratch = ready_runtime_node(job.settings, job.environment, job.job_id)
    registries = registries_conf(job.settings.registry_mirrors, site_conf(os.environ))
    stores = readable_stores(os.environ)
    with guarded(job.code) as guardian, podman_storage(scratch, job.job_id, stores, registries) as storage:
        guardian.own_storage(storage.root)
        with api_server(job, storage, api_key(job), budget.server_s) as server:
            guardian.own_session(server.pid)
            with podman_service(storage, job.open_environment, notes.check, budget.service_s) as service:
                load_images(job, storage, lambda: still_starting(notes, server, service))
                await_health(server, notes)
                watcher = TrainingWatcher.of(job, server)
                publish(job, server)
                outcome = watch(job, notes, watcher, server, service)
                log.info("stopping everything: %s", outcome.reason)
                if not outcome.as_planned:
                    tell_training(job, outcome)
                server.stop()
    return outcome


def api_key(job: JobContext) -> str:
    """The key of this run's server: the configured one, else a new one."""
    return job.environment.get("ALLHANDS_API_KEY") or secrets.token_urlsafe(32)


def still_starting(notes: SignalNotes, server: ApiServer, service: PodmanService) -> None:
    """Raise the reason why going on with the start has become pointless."""
    notes.check()
    server.check_alive()
    service.check_alive()


def await_health(server: ApiServer, notes: SignalNotes) -> None:
    """Wait until the server answers; its death ends the wait at once."""

    def alive() -> None:
        notes.check()
        server.check_alive()

    client = RuntimeClient(server.local_url, server.key)
    wait_for(
        "the API server to answer /health",
        lambda: True if client.health().ok else None,
        START_DEADLINE_S,
        still_possible=alive,
        pause=lambda _elapsed: 0.02,
        sleep=notes.sleep,
    )


def publish(job: JobContext, server: ApiServer) -> None:
    """Say where the server is, now that it answers."""
    job.directory.publish_server(server.url, server.key, Flag.of_this_host(job.job_id, job.job_id))
    log.info("API server ready at %s", server.url)


def watch(
    job: JobContext, notes: SignalNotes, watcher: TrainingWatcher, server: ApiServer, service: PodmanService
) -> Outcome:
    """Wait for the first reason to end."""
    end = time.monotonic() + job.settings.training_complete_timeout
    idle = IdleWatch(job, notes)
    while True:
        outcome = watcher.look(server) or stopped(notes) or child_ended(notes, server, service)
        outcome = outcome or idle_too_long(idle, watcher)
        if outcome is None and time.monotonic() > end:
            seconds = job.settings.training_complete_timeout
            outcome = Outcome(EXIT_TIMEOUT, f"the training was not complete after TRAINING_COMPLETE_TIMEOUT={seconds}")
        if outcome:
            return outcome
        notes.sleep(LOOK_EVERY_S)


def idle_too_long(idle: IdleWatch, watcher: TrainingWatcher) -> Outcome | None:
    """The outcome if this job is not to wait any longer for a training that has not started."""
    ending = idle.look(watcher.has_heard)
    return Outcome(ending.exit_code, ending.reason, as_planned=ending.goes_on) if ending else None


def stopped(notes: SignalNotes) -> Outcome | None:
    """The outcome if a signal has come."""
    number = notes.stop_signal
    return None if number is None else Outcome(EXIT_SIGNAL_BASE + number, f"ended by {signal.Signals(number).name}")


def child_ended(notes: SignalNotes, server: ApiServer, service: PodmanService) -> Outcome | None:
    """The outcome if a child of ours has ended by itself; scancel signals every process, perhaps the child first."""
    try:
        server.check_alive()
        service.check_alive()
    except EnvironmentProblem as problem:
        notes.sleep(SAME_SIGNAL_S)
        return stopped(notes) or Outcome(problem.exit_code, str(problem))
    return None


@dataclass
class TrainingWatcher:
    """Looks for what ends the wait, in the order of how much it tells."""

    job: JobContext
    client: RuntimeClient
    complete: FlagReader
    counter: Counter
    partner: PartnerWatch | None = None

    @staticmethod
    def of(job: JobContext, server: ApiServer) -> TrainingWatcher:
        def ours(flag: Flag) -> bool:
            return flag.runtime_job_id == job.job_id

        path = job.directory.training_complete
        reader = FlagReader.of_new_directory if job.own_dir else FlagReader.from_now
        client = RuntimeClient(server.local_url, server.key)
        counter = Counter(job.directory.heartbeat("runtime", job.job_id))
        if not server.is_ours:
            counter.beat()  # before the address is published: the training job takes it for the sign to do likewise
        return TrainingWatcher(job, client, reader(path, ours), counter)

    @property
    def has_heard(self) -> bool:
        """Whether the training has been heard of, or Slurm has said that it runs."""
        return self.partner is not None and self.partner.expected

    def look(self, server: ApiServer) -> Outcome | None:
        flag = self.complete.read()
        if flag:
            return outcome_of(flag)
        if not server.is_ours:
            self.counter.beat()
        return self._partner_gone(server)

    def _partner_gone(self, server: ApiServer) -> Outcome | None:
        self.partner = self.partner or self._find_partner(server)
        if self.partner is None:
            return None
        why = self.partner.gone()
        if why is None:
            return None
        late = self.complete.read()  # its last act may have been the flag
        if late:
            return outcome_of(late)
        told = End("training", self.partner.job_id, None, why, "runtime")
        if self.partner.ended_well:  # Slurm's word, since the directory tells less
            reason = f"{why}; its completion flag was not seen here within {FLAG_LATE_S:g} s"
            return Outcome(EXIT_OK, reason, as_planned=True, others=(told,))
        reason = f"{why}, without a completion flag"
        return Outcome(EXIT_UNAVAILABLE, reason, others=(told,))

    def _find_partner(self, server: ApiServer) -> PartnerWatch | None:
        training = partner_of(self.job.directory, "runtime", self.job.job_id)
        if training is None:
            return None
        watch = CounterWatch(self.job.directory.heartbeat("training", training))

        def age_s() -> float | None:
            return self.client.heard_s_ago(f"training-{training}") if server.is_ours else watch.age_s()

        return PartnerWatch("training", training, self.job.scheduler, age_s, flag_late_s=FLAG_LATE_S)


def outcome_of(flag: Flag) -> Outcome:
    """What the completion flag means for the runtime job: it has done its work, however the trainer ended."""
    if flag.by_hand:
        return Outcome(EXIT_OK, "training_complete.flag was set by hand", as_planned=True)
    reason = f"training job {flag.job_id} is complete: {flag.reason or 'no reason given'} (exit code {flag.exit_code})"
    return Outcome(EXIT_OK, reason, as_planned=True, others=(End.of_flag("training", flag),))
