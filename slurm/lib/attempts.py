"""The attempts at one training: each records itself, queues the next one while it runs, and takes it back if need be.

All attempts share the run's directory. ``attempt_<n>.json`` says who they were and where their checkpoints stood when
they began. The next pair waits in the queue for this training job's end, however that comes about, and then decides by
``restarts`` whether it begins; where this job knows that nothing is to follow, it cancels the pair itself.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from slurm.lib.checkpoints import Checkpoints
from slurm.lib.config import LoadedConfig
from slurm.lib.coordination import (
    CoordinationDir,
    Flag,
    FlagReader,
    parse_object,
    read_if_there,
    tail_if_there,
    write_atomically,
)
from slurm.lib.errors import EXIT_SIGNAL_BASE, EnvironmentProblem, SuiteError, WaitTimeout
from slurm.lib.interpreter import MARK_NAME
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.lookout import NOTE_EVERY_S, Lookout
from slurm.lib.notify import ended_by, tell
from slurm.lib.plan import AFTER, ATTEMPT, LaunchPlan, Request, Restart, make_plan
from slurm.lib.restarts import Cause, Ended, Verdict, cause_of, verdict
from slurm.lib.run_record import WORKER_KINDS, partner_of, recorded_git
from slurm.lib.scheduler import JobState, JobStatus
from slurm.lib.settings import Settings
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.submission import submit
from slurm.lib.waiting import wait_for

SCHEMA = 1
FLAG_DEADLINE_S = 60.0  # an NFS client may believe for so long what it saw before (nfs(5): acdirmax)
# A Slurm that is silent as the next attempt is queued holds up the trainer for no longer than this, and is then asked
# beside it. Its patience ends well before other launches take what is held for a dead launcher's (DEAD_AFTER_S of
# leftovers.py, 900 s after the first sbatch): the last commands take minutes of their own.
START_S, QUEUE_PATIENCE_S = 15.0, 600.0
# As this job ends, there is so much time to take back what was begun: launch.py cancel gives a job 8 s, Slurm KillWait.
TAKE_BACK_S = 7.0
GIVEN_UP_S = 2.0  # in which it is seen that a command was killed; between two looks for a job lie 1.5 s
ASK_AT_END_S = 2.0  # of a job that is being ended: Slurm's KillWait is 30 s by default
STDERR_TAIL = 4096  # bytes


@dataclass(frozen=True)
class Attempt:
    """What ``attempt_<n>.json`` holds: its number, its jobs, its checkpoints at its start, and the jobs that follow."""

    attempt: int
    jobs: Mapping[str, str]
    checkpoint: str
    successor: Mapping[str, str] = field(default_factory=dict)

    def write(self, directory: CoordinationDir) -> None:
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2)
        write_atomically(directory.attempt(self.attempt), text + "\n")


def checkpoint_at_start(directory: CoordinationDir, number: int) -> str:
    """Where the checkpoints stood when the attempt began; empty where it did not say."""
    said = parse_object(read_if_there(directory.attempt(number))).get("checkpoint")
    return said if isinstance(said, str) else ""


def checkpoints_of(settings: Settings, directory: CoordinationDir) -> Checkpoints:
    """Where the run saves."""
    folder = settings.checkpoint_dir or directory.checkpoints
    return Checkpoints(folder, settings.wandb_experiment, tracked=settings.saves_like_verl)


def number_of(environment: Mapping[str, str]) -> int:
    """Which attempt this job belongs to, from 1; 0 for one that cannot be restarted."""
    said = environment.get(ATTEMPT, "")
    return int(said) if said.isdigit() else 0


# --- before a restart begins -----------------------------------------------------------------------------------------


def refused(job: JobContext, kind: str, notes: SignalNotes) -> int | None:
    """For both jobs of a restart: the exit code to end with at once, or None where the attempt begins."""
    after = job.environment.get(AFTER)
    if not after:
        return None
    try:
        decided = judge(job, after, notes)
    except Interrupted as stop:
        log.error("ended by %s before it began", stop)
        return EXIT_SIGNAL_BASE + stop.number
    number = number_of(job.environment)
    if decided.goes_on:
        log.info("attempt %d: %s", number, decided.reason)
        return None
    (log.error if decided.exit_code else log.info)("attempt %d does not begin: %s", number, decided.reason)
    if kind == "runtime":
        _withdraw(job)
    tell(job, ended_by(job.directory, after, decided.exit_code, decided.reason)).finish()
    return decided.exit_code


def judge(job: JobContext, after: str, notes: SignalNotes) -> Verdict:
    """The verdict about going on after the training job ``after``."""

    def own_word(flag: Flag) -> bool:  # not what its runtime job said for it, without an exit code
        return flag.job_id == after and flag.exit_code is not None

    reader = FlagReader.of_new_directory(job.directory.training_complete, own_word)
    status = job.scheduler.status(after)
    if reader.read() is None and _ended_in_order(status):
        _await_flag(reader, after, notes)
    before = checkpoint_at_start(job.directory, number_of(job.environment) - 1)
    return verdict(after, reader.read(), status, before, checkpoints_of(job.settings, job.directory).mark())


def _ended_in_order(status: JobStatus) -> bool:
    """Whether the job's process ended by itself as far as Slurm knows: then there should be a flag."""
    return status.words.partition(",")[0] in {"COMPLETED", "FAILED"}


def _await_flag(reader: FlagReader, after: str, notes: SignalNotes) -> None:
    what = f"the completion flag of job {after}"
    try:
        wait_for(what, reader.read, FLAG_DEADLINE_S, still_possible=notes.check, sleep=notes.sleep)
    except WaitTimeout as problem:
        log.warning("%s", problem)


def _withdraw(job: JobContext) -> None:
    """Take this attempt's training job out of the queue; one that runs already sees for itself that it is over."""
    training = partner_of(job.directory, "runtime", job.job_id)
    if training and job.scheduler.status(training).state is not JobState.RUNNING:
        complaint = job.scheduler.cancel([training])
        log.info("cancelled the training job %s%s", training, f" ({complaint})" if complaint else "")


# --- while an attempt runs -------------------------------------------------------------------------------------------


def queue_next(job: JobContext, number: int, notes: SignalNotes) -> dict[str, str]:
    """Queue the attempt after this job, number ``number``; its jobs' ids by kind. ``SubmissionError`` says why not.

    Waits for a Slurm that does not answer.
    """
    plan = next_plan(job, number)
    checkout = plan_checkout(job)
    return submit(plan, notes, lambda: recorded_git(job.directory), checkout, patience_s=QUEUE_PATIENCE_S).jobs


def plan_checkout(job: JobContext) -> Path:
    """The checkout that the run was launched from."""
    return Path(job.environment.get("SKYRL_CHECKOUT") or job.code)


def next_plan(job: JobContext, number: int) -> LaunchPlan:
    """What a launch of this attempt would do."""
    return plan_here(job, Request(attach_dir=job.directory.path, restart=Restart(number, job.job_id)))


def plan_here(job: JobContext, request: Request) -> LaunchPlan:
    """What a launch would do with this job's settings and environment, in this run's directory."""
    config = LoadedConfig(job.settings, exported={}, sources={}, files=(), warnings=())
    python, mark = job.environment["SKYRL_PYTHON"], job.environment.get(MARK_NAME, "")
    return make_plan(config, request, job.environment, plan_checkout(job), python, datetime.now(), mark=mark)


class Chain:
    """This attempt among the others, for its training job.

    ``successor``: the jobs of the next attempt by kind, empty where none is queued, or not yet.
    """

    def __init__(self, job: JobContext) -> None:
        self.job = job
        self.number = number_of(job.environment)
        self.successor: dict[str, str] = {}
        self._queueing: Lookout[bool] | None = None
        self._called_off = SignalNotes()  # by which the queueing is stopped, which knows of no other signal

    def begin(self, runtime_job_id: str, still_possible: Callable[[], None]) -> None:
        """Record the attempt and queue the next one, where RESTARTS allows one. A refusal of Slurm's is a warning.

        While Slurm does not answer it is asked in the background, from 15 s on beside the trainer. ``still_possible``
        raises the reason why this attempt does not begin.
        """
        restarts = self.job.settings.restarts
        if not restarts:
            return
        if not self.number:
            log.warning("RESTARTS=%d has no effect: this job is not one of a pair that was launched together", restarts)
            return
        jobs = {"runtime": runtime_job_id, "training": self.job.job_id}
        attempt = Attempt(self.number, jobs, checkpoints_of(self.job.settings, self.job.directory).mark())
        self._record(attempt)
        log.info("attempt %d of at most %d, from %s", self.number, restarts + 1, attempt.checkpoint or "the beginning")
        if self.number <= restarts:
            self._queueing = Lookout(lambda: self._queue_next(attempt)).__enter__()  # which ends with its first look
            try:
                self._await_queued(self._queueing, still_possible)
            except BaseException:
                self.call_off()  # while the rest of this job ends
                raise

    @staticmethod
    def _await_queued(queueing: Lookout[bool], still_possible: Callable[[], None]) -> None:
        end = time.monotonic() + START_S
        while not queueing.wait(NOTE_EVERY_S):
            still_possible()
            if time.monotonic() > end:
                log.warning("the next attempt is not queued yet; the trainer starts meanwhile")
                return
        queueing.seen()

    def _record(self, attempt: Attempt) -> None:
        try:
            attempt.write(self.job.directory)
        except EnvironmentProblem as problem:
            log.warning("%s; without it a restart counts every checkpoint as a new one", problem)

    def _queue_next(self, attempt: Attempt) -> bool:
        """Queue it, and say so in the log and in the attempt's record; True once there is nothing more to be done."""
        try:
            self.successor = queue_next(self.job, self.number + 1, self._called_off)
        except Interrupted:
            return True
        except SuiteError as problem:
            log.warning("there will be no restart: %s. %s", problem, self._by_hand())
            return True
        except Exception as fault:  # in this thread nobody else would hear of it
            words = f"an internal error ({type(fault).__name__}: {fault})"
            log.exception("there will be no restart: no further attempt is queued, for %s. %s", words, self._by_hand())
            return True
        log.info("if it is interrupted it goes on in the jobs %s", ", ".join(self.successor.values()))
        self._record(replace(attempt, successor=self.successor))
        return True

    def call_off(self) -> None:
        """This attempt is about to end: take back what is being queued. Waits for nothing."""
        if self._is_queueing():
            self._called_off.note(signal.SIGTERM)

    def _is_queueing(self, seconds: float = 0.0) -> bool:
        return self._queueing is not None and not self._queueing.wait(seconds)

    def settle(self, seconds: float) -> bool:
        """The same, and wait for its end, for so long but no longer than ``TAKE_BACK_S``; False if it goes on."""
        self.call_off()
        return not self._is_queueing(min(seconds, TAKE_BACK_S))

    def _give_up(self) -> None:
        """End the command by which Slurm is still asked, and any that would follow, so that none is taken any more."""
        end = time.monotonic() + GIVEN_UP_S
        if self._queueing is not None:
            self._queueing.dismiss(GIVEN_UP_S)
            self._is_queueing(max(0.0, end - time.monotonic()))

    def _by_hand(self) -> str:
        found = checkpoints_of(self.job.settings, self.job.directory)
        pairs = {"CHECKPOINT_DIR": found.folder, "WANDB_EXPERIMENT": found.experiment}
        words = shlex.join(word for name, value in pairs.items() for word in ("--set", f"{name}={value}"))
        return f"To go on from its checkpoints, launch it again with: {words}"

    def waits(self) -> bool:
        """Whether the next attempt is still in the queue; a person may have taken it out."""
        if self.successor and self.job.scheduler.status(self.successor["training"]).state.is_final:
            log.warning("the next attempt was taken out of the queue; this one goes on to its end")
            self.successor = {}
        return bool(self.successor)

    def _waiting(self) -> list[str]:
        """What is cancelled of the next attempt: both jobs, or the one heterogeneous job, by its first component.

        The last of them is the runtime job, for whose start or end its workers wait.
        """
        kinds = ("training",) if self.job.settings.pairing == "het" else ("training", *WORKER_KINDS, "runtime")
        return [self.successor[kind] for kind in kinds if kind in self.successor]

    def conclude(self, ended: Ended, left_s: float = math.inf) -> None:
        """At the end of this attempt, within ``left_s`` seconds: leave the next one in the queue, or take it out."""
        if not self.settle(left_s):
            self._give_up()
            log.warning(
                "the next attempt was still being queued; what Slurm may have taken of it is held, and a later launch "
                "removes it, or has just been let go: look with squeue --me"
            )
        if ended is Ended.INTERRUPTED and self.successor:
            log.info("it goes on in the jobs %s", ", ".join(self.successor.values()))
        elif ended is Ended.INTERRUPTED and self.job.settings.restarts:
            log.warning("no further attempt is queued. %s", self._by_hand())
        elif self.successor:
            complaint = self.job.scheduler.cancel(self._waiting())
            log.info("cancelled the next attempt, which is not needed%s", f" ({complaint})" if complaint else "")


def why_ended(job: JobContext, kind: str, known_end: float | None) -> Cause:
    """Why Slurm, or a person, sends SIGTERM to this job of ``kind``; takes at most about two seconds.

    ``known_end`` is its time limit as it was known before, in epoch seconds of this host's clock.
    """
    facts = job.scheduler.facts(job.job_id, ASK_AT_END_S)
    stderr = tail_if_there(job.directory.log(kind, job.job_id, "err"), STDERR_TAIL)
    return cause_of(facts, known_end, stderr, job.job_id, time.time())
