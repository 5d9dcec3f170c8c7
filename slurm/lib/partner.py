"""Is the other job of the run still there? The one place that decides that it is gone.

Two witnesses are heard. The heartbeat is cheap and quick, but silence may be the network's; Slurm knows, but must not
be asked often. So Slurm is asked when the heartbeat has fallen silent, and otherwise at most once a minute. Neither
alone ends a run: not a silent heartbeat while Slurm says RUNNING, not a word of Slurm while the heart beats. A job that
Slurm no longer lists counts as ended when it is missing twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from slurm.lib.scheduler import JobState, JobStatus, Scheduler

SILENT_AFTER_S = 4.0  # two beats and a half of the partner
ASK_WHEN_SILENT_S = (5.0, 5.0, 5.0, 10.0, 20.0)  # seconds to the next question while the silence lasts
ASK_OTHERWISE_S = 60.0  # sites forbid polling their controller more often
FLAG_LATE_S = 10.0  # from Slurm's word that a job ended well to its completion flag, on a shared directory that is slow


@dataclass
class PartnerWatch:
    """Watches one partner job.

    ``heartbeat_age_s`` tells how long ago the partner was last heard of, None if never (then it counts as silent only
    once ``expected`` is set, as a job that has not started does not beat). One that ended well has left a flag: for
    ``flag_late_s`` seconds it is not called gone, so that the flag can still be seen.
    """

    kind: str
    job_id: str
    scheduler: Scheduler
    heartbeat_age_s: Callable[[], float | None]
    expected: bool = False
    clock: Callable[[], float] = time.monotonic
    flag_late_s: float = 0.0
    _ended_well: tuple[float, str] | None = field(default=None, init=False)
    _asked_at: float = field(default=0.0, init=False)
    _asked_in_silence: int = field(default=0, init=False)
    _times_missing: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._asked_at = self.clock()

    def gone(self) -> str | None:
        """Why the partner is gone, as a sentence, or None while it may be there."""
        if not self.job_id:
            return None
        if self._ended_well:
            at, why = self._ended_well
            return why if self.clock() - at >= self.flag_late_s else None
        age = self.heartbeat_age_s()
        self.expected = self.expected or age is not None
        silent = self.expected if age is None else age > SILENT_AFTER_S
        self._asked_in_silence = self._asked_in_silence if silent else 0
        if self.clock() - self._asked_at < self._patience_s(silent):
            return None
        self._asked_in_silence += silent
        self._asked_at = self.clock()
        status = self.scheduler.status(self.job_id)
        return self._verdict(status) if silent or age is None else None

    def _verdict(self, status: JobStatus) -> str | None:
        """The sentence for a final status, None for any other."""
        self.expected = self.expected or status.state is JobState.RUNNING
        self._times_missing = self._times_missing + 1 if status.state is JobState.PURGED else 0
        if not status.state.is_final or self._times_missing == 1:
            return None
        why = f"the {self.kind} job {self.job_id} is gone: {status.state.value} ({status.words})"
        if status.state is not JobState.ENDED_WELL:
            return why
        self._ended_well = (self.clock(), why)
        return None if self.flag_late_s else why

    @property
    def ended_well(self) -> bool:
        """Whether Slurm has said so."""
        return self._ended_well is not None

    def _patience_s(self, silent: bool) -> float:
        if not silent:
            return ASK_OTHERWISE_S
        return ASK_WHEN_SILENT_S[min(self._asked_in_silence, len(ASK_WHEN_SILENT_S) - 1)]
