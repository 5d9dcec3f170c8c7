"""Does a training that has ended go on in another pair of jobs? Pure: what is known → a verdict with its sentence.

It goes on after what nobody wanted (time limit, preemption, lost nodes), and only if it has saved since it began. It
does not after its own end, its own error, or a person's word.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from slurm.lib.coordination import Flag
from slurm.lib.errors import EXIT_NO_PROGRESS, EXIT_OK
from slurm.lib.scheduler import JobFacts, JobState, JobStatus

LOOKS_APART_S = 30.0  # Slurm looks at time limits now and then, and its times are whole seconds


class Ended(str, enum.Enum):
    """How a training ended, as its completion flag says it."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


class Cause(enum.Enum):
    """Why Slurm ended a job of ours with SIGTERM."""

    TIME_LIMIT = "the time limit"
    PREEMPTION = "preemption"
    NODE_FAILURE = "a node failure"
    PERSON = "scancel"

    @property
    def ended(self) -> Ended:
        return Ended.CANCELLED if self is Cause.PERSON else Ended.INTERRUPTED


# What slurmstepd writes into the job's stderr before it signals (slurmstepd/req.c, 22.05).
LAST_WORDS = {
    "TIME LIMIT": Cause.TIME_LIMIT,
    "PREEMPTION": Cause.PREEMPTION,
    "NODE FAILURE": Cause.NODE_FAILURE,
}


def cause_of(facts: JobFacts, known_end: float | None, stderr: str, job_id: str, now: float) -> Cause:
    """Why this job was ended: by Slurm's facts, by the end of its ``stderr``, by its end as it was ``known`` before."""
    if facts.preempted:
        return Cause.PREEMPTION
    said = re.findall(rf"JOB {re.escape(job_id)} ON \S+ CANCELLED AT \S+ DUE TO ([A-Z ]+)", stderr)
    for words, cause in LAST_WORDS.items():
        if said and said[-1].startswith(words):
            return cause
    end = known_end if facts.ends_at is None else facts.ends_at  # an administrator may have given it more time
    return Cause.TIME_LIMIT if end is not None and now >= end - LOOKS_APART_S else Cause.PERSON


@dataclass(frozen=True)
class Verdict:
    """Whether the next attempt begins, and why; ``exit_code`` is that of a job that does not begin."""

    goes_on: bool
    reason: str
    exit_code: int = EXIT_OK


# squeue's words for ends that nobody wanted. FAILED without a completion flag is one: the body itself was killed.
INTERRUPTIONS = ("TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "FAILED")
ENDS = {"CANCELLED": Ended.CANCELLED, "COMPLETED": Ended.COMPLETED, **dict.fromkeys(INTERRUPTIONS, Ended.INTERRUPTED)}


def how_it_ended(after: str, flag: Flag | None, status: JobStatus) -> tuple[Ended, str]:
    """How the training job ``after`` ended, by its completion flag, else by Slurm's word; with what tells it.

    Of a job that Slurm has forgotten, or about which it is silent, only this much is known: it left no flag.
    """
    if flag is not None and flag.by_hand:
        return Ended.CANCELLED, "training_complete.flag was set by hand"
    if flag is not None and flag.job_id == after:
        known = flag.ended in {ended.value for ended in Ended}
        ended = Ended(flag.ended) if known else (Ended.FAILED if flag.exit_code else Ended.COMPLETED)
        return ended, flag.reason
    word = status.words.partition(",")[0]
    return ENDS.get(word, Ended.INTERRUPTED), f"it left no completion flag, and Slurm says: {status.words}"


def verdict(after: str, flag: Flag | None, status: JobStatus, before: str, now: str) -> Verdict:
    """Whether the training goes on after the job ``after``, whose checkpoints were ``before`` when it began."""
    if flag is None and status.state in {JobState.PENDING, JobState.RUNNING} and "COMPLETING" not in status.words:
        return Verdict(
            False, f"the training job {after} has not ended, by Slurm's word ({status.words})", EXIT_NO_PROGRESS
        )
    ended, words = how_it_ended(after, flag, status)
    verb = "was " if ended in {Ended.CANCELLED, Ended.INTERRUPTED} else ""
    story = f"the training job {after} {verb}{ended.value} ({words})"
    if ended is not Ended.INTERRUPTED:
        return Verdict(False, f"{story}; there is nothing to go on with")
    if now in {before, ""}:
        where = f"since it began at {before}" if before else "at all"
        return Verdict(False, f"{story}, and saved no checkpoint {where}; not trying again", EXIT_NO_PROGRESS)
    return Verdict(True, f"{story}; going on from {now}")
