"""What has Slurm done where its answer was not heard? It is asked until it answers, for a time.

A command that got no answer may have been carried out: a controller that was stopped does later what it was told. So a
job is looked for by its mark, a release and a cancellation are said again, which changes nothing where the first one
was heard.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from slurm.lib.errors import SubmissionError
from slurm.lib.launch_mark import PREFIX
from slurm.lib.logs import log
from slurm.lib.scheduler import SUBMIT_TIMEOUT_S, JobState, Slurm, is_silence
from slurm.lib.signals import Interrupted, SignalNotes

T = TypeVar("T")

PATIENCE_S = 180.0  # of a launch, over all its steps; a restart of slurmctld takes a minute or two
ASK_S = 10.0
PAUSE_S = 2.0
LOOKS, LOOK_PAUSE_S = 3, 1.5  # a controller that was silent answers new questions before it has done all it was told


@dataclass
class Insistence:
    """How long a submission goes on asking a silent Slurm; all its steps share ``left_s`` seconds."""

    notes: SignalNotes
    left_s: float = 0.0

    def until_heard(self, what: str, ask: Callable[[], T | None]) -> T | None:
        """The first answer, or None where time has run out; ``Interrupted`` by a signal."""
        said = False
        while True:
            begin = time.monotonic()
            answer = ask()
            if answer is not None or self.left_s <= 0:
                return answer
            if not said:
                log.warning("Slurm does not answer; waiting up to %.0f s for it to %s", self.left_s, what)
                said = True
            self.notes.sleep(PAUSE_S)
            self.notes.check()
            self.left_s -= time.monotonic() - begin


def submitted(slurm: Slurm, argv: Sequence[str], mark: str, insistence: Insistence, cwd: Path | None = None) -> str:
    """Submit a job with this mark; returns its id, also where Slurm took it without being heard.

    ``Interrupted`` if a signal came while it was not.
    """
    try:
        return slurm.submit(argv, cwd)
    except SubmissionError as problem:
        if not problem.leaves_jobs or _comments(argv) != [f"--comment={PREFIX}{mark}"]:
            raise
        found = insistence.until_heard("say whether it took the job", lambda: _looked_for(slurm, mark))
        if found is None:
            raise
        if found:
            log.info("Slurm took job %s without saying so", found)
            return found
    insistence.notes.check()  # it may not be wanted any more
    log.info("Slurm answers again, and has not taken the job; submitting it once more")
    return slurm.submit(argv, cwd)


def _comments(argv: Sequence[str]) -> list[str]:
    """The options that give the job a comment: of several the last counts, which is a person's."""
    return [word for word in argv if word == "--comment" or word.startswith("--comment=")]


def _looked_for(slurm: Slurm, mark: str) -> str | None:
    """The id of the job with this mark; empty where there is none for certain, None where Slurm is silent."""
    for look in range(LOOKS):
        time.sleep(LOOK_PAUSE_S if look else 0.0)
        jobs = slurm.own_jobs(ASK_S)
        if jobs is None:
            return None
        ids = [job.job_id for job in jobs if job.comment == f"{PREFIX}{mark}"]
        if ids:
            return min(ids, key=int)
    return ""


def released(slurm: Slurm, job_id: str, insistence: Insistence) -> None:
    """Let a held job start; ``SubmissionError`` says why it is still held, or that this is not known.

    ``Interrupted`` by a signal that came before: of several each is let go only while all of them are wanted.
    """
    insistence.notes.check()
    complaint = insistence.until_heard(f"release job {job_id}", lambda: _release_complaint(slurm, job_id))
    if complaint is None:
        raise SubmissionError(f"Slurm does not answer, and may still release job {job_id}", leaves_jobs=True)
    if complaint:
        raise SubmissionError(complaint)


def _release_complaint(slurm: Slurm, job_id: str) -> str | None:
    """Empty once the job is not held any more, a sentence where Slurm refuses, None while it is silent."""
    try:
        slurm.release(job_id)
        return ""
    except SubmissionError as problem:
        if problem.leaves_jobs:
            return None
        status = slurm.status(job_id)  # a second release of a job that has started is refused
        begun = status.state is JobState.RUNNING or (status.state is JobState.PENDING and "Held" not in status.words)
        return "" if begun else None if status.state is JobState.UNKNOWN else str(problem)


def cancelled(slurm: Slurm, job_ids: Sequence[str], insistence: Insistence) -> str | None:
    """Cancel jobs one after the other, so that none starts by the end of another; returns Slurm's complaint or None.

    A signal, also one that came before, ends the waiting for a silent Slurm.
    """
    timeout_s = ASK_S if insistence.left_s > 0 else SUBMIT_TIMEOUT_S
    for job_id in job_ids:
        complaints: list[str] = []

        def heard(job_id: str = job_id, complaints: list[str] = complaints) -> str | None:
            complaints.append(slurm.cancel([job_id], timeout_s) or "")
            return None if is_silence(complaints[-1]) else complaints[-1]

        with contextlib.suppress(Interrupted):
            insistence.until_heard(f"cancel job {job_id}", heard)
        if complaints[-1]:
            return complaints[-1]
    return None
