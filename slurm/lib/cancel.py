"""How do runs end that are to be cancelled: within 15 s, and with a word about each job?

A job body that is told alone (``scancel --batch``) ends its job in order: the trainer may save, sandboxes go, flags say
why. So bodies are told first, and those that are left after 8 s are killed, whereupon Slurm and their guardians end the
rest. They are not cancelled before: Slurm would give them KillWait, 30 s by default, and takes no signal for a job that
it is ending. Which step is due is decided by ``due``, from what Slurm says.

Workers are tasks of arrays, each ended by itself: Slurm tries for ten seconds to signal what is in the queue yet, and
signals what starts meanwhile. Only what waits is taken out by the array, of all tasks at once, before others are told:
a node that gets free would be the next one's.
"""

from __future__ import annotations

import enum
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from slurm.lib.coordination import Flag
from slurm.lib.endings import End, note_ends
from slurm.lib.errors import EXIT_SIGNAL_BASE, EnvironmentProblem
from slurm.lib.logs import log
from slurm.lib.lookout import Lookout
from slurm.lib.restarts import Ended
from slurm.lib.runs import FoundRun, RunJob, stranger
from slurm.lib.scheduler import JobState, JobStatus, LocalJobs, Slurm
from slurm.lib.signals import SignalNotes

KILL_AFTER_S, CANCEL_AFTER_S = 8.0, 10.0
END_S = 12.0  # of all: 15 s are promised, of which a busy host needs some for the start and the end of Python
SLOWEST_START_S = 1.5  # of Python on a busy host, as far as it is made up for
COMMAND_S = 3.0  # one question or order, to a controller that may be silent
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 0.5
# Whose a job is Slurm is asked beside its state: of few jobs at once, of many only of those that live. A trainer needs
# its 8 s: where Slurm does not say it, a job that was named is ended after a while as its record has it. The others,
# which are sure, wait for less.
ASKED_AHEAD, SURE_AFTER_S, WAIT_FOR_UNSURE_S = 8, 4.0, 1.0
WITHDRAWN = "cancelled before it began (launch.py cancel)"
KILLED = "killed by launch.py cancel: it did not end when it was told"


class Act(str, enum.Enum):
    """What is done to one job, as it is said afterwards."""

    WITHDRAW = "taken out of the queue"
    TELL = "told to end"
    KILL = "killed"
    CANCEL = "cancelled"


LIVING = (JobState.PENDING, JobState.RUNNING)
SIGNALS = {Act.TELL: signal.SIGTERM, Act.KILL: signal.SIGKILL}


def due(status: JobStatus, done: Sequence[Act], elapsed_s: float) -> Act | None:
    """The step that a job is to be given now; None while there is nothing to do but wait."""
    if status.state is JobState.PENDING:
        again = done.count(Act.WITHDRAW) <= elapsed_s / KILL_AFTER_S  # where the first one was not heard
        return Act.WITHDRAW if again else None
    if status.state is not JobState.RUNNING or status.words.startswith("COMPLETING"):
        return None
    step = Act.TELL if elapsed_s < KILL_AFTER_S else Act.KILL if elapsed_s < CANCEL_AFTER_S else Act.CANCEL
    return None if step in done else step


@dataclass
class Watched:
    """A job that is being ended: what it was at first, what has been done, what it is now."""

    run: FoundRun
    job: RunJob
    was: JobStatus | None = None
    now: JobStatus | None = None
    done: list[Act] = field(default_factory=list)
    complaint: str = ""
    seconds: float = 0.0
    stranger: str | None = None  # whose it is, where it is not of this run; None while that is not known
    since: float | None = None  # when it was first seen to live, by elapsed seconds
    whose: Lookout[str] | None = None

    @property
    def is_left(self) -> bool:
        """Whether there is something to wait for."""
        return not self.is_over and not self.stranger

    @property
    def is_over(self) -> bool:
        return self.now is not None and self.now.state.is_final

    @property
    def reason(self) -> str:
        """Why it ended, where it could not say so itself; empty where it could."""
        withdrawn = KILLED if Act.KILL in self.done else WITHDRAWN if set(self.done) == {Act.WITHDRAW} else ""
        return withdrawn if self.is_over else ""

    @property
    def is_unsure(self) -> bool:
        """Whether it lives, and may be another run's."""
        return self.stranger is None and self.now is not None and self.now.state in LIVING

    @property
    def owner(self) -> str:
        """The job that is asked about whose it is: of a task its array."""
        return self.job.leader if self.job.kind == "worker" and self.job.leader else self.job.job_id

    def hear_whose(self, wait_s: float) -> None:
        """Note the answer, which counts for a job that lives."""
        if self.is_unsure and self.whose and self.whose.wait(wait_s):
            self.stranger = self.whose.seen()

    def may_be_ended(self, elapsed_s: float) -> bool:
        """Whether it is this run's, or this is all that will be known."""
        return not self.is_unsure or (self.since is not None and elapsed_s - self.since >= SURE_AFTER_S)

    def see(self, status: JobStatus, elapsed_s: float) -> None:
        """Note what Slurm says; its silence says nothing about the job."""
        if status.state is JobState.UNKNOWN:
            self.complaint = status.words
        if status.state is JobState.UNKNOWN and self.was is not None:
            return
        self.seconds = elapsed_s
        self.now = status
        if self.since is None and status.state in LIVING:
            self.since = elapsed_s
        if self.was is None or self.was.state is JobState.UNKNOWN:
            self.was = status

    @property
    def sentence(self) -> str:
        """What became of it, in a line."""
        assert self.was and self.now
        return f"{self.job.kind} job {self.job.job_id}: {self.fate}"

    @property
    def fate(self) -> str:
        """The same without its name, which several workers may have in common."""
        assert self.was and self.now
        acts = ", ".join(dict.fromkeys(act.value for act in self.done))
        if self.stranger:
            return f"{self.stranger}; {acts + ' before Slurm said so' if acts else 'left alone'}"
        if self.is_over and not self.done and self.was.state.is_final:
            return f"had ended ({self.was.words})"
        end = f"ended after {self.seconds:.1f} s" if self.is_over else f"has not ended ({self.now.words})"
        more = f"; {self.complaint}" if self.complaint and not self.is_over else ""
        return f"was {self.was.words}; {acts or 'nothing done'}; {end}{more}"

    @property
    def as_dict(self) -> dict[str, object]:
        """The same for programs."""
        assert self.was and self.now
        return {
            "kind": self.job.kind,
            "id": self.job.job_id,
            "was": self.was.words,
            "done": [act.name.lower() for act in self.done],
            "ended": self.is_over,
            "stranger": bool(self.stranger),
            "now": self.now.words,
            "seconds": round(self.seconds, 1),
        }


class Hand(Protocol):
    """Who carries out the steps: Slurm, or signals on this machine."""

    def statuses(self, jobs: Sequence[Watched], timeout_s: float) -> Mapping[str, JobStatus]: ...

    def stranger(self, one: Watched, timeout_s: float) -> str | None: ...

    def do(self, act: Act, jobs: Sequence[Watched], timeout_s: float) -> str | None: ...


@dataclass(frozen=True)
class SlurmHand:
    """The steps by Slurm's commands; what acts for a heterogeneous job is its first part."""

    slurm: Slurm

    def statuses(self, jobs: Sequence[Watched], timeout_s: float) -> Mapping[str, JobStatus]:
        return self.slurm.statuses([one.job.job_id for one in jobs], timeout_s)

    def stranger(self, one: Watched, timeout_s: float) -> str | None:
        return stranger(one.owner, one.run.directory, self.slurm, timeout_s) if one.run.directory else ""

    def do(self, act: Act, jobs: Sequence[Watched], timeout_s: float) -> str | None:
        ids = list(dict.fromkeys(one.job.job_id if one.job.kind == "worker" else _acting(one) for one in jobs))
        if act in SIGNALS:
            return self.slurm.signal_bodies(ids, SIGNALS[act], timeout_s)
        if act is Act.CANCEL:
            return self.slurm.cancel(list(dict.fromkeys(map(_acting, jobs))), timeout_s)
        if not all(one.now and one.now.words.startswith("PENDING") for one in jobs):
            return self.slurm.cancel(ids, timeout_s)
        # A training before its runtime and the workers, whose end would let it start; what starts meanwhile is told.
        first = [one.job.job_id for one in jobs if one.job.kind == "training"]
        acting = list(dict.fromkeys(map(_acting, jobs)))
        groups = [first, [job_id for job_id in acting if job_id not in first]]
        complaints = [self.slurm.cancel_pending(*group, timeout_s=timeout_s / 2) for group in groups if group]
        return "; ".join(filter(None, complaints)) or None


def _acting(one: Watched) -> str:
    """The job by which it is ended: itself, the first part of a heterogeneous job, or the whole array."""
    return one.job.leader or one.job.job_id


@dataclass(frozen=True)
class LocalHand:
    """The steps by signals to processes of this machine, whose guardians clean up after those that are killed."""

    def statuses(self, jobs: Sequence[Watched], timeout_s: float) -> Mapping[str, JobStatus]:
        return {one.job.job_id: self._seen(one) for one in jobs}

    def stranger(self, one: Watched, timeout_s: float) -> str:
        return ""  # the start of its process is recorded with it

    def _seen(self, one: Watched) -> JobStatus:
        status = self._processes(one).status(one.job.job_id)
        gone = status.state is JobState.UNKNOWN  # a launcher writes what it has started at once
        return JobStatus(JobState.ENDED_BADLY, status.words) if gone else status

    def do(self, act: Act, jobs: Sequence[Watched], timeout_s: float) -> str | None:
        for one in jobs:
            if act in SIGNALS:
                self._processes(one).signal([one.job.job_id], SIGNALS[act])
        return None

    @staticmethod
    def _processes(one: Watched) -> LocalJobs:
        assert one.run.directory
        return LocalJobs(one.run.directory.path / LocalJobs.FILE)


@dataclass
class Cancellation:
    """Ends runs, watching all of their jobs at once, for at most ``end_s`` seconds after ``begin``."""

    runs: Sequence[FoundRun]
    hands: Mapping[bool, Hand]  # by whether a job is local
    notes: SignalNotes
    begin: float
    end_s: float = END_S
    watched: dict[str, Watched] = field(default_factory=dict)
    _whose: dict[str, Lookout[str]] = field(default_factory=dict)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin

    def carry_out(self) -> list[Watched]:
        """Every job of the runs with what became of it; returns once all have ended, or time is up."""
        pause = FIRST_PAUSE_S
        while True:
            self._look()
            left = [one for one in self.watched.values() if one.is_left]
            if not left or self.elapsed_s + pause > self.end_s:
                return list(self.watched.values())
            ours = [one for one in left if one.may_be_ended(self.elapsed_s)]
            for act in Act:
                self._do(act, [one for one in ours if one.now and due(one.now, one.done, self.elapsed_s) is act])
            self.notes.sleep(min(pause, max(0.0, self.end_s - self.elapsed_s)))  # orders take time, too
            self.notes.check()
            pause = min(LONGEST_PAUSE_S, pause * 1.3)

    def _look(self) -> None:
        """Ask about all that have not ended, among them what a run has queued since: a further attempt."""
        for run in self.runs:
            for job in run.jobs():
                self.watched.setdefault(job.job_id, Watched(run, job))
        for local, hand in self.hands.items():
            asked = [one for one in self.watched.values() if one.job.is_local is local and one.is_left]
            if len({one.owner for one in asked}) <= ASKED_AHEAD:
                self._ask_whose(hand, asked)
            seen = hand.statuses(asked, self._left_s()) if asked else {}
            for one in asked:
                one.see(seen[one.job.job_id], self.elapsed_s)
            self._ask_whose(hand, [one for one in asked if one.is_unsure])
        until = min(self.elapsed_s + WAIT_FOR_UNSURE_S, self.end_s)
        for one in self.watched.values():
            one.hear_whose(0.0 if one.may_be_ended(self.elapsed_s) else max(0.0, until - self.elapsed_s))

    def _ask_whose(self, hand: Hand, jobs: Iterable[Watched]) -> None:
        """Ask in the background whose they are, of an array once; again while Slurm is not heard."""
        for one in jobs:
            if one.whose is None and one.owner not in self._whose:
                question = partial(hand.stranger, one, COMMAND_S)
                self._whose[one.owner] = Lookout(question, FIRST_PAUSE_S).__enter__()
            one.whose = one.whose or self._whose[one.owner]

    def _do(self, act: Act, jobs: Iterable[Watched]) -> None:
        jobs = list(jobs)
        for local, hand in self.hands.items():
            if mine := [one for one in jobs if one.job.is_local is local]:
                complaint = hand.do(act, mine, self._left_s())
                for one in mine:
                    one.complaint = complaint or ""
                    one.done += [] if complaint else [act]

    def _left_s(self) -> float:
        return max(0.2, min(COMMAND_S, self.end_s - self.elapsed_s))


def conclude(watched: Sequence[Watched]) -> None:
    """Say in a run's directory how those jobs ended that never began, or were killed: nobody else can."""
    for one in watched:
        if not one.reason or one.run.directory is None or one.job.kind == "worker":
            continue
        directory, job_id = one.run.directory, one.job.job_id
        note_ends(directory, End(one.job.kind, job_id, None, one.reason, "launcher"))
        if one.job.kind == "training":
            runtime = next((job.job_id for job in one.run.jobs() if job.kind == "runtime"), "")
            flag = Flag.of_this_host(job_id, runtime, EXIT_SIGNAL_BASE + signal.SIGTERM, one.reason, Ended.CANCELLED)
            try:
                directory.publish_if_absent(directory.training_complete, flag)  # an earlier attempt's says more
            except EnvironmentProblem as problem:
                log.warning("%s", problem)
