"""The training job: waits for the runtime's address, runs the trainer, records the outcome however it comes about.

Whatever happens (exit code, exception, signal, scancel) the completion flag is written, and the job ends with the
trainer's exit code.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slurm.lib.attempts import Chain, checkpoints_of, refused, why_ended
from slurm.lib.coordination import (
    Counter,
    CounterWatch,
    Flag,
    FlagReader,
    Presence,
    is_listed,
    read_if_there,
    write_atomically,
)
from slurm.lib.deadlines import Deadline, announce, deadline_of, told_variables
from slurm.lib.dot_env import read_dot_env
from slurm.lib.early_stop import GRACE_S, EarlyStop
from slurm.lib.endings import End, note_ends
from slurm.lib.errors import (
    EXIT_INTERNAL,
    EXIT_SIGNAL_BASE,
    EXIT_TIMEOUT,
    EnvironmentProblem,
    NodeLost,
    PartnerGone,
    SuiteError,
    UsageError,
    WaitTimeout,
)
from slurm.lib.guardian import guarded
from slurm.lib.job_context import JobContext, run_body
from slurm.lib.logs import log
from slurm.lib.lookout import Lookout, answered
from slurm.lib.node_environment import TrainerEnvironment, for_trainer, job_folder
from slurm.lib.notice import Ending
from slurm.lib.notify import Sending, patience_s, tell, warn_of_mail
from slurm.lib.partner import PartnerWatch
from slurm.lib.preflight.node import check_training_node
from slurm.lib.processes import Child, ChildSpec, adopt_orphans, kill_descendants, write_through
from slurm.lib.ray_cluster import RayCluster, ray_cluster
from slurm.lib.restarts import Ended
from slurm.lib.run_record import ensure_task_yaml, read_jobs
from slurm.lib.runtime_client import QUICK_TIMEOUT_S, Answer, Heartbeat, RuntimeClient
from slurm.lib.runtime_step import SIGNAL_SOON_S, RuntimeStep, as_a_job_alone, runtime_step
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.trainer import (
    KEY_NAME,
    TRAINER_MARKER,
    URL_NAME,
    Trainer,
    agent_code,
    agent_folder,
    dot_env_file,
    env_file_text,
    env_file_values,
    import_folders,
    snapshot_variables,
    trainer_environment,
    trainer_of,
    verl_of,
)
from slurm.lib.usage_sampler import sampled
from slurm.lib.waiting import wait_for
from slurm.lib.worker_recall import withdraw

LOOK_EVERY_S = 0.2
CHATTER = re.compile(rb"\b(INFO|DEBUG)\b")  # lines that a logger calls neither warning nor error
CANARY_S = 0.3  # between one process's TERM and another's, when slurmstepd signals a whole job
PARTNER_LOOK_EVERY_S = 1.0
VERIFY_DEADLINE_S = 20.0
FOREIGN_SERVERS = frozenset({404, 405})  # a server that is not ours need not have /list
# How long a trainer may take to stop after its runtime is gone; with SILENT_AFTER_S the GPUs are free within 15 s.
STOP_GRACE_S = 5.0
SERVER_BACK_S = 10.0  # twice what an API server that crashed needs to be there again
RESTART_FELT_S = 60.0  # a trainer may try a broken request again for a while before it gives up
LAST_STEPS_S = 2.0  # of a job that is being ended: what it writes then, and the end of its process
NODE_WORD_S = 3.0  # from the death of a node's Ray, which fails the trainer, to where we see it


@dataclass(frozen=True)
class Endpoint:
    """The server that this training uses; ``runtime_job_id`` is empty for one that is no job of ours."""

    url: str
    key: str | None
    runtime_job_id: str


@dataclass(frozen=True)
class Outcome:
    """How the training ended."""

    exit_code: int
    reason: str
    ended: Ended = Ended.FAILED


def main(argv: Sequence[str]) -> int:
    """Run the job; returns the trainer's exit code, or one of ours where no trainer ran."""
    return run_body("training", "verl_training.py", argv, run)


def run(job: JobContext, notes: SignalNotes) -> int:
    """Train, and leave the completion flag behind on every path."""
    log.info("training job %s on %s, coordination directory %s", job.job_id, socket.gethostname(), job.directory.path)
    warn_of_mail(job)
    refusal = refused(job, "training", notes)
    if refusal is not None:
        return refusal
    with runtime_step(job) as step:
        alone = replace(job, environment=as_a_job_alone(job.environment))
        with sampled(alone, "training", notes) as usage:
            return attempt(TrainingSession(alone, notes, step, usage.close))


def attempt(session: TrainingSession) -> int:
    """Train, and say how it ended: in the completion flag, and to the attempt that waits; the job's exit code."""
    outcome = Outcome(EXIT_INTERNAL, "an internal error; see the traceback in the training job's .err")
    try:
        outcome = session.train()
    except Interrupted as stop:
        outcome = session.interrupted(stop)
    except SuiteError as problem:
        outcome = session.failed_with(problem)
    finally:
        session.record(outcome)
        session.chain.conclude(outcome.ended, session.left_s())
        told = session.tell(outcome)
        session.note_ends(outcome)
        session.withdraw_workers(outcome)
        told.finish(patience_s(session.notes))
    return outcome.exit_code


class TrainingSession:
    """One attempt at training: finds the server, runs the trainer, watches both.

    ``step`` is the runtime's, where that is a part of this job; ``on_trainers_end`` is called once that was reaped.
    """

    def __init__(
        self,
        job: JobContext,
        notes: SignalNotes,
        step: RuntimeStep,
        on_trainers_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.job = job
        self.notes = notes
        self.step = step
        self.on_trainers_end = on_trainers_end
        named = step.job_id or job.environment.get("SKYRL_RUNTIME_JOB_ID")
        self.runtime_job_id = named or read_jobs(job.directory).get("runtime", "")
        self.kill_wait_s = 0.0
        self.chain = Chain(job)
        self.deadline = Deadline()
        self.server_restarted_s_ago: Callable[[], float | None] = lambda: None
        self._health = Answer(0, "not asked yet")
        self.failed = FlagReader.of_new_directory(job.directory.runtime_failed, self._of_our_runtime)
        if not job.own_dir:
            self.failed = FlagReader.from_now(job.directory.runtime_failed, self._of_our_runtime)
        reader = FlagReader.of_new_directory if job.own_dir else FlagReader.from_now
        self.by_hand = reader(job.directory.training_complete, lambda flag: False)  # only a person's empty one counts
        self._recorded = False

    def _of_our_runtime(self, flag: Flag) -> bool:
        return not self.runtime_job_id or flag.runtime_job_id == self.runtime_job_id

    def record(self, outcome: Outcome) -> None:
        """Write the completion flag, once; the runtime job ends when it sees it."""
        if self._recorded:
            return
        self._recorded = True
        goes_on = outcome.ended is Ended.INTERRUPTED and self.chain.successor
        (log.info if outcome.exit_code == 0 else log.warning if goes_on else log.error)(
            "training job %s ends with exit code %s: %s", self.job.job_id, outcome.exit_code, outcome.reason
        )
        if self.others_completion():
            return  # the result of that training stays
        flag = Flag.of_this_host(self.job.job_id, self.runtime_job_id, outcome.exit_code, outcome.reason, outcome.ended)
        try:
            self.job.directory.publish(self.job.directory.training_complete, flag)
        except EnvironmentProblem as problem:
            log.error("%s; the runtime job will notice that this job has ended", problem)

    def interrupted(self, stop: Interrupted) -> Outcome:
        """The outcome where a signal came before the trainer started."""
        cause = why_ended(self.job, "training", self.deadline.by_this_hosts_clock)
        return Outcome(EXIT_SIGNAL_BASE + stop.number, f"ended by {stop} before the trainer started", cause.ended)

    def failed_with(self, problem: SuiteError) -> Outcome:
        """The outcome where a step failed: scancel of a job of both may end its other part first, and that is seen."""
        if isinstance(problem, PartnerGone) and self.step.job_id:
            self.notes.sleep(SIGNAL_SOON_S)
            if self.notes.stop_signal is not None:
                return self.interrupted(Interrupted(self.notes.stop_signal))
        return Outcome(problem.exit_code, str(problem))

    def left_s(self) -> float:
        """Seconds of Slurm's KillWait that are left for what is taken back at the end; all of time without a signal."""
        if self.notes.stopped_at is None:
            return math.inf
        return max(0.0, self.notes.stopped_at + self.kill_wait_s - LAST_STEPS_S - time.monotonic())

    def note_ends(self, outcome: Outcome) -> None:
        """Say in the run's record how this job ended, and the runtime where that is gone."""
        own = End("training", self.job.job_id, outcome.exit_code, outcome.reason, "training")
        flag = self.failed.read()
        gone = End("runtime", self.runtime_job_id, None, outcome.reason, "training")
        others = [End.of_flag("runtime", flag)] if flag else [gone] if self._has_lost_runtime(outcome) else []
        note_ends(self.job.directory, own, *others)

    def _has_lost_runtime(self, outcome: Outcome) -> bool:
        return outcome.exit_code == PartnerGone.exit_code and bool(self.runtime_job_id)

    def withdraw_workers(self, outcome: Outcome) -> None:
        """Take out of the queue what waits there for a runtime that is gone without a word."""
        if self._has_lost_runtime(outcome) and not self.failed.read():
            withdraw(self.job, self.runtime_job_id)

    def tell(self, outcome: Outcome) -> Sending:
        """Begin to tell the people in NOTIFY, unless the run goes on."""
        if outcome.ended is Ended.INTERRUPTED and self.chain.successor:
            return Sending()
        return tell(self.job, Ending(self.job.job_id, outcome.ended, outcome.exit_code, outcome.reason))

    def train(self) -> Outcome:
        """The steps of the job."""
        self.refuse_ended()
        check_training_node(self.job.settings, self.job.environment, snapshot_of(self.job))
        endpoint = self.find_endpoint()
        self.runtime_job_id = endpoint.runtime_job_id
        self.verify(endpoint)
        self.know_deadline()
        verl = verl_of(self.job.settings, self.job.environment)
        if verl:
            log.info("skyrl-agent has %s", verl)
        trainer = trainer_of(self.job.settings, self.job.directory, verl)
        client = RuntimeClient(endpoint.url, endpoint.key)
        self.kill_wait_s = answered(self.job.scheduler.kill_wait_s, self.notes)
        marker = f"{self.job.job_id}.{secrets.token_hex(8)}"
        with (
            guarded(self.job.code) as guardian,
            job_folder(self.job, guardian) as folder,
            Heartbeat(client, f"training-{self.job.job_id}") as heartbeat,
            self.partner_watch(endpoint, heartbeat) as watch,
        ):
            self.server_restarted_s_ago = heartbeat.restarted_s_ago
            environment = self.prepare(trainer, endpoint, folder).plus({TRAINER_MARKER: marker})
            guardian.own_marker(TRAINER_MARKER, marker)

            def still_possible() -> None:
                self.notes.check()
                if why := watch():
                    raise PartnerGone(why)

            self.chain.begin(endpoint.runtime_job_id, still_possible)
            guardian.await_detached()
            adopt_orphans()

            with (
                start_canary() as canary,
                ray_cluster(self.job, trainer, environment, guardian, still_possible, self.notes.sleep) as cluster,
                start_trainer(trainer, {**environment.variables, **cluster.environment}) as child,
            ):
                guardian.own_session(child.pid)
                early = self.early_stop(child)
                self.notes.on_other = early.signalled
                try:
                    outcome = self.supervise(child, watch, canary, cluster, early)
                    self.on_trainers_end()
                    self.record(outcome)  # now: what is still to be ended and removed may outlast Slurm's KillWait
                    return outcome
                finally:
                    self.notes.on_other = None
                    child.kill()
                    # Slurm's commands that take the next attempt back are among the processes that are killed now
                    self.chain.settle(self.left_s())
                    # daemons that it left, in sessions of their own
                    kill_descendants(spared={canary.pid} | cluster.pids | self.step.pids)

    def know_deadline(self) -> None:
        """Find out until when both jobs may run, and say it; ``TooLate`` where that is too little."""
        job = self.job
        self.deadline = answered(
            lambda: deadline_of(job.job_id, self.runtime_job_id, job.environment, job.scheduler), self.notes
        )
        announce(self.deadline, job.settings, time.monotonic())

    def others_completion(self) -> Flag | None:
        """The completion flag of another training that this runtime has served."""
        flag = FlagReader.of_new_directory(self.job.directory.training_complete, self._of_our_runtime).read()
        served = flag is not None and not flag.by_hand and bool(self.runtime_job_id)
        return flag if flag and served and flag.job_id != self.job.job_id else None

    def refuse_ended(self) -> None:
        flag = self.others_completion()
        if flag:
            raise PartnerGone(
                f"the runtime job {self.runtime_job_id} has ended: it has served the training job {flag.job_id} "
                f"({flag.reason}); start another with --runtime-only"
            )

    def find_endpoint(self) -> Endpoint:
        """The server's address: from the runtime job's directory once it is ready, or as configured."""
        settings, environment = self.job.settings, self.job.environment
        in_directory = self.runtime_job_id or not self.job.own_dir or self.job.directory.runtime_ready.exists()
        if not in_directory and settings.sandbox_remote_runtime_api_url:
            return Endpoint(settings.sandbox_remote_runtime_api_url, environment.get(KEY_NAME), "")
        if not in_directory:
            raise UsageError(
                "no runtime to train against: give --coord-dir DIR of a running runtime job, or export "
                f"SKYRL_COORD_DIR, or {URL_NAME} and {KEY_NAME}"
            )
        return self.wait_for_endpoint()

    def wait_for_endpoint(self) -> Endpoint:
        """Wait for the ready flag; fails at once when the runtime job says that it failed or has ended."""
        deadline_s = self.job.settings.runtime_ready_timeout
        log.info("waiting up to %s s for the runtime in %s", deadline_s, self.job.directory.path)
        ready = FlagReader.of_new_directory(self.job.directory.runtime_ready, self._of_our_runtime)
        # It does not beat before it is ready, so Slurm is the witness: asked every few seconds in the first minute.
        watch = PartnerWatch("runtime", self.runtime_job_id, self.job.scheduler, lambda: None, expected=True)
        presence = Presence(self.job.directory.path)

        def still_possible() -> None:
            self.notes.check()
            self._check_runtime()
            if presence.is_lost():
                raise EnvironmentProblem(
                    f"the coordination directory {presence.path} can no longer be read on {socket.gethostname()}: "
                    "it was removed, or its storage is gone from this node"
                )
            gone = watch.gone()
            if gone and ready.read() is None:
                self._check_runtime()
                raise PartnerGone(f"{gone}, before its server was ready{self._runtime_log_tail()}")

        def endpoint() -> Endpoint | None:
            flag = ready.read()
            server = self.job.directory.read_server(flag) if flag else None
            if flag is None or server is None:
                return None
            if flag.by_hand:
                log.warning("runtime_ready.flag was set by hand; believing it")
            url, key = server
            return Endpoint(url, key, flag.job_id or self.runtime_job_id)

        what = f"the runtime job{' ' + self.runtime_job_id if self.runtime_job_id else ''} to be ready "
        try:
            return wait_for(
                f"{what}(RUNTIME_READY_TIMEOUT={deadline_s})",
                endpoint,
                deadline_s,
                still_possible=still_possible,
                sleep=self.notes.sleep,
            )
        except WaitTimeout as problem:
            disagree = "; runtime_ready.flag is here, but runtime_url.txt or runtime_api_key.txt is not what it names"
            raise WaitTimeout(f"{problem}{disagree if ready.read() else ''}") from None

    def runtime_ended(self) -> str | None:
        """Why the runtime has ended, in its own words, else by the end of its step; None where neither is known."""
        seen = self.step.ended_by_itself()  # first, since its flag is its last act
        flag = self.failed.read()
        if flag and flag.by_hand:
            return "runtime_failed.flag was set by hand"
        return f"the runtime job {flag.job_id} failed: {flag.reason}" if flag else seen

    def _check_runtime(self) -> None:
        if why := self.runtime_ended():
            raise PartnerGone(why)

    def _runtime_log_tail(self) -> str:
        text = read_if_there(self.job.directory.log("runtime", self.runtime_job_id, "err"))
        lines = (text or "").strip().splitlines()[-3:]
        return f"; the end of its log: {' | '.join(lines)}" if lines else ""

    def verify(self, endpoint: Endpoint) -> None:
        """Check address and key from this node, before a trainer depends on them."""
        client = RuntimeClient(endpoint.url, endpoint.key)

        def still_possible() -> None:
            self.notes.check()
            self._check_runtime()

        def healthy() -> bool | None:
            self._health = client.health()
            return self._health.ok or None

        try:
            wait_for(endpoint.url, healthy, VERIFY_DEADLINE_S, still_possible=still_possible, sleep=self.notes.sleep)
        except SuiteError as problem:
            if isinstance(problem, PartnerGone):
                raise
            raise PartnerGone(
                f"the runtime's server at {endpoint.url} cannot be reached from {socket.gethostname()}: "
                f"{self._health.words}; is the port open between the partitions (RUNTIME_PORT_RANGE)?"
            ) from None
        answer = client.check_key()
        if answer.status in {401, 403}:
            raise PartnerGone(f"the runtime's server at {endpoint.url} refused the key ({answer.words})")
        if not answer.ok and answer.status not in FOREIGN_SERVERS:
            raise PartnerGone(f"the runtime's server at {endpoint.url} is not well: GET /list answered {answer.words}")
        log.info("runtime server at %s answers and takes the key", endpoint.url)

    def prepare(self, trainer: Trainer, endpoint: Endpoint, node_folder: Path) -> TrainerEnvironment:
        """Make the trainer's folders and its ``training.env``; returns its environment."""
        for folder in trainer.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise EnvironmentProblem(f"cannot make {folder}: {problem.strerror}") from None
        ensure_task_yaml(self.job.settings, self.job.directory)
        settings, directory = self.job.settings, self.job.directory
        dot_env = read_dot_env(dot_env_file(settings, trainer))
        server = {URL_NAME: endpoint.url, **({KEY_NAME: endpoint.key} if endpoint.key else {})}
        own = {
            **server,
            "SKYRL_COORD_DIR": str(self.job.directory.path),
            "CHECKPOINT_DIR": str(trainer.checkpoint_dir),
            "ROLLOUT_DIR": str(trainer.rollout_dir),
            "CONTAINER_IMAGE": self.job.settings.container_image,
            "SKYRL_PYTHON": sys.executable,
            "SKYRL_AGENT_DIR": str(agent_code(settings, directory)),
            "PYTHONPATH": _with_path(
                self.job.environment.get("PYTHONPATH"), self.job.code, *import_folders(settings, directory)
            ),
            **snapshot_variables(settings, self.job.environment),
        }
        told = told_variables(
            self.deadline, self.job.settings, self.job.directory.path.name, {**self.job.environment, **dot_env}
        )
        own |= told
        base = trainer_environment(_without_recipients(self.job.environment), dot_env, own)
        host = RuntimeClient(endpoint.url, None).host
        environment = for_trainer(self.job.settings, base, agent_folder(self.job.settings), node_folder, host)
        values = env_file_values(environment.variables, dot_env, {**server, **told})
        write_atomically(self.job.directory.training_env, env_file_text(values), 0o600)
        return environment

    @contextlib.contextmanager
    def partner_watch(self, endpoint: Endpoint, heartbeat: Heartbeat) -> Iterator[Callable[[], str | None]]:
        """A function that says at once why the runtime is gone, or None.

        Flags and Slurm are asked in the background, each by itself. Where the server is not ours the runtime job beats
        by a counter in the directory, and so does this job.
        """
        patience_s = self.job.settings.partner_patience
        partner = PartnerWatch(
            "runtime",
            endpoint.runtime_job_id,
            self.job.scheduler,
            heartbeat.age_s,
            expected=True,
            patience_s=patience_s,
        )
        partners = self.job.directory.heartbeat("runtime", endpoint.runtime_job_id)
        counter: Counter | None = None

        def flags() -> str | None:
            nonlocal counter
            if counter is None and is_listed(partners):  # perhaps late: it is seen late, or its first beat failed
                counter = Counter(self.job.directory.heartbeat("training", self.job.job_id))
                partner.heartbeat_age_s = CounterWatch(partners).age_s
            if counter:
                counter.beat()
            return self.runtime_ended()

        with Lookout(flags, PARTNER_LOOK_EVERY_S) as flag, Lookout(partner.gone, PARTNER_LOOK_EVERY_S) as witness:
            yield lambda: flag.seen() or witness.seen()

    def early_stop(self, child: Child) -> EarlyStop:
        """What is done with this trainer when the time limit is near."""
        settings = self.job.settings
        checkpoints = checkpoints_of(settings, self.job.directory)
        return EarlyStop(settings, self.deadline, checkpoints, bool(self.chain.successor), child.send)

    def supervise(
        self,
        child: Child,
        partner_gone: Callable[[], str | None],
        canary: Child,
        cluster: RayCluster,
        early: EarlyStop,
    ) -> Outcome:
        """Wait for the trainer's end, a signal, the end of the partner or of a node, or the last checkpoint in time."""
        next_look = 0.0
        while (code := child.exit_code) is None:
            if self.notes.stop_signal is not None:
                return self._stopped_by_signal(child, self.notes.stop_signal, canary)
            if time.monotonic() >= next_look:
                if why := partner_gone():
                    return self._stopped(child, PartnerGone.exit_code, why, self._without_runtime(why))
                if why := cluster.lost():
                    return self._stopped(child, NodeLost.exit_code, why, Ended.INTERRUPTED)
                early.goes_on = bool(self.chain.successor)  # which may be queued late, or be taken out
                if checkpoint := early.saved():
                    early.goes_on = self.chain.waits()
                    if early.goes_on:
                        return self._stopped_to_go_on(child, checkpoint)
                next_look = time.monotonic() + PARTNER_LOOK_EVERY_S
            self._nap(child)
        child.kill()  # the rest of its group; its last words stand in the log before ours
        return self._ended_by_itself(child, code, canary, cluster, early)

    def _ended_by_itself(
        self, child: Child, code: int, canary: Child, cluster: RayCluster, early: EarlyStop
    ) -> Outcome:
        """The outcome of a trainer that was not stopped by us: of a fault elsewhere, of a signal, or its own."""
        if code or self.chain.successor or canary.exit_code is not None:
            self.notes.sleep(CANARY_S)  # where Slurm signals every process, the trainer may have ended first
        told = early.killed_by_it(code)
        if code and not told and self.notes.stop_signal is None and (lost := self._lost_meanwhile(code, cluster)):
            return self._as_signalled(lost)
        if self.notes.stop_signal is not None:
            return self._stopped_by_signal(child, self.notes.stop_signal, canary)
        if told:
            return Outcome(code, f"{ended(code)}, which announced the time limit", Ended.INTERRUPTED)
        return Outcome(code, ended(code), Ended.FAILED if code else Ended.COMPLETED)

    def _lost_meanwhile(self, code: int, cluster: RayCluster) -> Outcome | None:
        """The outcome where a trainer has failed for want of a node or of its runtime, which it notices before us.

        A signal ends the wait for either: what took them away often takes this job too.
        """
        end = time.monotonic() + (NODE_WORD_S if cluster.steps else 0.0)
        while (why := cluster.lost()) is None and self.notes.stop_signal is None and time.monotonic() < end:
            self.notes.sleep(LOOK_EVERY_S)
        if why:
            return Outcome(NodeLost.exit_code, f"{why}; {ended(code)}", Ended.INTERRUPTED)
        return self._lost_runtime(code) if self.chain.successor else None

    def _lost_runtime(self, code: int) -> Outcome | None:
        """The outcome where a trainer has failed because its sandboxes were gone, and stay so, or were for a moment."""
        end = time.monotonic() + SERVER_BACK_S
        while (why := self.runtime_ended()) is None and self.notes.stop_signal is None:
            if self._answers():
                return self._met_a_restart(code)
            if time.monotonic() > end:
                why = "the runtime does not answer"
                break
            self.notes.sleep(LOOK_EVERY_S)
        if why is None:
            return None
        return Outcome(PartnerGone.exit_code, f"the trainer failed, and {why}", self._without_runtime(why))

    def _met_a_restart(self, code: int) -> Outcome | None:
        """The outcome where the API server was started again just before: its open requests had no answer.

        A trainer that fails of something else then costs one attempt; none begins without a new checkpoint.
        """
        ago = self.server_restarted_s_ago()
        if ago is None or ago > RESTART_FELT_S:
            return None
        reason = f"{ended(code)}, {ago:.0f} s after the API server was started again"
        return Outcome(code, reason, Ended.INTERRUPTED)

    def _answers(self) -> bool:
        """Whether the server answers; yes where none is known."""
        url = self.job.directory.read_url()
        return url is None or RuntimeClient(url, None).ask("GET", "/health", QUICK_TIMEOUT_S).ok

    def _nap(self, child: Child) -> None:
        """Wait a little, but not past the trainer's end or a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(LOOK_EVERY_S)

    def _stopped_by_signal(self, child: Child, number: int, canary: Child) -> Outcome:
        """Pass the signal on, unless the trainer has had it: a second one makes many programs drop their checkpoint.

        ``scancel`` signals every process of the job, ``scancel --batch`` and a local launcher this one alone; the
        canary tells which it was.
        """
        name = signal.Signals(number).name
        log.warning("received %s; stopping the trainer", name)
        self.chain.call_off()
        if not canary.wait(CANARY_S):
            child.send(number)
        end = time.monotonic() + max(1.0, self.kill_wait_s - 2.5)
        cause = why_ended(self.job, "training", self.deadline.by_this_hosts_clock)
        child.wait(max(0.0, end - time.monotonic()))
        child.kill()
        code = child.exit_code
        own = code if code not in {None, 0} else EXIT_SIGNAL_BASE + number
        reason = f"ended by {name} ({cause.value}); {ended(code or 0)}"
        return Outcome(own or EXIT_SIGNAL_BASE + number, reason, cause.ended)

    def _stopped_to_go_on(self, child: Child, checkpoint: str) -> Outcome:
        log.warning("the trainer has saved (%s); stopping it, to go on in the next job", checkpoint)
        child.stop(GRACE_S)
        reason = f"stopped at its checkpoint ({checkpoint}) before the time limit"
        return self._as_signalled(Outcome(EXIT_TIMEOUT, reason, Ended.INTERRUPTED))

    def _stopped(self, child: Child, code: int, why: str, how: Ended) -> Outcome:
        log.error("%s; stopping the trainer, which has %.0f s", why, STOP_GRACE_S)
        begin = time.monotonic()
        child.stop(STOP_GRACE_S)
        if code == PartnerGone.exit_code:  # who ends both jobs may signal this one a moment later
            self.notes.sleep(max(0.0, SIGNAL_SOON_S - (time.monotonic() - begin)))
        return self._as_signalled(Outcome(code, why, how))

    def _as_signalled(self, outcome: Outcome) -> Outcome:
        """The same, or what a signal means that came in the meantime: scancel may end another node's part first."""
        if self.notes.stop_signal is None:
            return outcome
        cause = why_ended(self.job, "training", self.deadline.by_this_hosts_clock)
        return replace(outcome, reason=f"{outcome.reason}; meanwhile ended by {cause.value}", ended=cause.ended)

    def _without_runtime(self, why: str) -> Ended:
        """What a training's end for want of its runtime is: a person's word if it was that of the runtime's end.

        Of a step that left no flag only its end is known; what it was told by Slurm stands in its log, if at all.
        """
        flag = self.failed.read()
        said = flag.ended == Ended.CANCELLED if flag else self.step.ended() is None and "CANCELLED" in why
        return Ended.CANCELLED if said or self.by_hand.read() else Ended.INTERRUPTED


def snapshot_of(job: JobContext) -> Path | None:
    """The run's copy of skyrl-agent; None where it uses the original."""
    copy = job.directory.agent
    if not job.settings.snapshot:
        return None
    if not job.was_launched:
        raise UsageError(
            "SNAPSHOT=1: launch.py takes the copy, and this job was given to sbatch directly; use launch.py "
            "(to join a runtime: SKYRL_COORD_DIR=DIR launch.py --skip-runtime), or leave SNAPSHOT unset and train with "
            "the original"
        )
    if not is_listed(copy):
        raise EnvironmentProblem(
            f"SNAPSHOT=1: the run's copy of skyrl-agent, {copy}, is not to be seen on {socket.gethostname()}: it was "
            "removed, or its storage is not well; launch again"
        )
    return copy


def ended(code: int) -> str:
    """How a trainer ended, in words."""
    if code > EXIT_SIGNAL_BASE:
        with contextlib.suppress(ValueError):
            return f"the trainer was ended by {signal.Signals(code - EXIT_SIGNAL_BASE).name}"
    return "the trainer ended" if code == 0 else f"the trainer failed with exit code {code}"


def start_canary() -> Child:
    """A process that does nothing but die of the signals that every process of the job gets."""
    return Child(ChildSpec(("sleep", "infinity"), {"PATH": os.defpath}, "the canary"), stop_grace_s=0.0)


def start_trainer(trainer: Trainer, environment: Mapping[str, str]) -> Child:
    """Start it: stdout straight into ``.out``; stderr into ``.out``, and what may be a problem into ``.err`` too."""
    log.info("starting the trainer in %s", trainer.cwd)
    spec = ChildSpec(trainer.argv, environment, "the trainer", cwd=trainer.cwd, stderr=subprocess.PIPE)
    child = Child(spec)
    to_out, to_err = write_through(sys.stdout), write_through(sys.stderr)

    def sink(line: bytes) -> None:
        to_out(line)
        if not CHATTER.search(line[:100]):
            to_err(line)

    child.copy_stderr(sink)
    return child


def _without_recipients(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without NOTIFY: a webhook's address is a secret that no trainer needs."""
    return {name: value for name, value in environment.items() if name != "NOTIFY"}


def _with_path(path: str | None, *folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), *([path] if path else [])])
