"""What does a runtime job do while its training job waits for GPUs: say what it holds, give its node back, or end?

Only Slurm's word that the training is pending counts, never its silence. Giving back means a new pair of jobs in the
same run directory, in this order: the new pair is submitted held; the old training is cancelled if still pending;
Slurm says what became of it; the new pair is released. So the run is in the queue at every moment, and a body that is
killed in between leaves at worst a held pair, which cannot start.
"""

from __future__ import annotations

import enum
import math
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from slurm.lib.attempts import number_of, plan_checkout, plan_here, why_ended
from slurm.lib.deadlines import own_end
from slurm.lib.errors import EXIT_OK, EXIT_SUBMISSION, EXIT_TIMEOUT, SubmissionError, WaitTimeout
from slurm.lib.job_context import JobContext
from slurm.lib.logs import log
from slurm.lib.lookout import answered
from slurm.lib.plan import AFTER, Request, Requeue
from slurm.lib.preflight.words import duration, size
from slurm.lib.restarts import Cause
from slurm.lib.run_record import recorded_git, recorded_with
from slurm.lib.scheduler import JobState, JobStatus, Slurm, is_silence
from slurm.lib.settings import Settings
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.submission import submit
from slurm.lib.waiting import wait_for

FIRST_WORD_S = 300.0  # GPUs that come sooner need no word
LONGEST_PAUSE_S = 3600.0  # between two words, or two attempts to give back; both double up to it
ASK_AGAIN_S = 60.0  # sites forbid polling their controller more often
# What a new runtime job needs before the GPUs come: a place in the CPU queue, and its image.
BEFORE_GPUS_S = 600.0
# Slurm expects every job to last until its time limit, so GPUs come sooner, and the run is not in the queue for them
# before its runtime job has started.
MOST_ABSENT_S = 3600
CERTAIN_WITHIN_S = 900.0  # of a controller's silence; a job that was cancelled as it started ends within KillWait
RELEASE_PAUSES_S = (0.0, 2.0, 10.0, 30.0)  # before each attempt; a controller that has just taken two jobs is busy


class Step(enum.Enum):
    """What a look at the wait leads to."""

    GO_ON = "go on"
    GIVE_BACK = "give the node back"
    END = "end"


@dataclass(frozen=True)
class Wait:
    """The wait of a training job for GPUs: its state, for how long it has been so, and what is left to the runtime job.

    ``left_s`` is None where no time limit is known.
    """

    status: JobStatus
    idle_s: float
    left_s: float | None = None

    @property
    def is_pending(self) -> bool:
        """Whether it waits for nodes; one that is CONFIGURING has them, and they boot."""
        return self.status.state is JobState.PENDING and self.status.words.startswith("PENDING")

    @property
    def is_held(self) -> bool:
        """Whether a person or an administrator keeps it from starting: that a new job would not inherit."""
        return "JobHeld" in self.status.words


@dataclass(frozen=True)
class Decision:
    """What to do, and the reason as a sentence; ``is_late`` where a training could not begin any more."""

    step: Step = Step.GO_ON
    reason: str = ""
    is_late: bool = False


def decide(settings: Settings, wait: Wait) -> Decision:
    """What the runtime job does about this wait; pure."""
    limit = settings.runtime_idle_limit
    may_give_back = bool(limit) and not wait.is_held
    if not wait.is_pending:
        return Decision()
    if settings.min_run_time and wait.left_s is not None and wait.left_s < settings.min_run_time:
        left = f"{duration(max(0.0, wait.left_s))} are left of this job's time limit"
        reason = f"{left}, less than MIN_RUN_TIME={settings.min_run_time} s: the training could not begin any more"
        return Decision(Step.GIVE_BACK if may_give_back else Step.END, reason, is_late=True)
    if may_give_back and wait.idle_s >= limit:
        return Decision(Step.GIVE_BACK, f"RUNTIME_IDLE_LIMIT={limit} s allows no more")
    return Decision()


def begin_in_s(starts_at: float | None, now: float) -> int:
    """Seconds before which a new runtime job is not to start, where Slurm expects its training to at ``starts_at``."""
    return max(0, min(MOST_ABSENT_S, math.floor((starts_at or 0.0) - BEFORE_GPUS_S - now)))


def holdings(settings: Settings, environment: Mapping[str, str]) -> str:
    """What this job holds, by Slurm's word where there is one: CPUs, memory, node."""
    cpus = environment.get("SLURM_CPUS_ON_NODE", "")
    megabytes = environment.get("SLURM_MEM_PER_NODE", "")
    memory = size(int(megabytes) * 1024**2) if megabytes.isdigit() else settings.runtime_memory
    return f"{cpus or settings.cpus_for_runtime} CPUs and {memory} of memory on {socket.gethostname()}"


@dataclass(frozen=True)
class Conclusion:
    """Why the runtime job ends: its exit code, a sentence, and whether the run goes on without it."""

    exit_code: int
    reason: str
    goes_on: bool = False


@dataclass
class IdleWatch:
    """Watches the wait of this runtime job's training for GPUs; of no other's, and not where no Slurm is.

    ``clock`` counts seconds. ``over`` is set once the training has started.
    """

    job: JobContext
    notes: SignalNotes
    clock: Callable[[], float] = time.monotonic
    over: bool = False
    _began: float = field(init=False)
    _asked_at: float = field(default=-math.inf, init=False)
    _word_at: float = field(init=False)
    _try_at: float = field(init=False)
    _late_at: float = field(default=math.inf, init=False)
    _pause_s: float = field(default=ASK_AGAIN_S, init=False)  # after the next attempt to give back that fails

    def __post_init__(self) -> None:
        settings = self.job.settings
        self.over = self.over or self.job.is_local
        self._began = self.clock()
        self._word_at = self._began + FIRST_WORD_S
        self._try_at = self._began + settings.runtime_idle_limit if settings.runtime_idle_limit else math.inf
        if settings.min_run_time and not self.over:
            job = self.job
            self._know_end(answered(lambda: own_end(job.job_id, job.environment, job.scheduler), self.notes))

    def look(self, heard: bool) -> Conclusion | None:
        """Why this job ends, or None; to be asked often. ``heard`` says that the training has started.

        Slurm is asked only when there may be something to say or to do, and at most once a minute. ``Interrupted`` by a
        signal, also while Slurm does not answer.
        """
        self.over = self.over or heard
        if self.over or self.clock() < self._next_question():
            return None
        self._asked_at = self.clock()
        training = recorded_with(self.job.directory, "runtime", self.job.job_id)
        return self._asked(training) if training else None

    def _next_question(self) -> float:
        return max(min(self._word_at, self._try_at, self._late_at), self._asked_at + ASK_AGAIN_S)

    def _know_end(self, ends_at: float | None) -> None:
        """Plan the question whether it is too late; a second after it has become so."""
        left = math.inf if ends_at is None else ends_at - time.time()
        self._late_at = self.clock() + left - self.job.settings.min_run_time + 1

    def _asked(self, training: str) -> Conclusion | None:
        scheduler = self.job.scheduler
        status = answered(lambda: scheduler.status(training), self.notes)
        self.over = status.state is JobState.RUNNING
        ends_at = None if self.over else answered(lambda: scheduler.facts(self.job.job_id), self.notes).ends_at
        left = None if ends_at is None else ends_at - time.time()
        wait = Wait(status, self.clock() - self._began, left)
        if self.job.settings.min_run_time and ends_at is not None:
            self._know_end(ends_at)  # an administrator may have given it more time
        decision = decide(self.job.settings, wait)
        if decision.step is Step.GIVE_BACK and (decision.is_late or self.clock() >= self._try_at):
            return self._give_back(training, wait, decision)
        if decision.step is Step.END:
            return Conclusion(EXIT_TIMEOUT, self._story(training, wait, decision.reason))
        self._go_on(training, wait)
        return None

    def _go_on(self, training: str, wait: Wait) -> None:
        now = self.clock()
        if wait.is_pending and now >= self._word_at:
            log.info("%s", self._word(training, wait))
            self._word_at = now + min(max(FIRST_WORD_S, wait.idle_s), LONGEST_PAUSE_S)
        if wait.is_held and now >= self._try_at:
            self._later()

    def _later(self) -> None:
        self._try_at = self.clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _word(self, training: str, wait: Wait) -> str:
        """What a long wait costs, for the log."""
        at, now = wait.status.starts_at, time.time()
        known = at is not None and at > now and not wait.is_held
        expected = f"Slurm expects it to start in {duration((at or now) - now)}" if known else "Slurm gives no time"
        since = time.strftime("%H:%M:%S", time.localtime(now - wait.idle_s))
        left = "" if wait.left_s is None else f", and has {duration(max(0.0, wait.left_s))} left of its time limit"
        held = holdings(self.job.settings, self.job.environment)
        return (
            f"the training job {training} waits for GPUs ({wait.status.words}); {expected}. Meanwhile this job holds "
            f"{held}, ready since {since} ({duration(wait.idle_s)}){left}"
        )

    @staticmethod
    def _story(training: str, wait: Wait, reason: str) -> str:
        words = f"the training job {training} has waited {duration(wait.idle_s)} for GPUs ({wait.status.words})"
        return f"{words}, and {reason}"

    def _give_back(self, training: str, wait: Wait, decision: Decision) -> Conclusion | None:
        swap = Swap(self.job, training, self.notes)
        story = self._story(training, wait, decision.reason)
        log.info("%s; queueing both jobs again", story)
        try:
            jobs = queue_again(self.job, begin_in_s(wait.status.starts_at, time.time()), self.notes, swap)
        except SubmissionError as problem:
            self.over = swap.has_started
            return self._kept(story, decision, problem)
        return concluded(story, jobs, swap)

    def _kept(self, story: str, decision: Decision, problem: SubmissionError) -> Conclusion | None:
        """The node was not given back; a run that can no longer begin is not worth another attempt."""
        if decision.is_late and not self.over:
            return Conclusion(EXIT_TIMEOUT, f"{story}; it could not be queued again: {problem}")
        first = problem.leaves_jobs or (self._pause_s == ASK_AGAIN_S and not self.over)
        self._later()
        if problem.leaves_jobs:  # held, and known by no id perhaps: another attempt might leave more
            self._try_at = math.inf
        tries = not self.over and math.isfinite(self._try_at)
        what = f"; trying again in {duration(self._try_at - self.clock())}" if tries else ""
        (log.warning if first else log.info)("this job keeps its node: %s%s", problem, what)
        return None


def concluded(story: str, jobs: Mapping[str, str], swap: Swap) -> Conclusion:
    """The end of a runtime job whose run goes on in the new ``jobs``."""
    ids = ", ".join(jobs.values())
    if swap.still_held:
        fix = f"let them start with: scontrol release {jobs['runtime']}"
        reason = f"{story}; the run is queued again as the jobs {ids}, which are held ({swap.still_held}): {fix}"
        return Conclusion(EXIT_SUBMISSION, reason)
    return Conclusion(EXIT_OK, f"{story}; the run is queued again as the jobs {ids}", goes_on=True)


def queue_again(job: JobContext, begin_in: int, notes: SignalNotes, swap: Swap) -> dict[str, str]:
    """Submit this attempt's pair once more, its runtime job in place of this one; the new jobs' ids by kind.

    ``SubmissionError`` says why the pair in the queue stayed the old one.
    """
    after = job.environment.get(AFTER, "")
    requeue = Requeue(number_of(job.environment), after, job.job_id, begin_in)
    plan = plan_here(job, Request(attach_dir=job.directory.path, requeue=requeue))
    return submit(plan, notes, lambda: recorded_git(job.directory), plan_checkout(job), release=swap).jobs


@dataclass
class Swap:
    """The moment at which the new pair takes the place of the old one: takes the old ``training`` out, lets the new
    runtime job start. Raises where the old pair is to stay; then ``has_started`` says whether the old training has.

    Once the old training is out of the queue for certain only a person's end of this job is raised; ``still_held`` says
    why the new pair could not be released.
    """

    job: JobContext
    training: str
    notes: SignalNotes
    has_started: bool = False
    still_held: str = ""

    def __call__(self, slurm: Slurm, runtime: str) -> None:
        status = answered(lambda: slurm.status(self.training), self.notes)
        if not Wait(status, 0.0).is_pending:  # a person has cancelled it, or it has started
            raise self._not_out(status)
        complaint = slurm.cancel_pending(self.training)
        if complaint and not is_silence(complaint):  # a silent Slurm may do it later: the new pair must be there then
            raise SubmissionError(f"the training job {self.training} could not be cancelled: {complaint}")
        try:
            status = self._certain(slurm)
        except WaitTimeout as problem:  # the cancellation was said; only what came of it is not known
            self.still_held = str(problem)
            return
        if status.state is not JobState.PURGED and not status.words.startswith("CANCELLED"):
            raise self._not_out(status)
        self._release(slurm, runtime)

    def _not_out(self, status: JobStatus) -> SubmissionError:
        self.has_started = status.state is JobState.RUNNING
        what = "may not wait" if status.state is JobState.UNKNOWN else "does not wait"
        return SubmissionError(f"the training job {self.training} {what} any more ({status.words})")

    def _certain(self, slurm: Slurm) -> JobStatus:
        """Slurm's word, once it is one that will not change; a cancellation that changed nothing is said again."""

        def word() -> JobStatus | None:
            status = slurm.status(self.training)
            if Wait(status, 0.0).is_pending:
                slurm.cancel_pending(self.training)  # a complaint is told by the next status
            open_yet = status.state in {JobState.PENDING, JobState.UNKNOWN} or "COMPLETING" in status.words
            return None if open_yet else status

        what = f"Slurm to say what became of the training job {self.training}"
        return wait_for(what, word, CERTAIN_WITHIN_S, still_possible=self._unless_cancelled, pause=_growing)

    def _unless_cancelled(self) -> None:
        """Raise if a person ends this job: the run is not to go on. After a time limit or preemption it is."""
        number = self.notes.stop_signal
        if number is not None and why_ended(self.job, "runtime", None) is Cause.PERSON:
            raise Interrupted(number)

    def _release(self, slurm: Slurm, runtime: str) -> None:
        for pause in RELEASE_PAUSES_S:
            time.sleep(pause)
            self._unless_cancelled()
            self.still_held = _release_complaint(slurm, runtime)
            if not self.still_held:
                return


def _growing(waited_s: float) -> float:
    """Seconds to the next question: a controller that is busy is asked less and less."""
    return max(1.0, waited_s / 3)


def _release_complaint(slurm: Slurm, job_id: str) -> str:
    try:
        slurm.release(job_id)
    except SubmissionError as problem:
        return str(problem)
    return ""
