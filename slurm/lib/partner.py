"""Is the other job of the run still there? The one place that decides that it is gone.

Two witnesses are heard. The heartbeat is cheap and quick, but silence may be the network's; Slurm knows, but must not
be asked often. A partner that has never been heard of is asked about at once and then every few seconds, so that its
end in the queue, or in its first seconds, is seen as soon as any other. Later Slurm is asked when the heartbeat has
fallen silent, and otherwise at most once a minute. Neither alone ends a run: not a silent heartbeat while Slurm says
RUNNING, not a word of Slurm while the heart beats. A job that Slurm no longer lists counts as ended when it is missing
twice; one that was never heard of, of which silence says nothing, ten seconds apart: a controller that was just started
may not list every job. But nobody waits for ever: silence of ``patience_s`` seconds ends the run whatever Slurm says,
since the two jobs may be cut off from each other while Slurm reaches both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from slurm.lib.scheduler import JobState, JobStatus, Scheduler

SILENT_AFTER_S = 4.0  # two beats and a half of the partner
# With the end of the other job, a run is released within 15 s. Not less often after hours in the queue: nothing but an
# answer to a question tells a user's job that a pending one was cancelled.
ASK_UNHEARD_EVERY_S = 8.0
ASK_AGAIN_S = 2.0  # about a job that has fallen silent and that Slurm does not list
ASK_AGAIN_UNHEARD_S = 10.0  # about one that was never heard of: a question's wait in place of the usual one
ASK_WHEN_SILENT_S = (5.0, 5.0, 5.0, 10.0, 20.0)  # seconds to the next question while the silence lasts
ASK_OTHERWISE_S = 60.0  # sites forbid polling their controller more often
FLAG_LATE_S = 10.0  # from Slurm's word that a job ended well to its completion flag, on a shared directory that is slow
# Between two looks; more is time in which this job itself did not run, and says nothing of its partner.
MOST_GAP_S = 15.0
# Before its first word a partner may wait for its run's code and then for its secrets, a minute each, and load modules.
FIRST_WORD_S = 300.0
# Slurm's word for a job that has no log, since its body never began; and what to do about it.
NOT_LAUNCHED = "JobLaunchFailure", "; is its run directory there on that node, and writable? slurmd's log says more"
COMPLETING = "COMPLETING"  # squeue's word for a job that has ended, whose processes have not
ENDS_SOON = 8  # questions; one that stays so for longer is on a node that does not answer Slurm
SUSPENDED = ("SUSPENDED", "STOPPED")  # squeue's words for a partner that cannot beat, by Slurm's own will


@dataclass
class PartnerWatch:
    """Watches one partner job.

    ``heartbeat_age_s`` tells how long ago the partner was last heard of, None if never (then it counts as silent only
    once ``expected`` is set, as a job that has not started does not beat). ``patience_s``: how much silence ends the
    run, by this host's monotonic clock alone; infinite while the partner cannot be heard yet. One that ended well has
    left a flag: for ``flag_late_s`` seconds it is not called gone, so that the flag can still be seen.
    """

    kind: str
    job_id: str
    scheduler: Scheduler
    heartbeat_age_s: Callable[[], float | None]
    expected: bool = False
    clock: Callable[[], float] = time.monotonic
    patience_s: float = math.inf
    flag_late_s: float = 0.0
    _ended_well: tuple[float, str] | None = field(default=None, init=False)
    _heard_at: float | None = field(default=None, init=False)
    _looked_at: float = field(init=False)
    _silence_s: float = field(default=0.0, init=False)
    _asked_at: float = field(default=-math.inf, init=False)
    _asked_in_silence: int = field(default=0, init=False)
    _times_missing: int = field(default=0, init=False)
    _said: JobStatus = field(default=JobStatus(JobState.UNKNOWN, ""), init=False)
    _node: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._looked_at = self.clock()

    def hear(self, patience_s: float) -> None:
        """From now on the partner can be heard, and its silence is no longer than this."""
        self.patience_s, self._silence_s = patience_s, 0.0

    def gone(self) -> str | None:
        """Why the partner is gone, as a sentence, or None while it may be there. Slurm's answer is waited for."""
        if not self.job_id:
            return None
        if self._ended_well:
            at, words = self._ended_well
            return words if self.clock() - at >= self.flag_late_s else None
        silent = self._listen()
        why = None
        if self.clock() - self._asked_at >= self._pause_s(silent):
            self._ask(silent)
            why = self._verdict() if silent or self._heard_at is None else None
        return why or self._impatience()

    def _listen(self) -> bool:
        """Whether the partner is silent though it should be heard; sums up for how long it has been."""
        age, now = self.heartbeat_age_s(), self.clock()
        if age is not None:
            self.expected, self._heard_at = True, now - age
        silent = self.expected and (self._heard_at is None or now - self._heard_at > SILENT_AFTER_S)
        counts = silent and not self._said.words.startswith(SUSPENDED)
        self._silence_s = self._silence_s + min(now - self._looked_at, MOST_GAP_S) if counts else 0.0
        self._looked_at = now
        if not silent:
            self._asked_in_silence = 0
        if not silent and age is not None:
            self._times_missing = 0
        return silent

    def _pause_s(self, silent: bool) -> float:
        """Seconds from one question to the next."""
        if self._times_missing:
            return ASK_AGAIN_UNHEARD_S if self._heard_at is None else ASK_AGAIN_S
        if self._heard_at is None:
            return ASK_UNHEARD_EVERY_S / 2 if self._said.words.startswith(COMPLETING) else ASK_UNHEARD_EVERY_S
        if not silent:
            return ASK_OTHERWISE_S
        if self._said.words.startswith(COMPLETING) and self._asked_in_silence < ENDS_SOON:
            return ASK_AGAIN_S
        return ASK_WHEN_SILENT_S[min(self._asked_in_silence, len(ASK_WHEN_SILENT_S) - 1)]

    def _ask(self, silent: bool) -> None:
        self._asked_in_silence += silent
        self._asked_at = self.clock()
        self._said = self.scheduler.status(self.job_id)
        self._node = self._said.node or self._node
        self.expected = self.expected or self._said.state is JobState.RUNNING
        self._times_missing = self._times_missing + 1 if self._said.state is JobState.PURGED else 0

    def _verdict(self) -> str | None:
        """The sentence for a final status, None for any other."""
        if not self._said.state.is_final or self._times_missing == 1:
            return None
        why = f"the {self.kind} job {self.job_id} is gone: {self._said.state.value} ({self._said.words})"
        why += NOT_LAUNCHED[1] if NOT_LAUNCHED[0] in self._said.words else ""
        if self._said.state is not JobState.ENDED_WELL:
            return why
        self._ended_well = (self.clock(), why)
        return None if self.flag_late_s else why

    @property
    def ended_well(self) -> bool:
        """Whether Slurm has said so."""
        return self._ended_well is not None

    def _impatience(self) -> str | None:
        """The sentence for a silence that has lasted too long."""
        patience_s = self.patience_s if self._heard_at is not None else max(self.patience_s, FIRST_WORD_S)
        if self._silence_s < patience_s:
            return None
        place = f" on {self._node}" if self._node else ""
        answers = self._said.state is not JobState.UNKNOWN
        word = f"says {self._said.words.partition(',')[0]}" if answers else f"does not answer ({self._said.words})"
        silence = f"was not heard of for {patience_s:g} s"
        return f"the {self.kind} job {self.job_id}{place} {silence}; Slurm {word} (PARTNER_PATIENCE)"
