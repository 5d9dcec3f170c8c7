"""The minutes before a time limit: the trainer is told to save, and stopped when it has, so that the next job goes on.

Slurm says that the time has come by SIGUSR1, and so does the clock: the runtime job's limit, usually the earlier one,
is not in this job's signal. VERL has no handler for the signal, which would kill it; it is told by its environment
(``deadlines``) and never gets it. Another trainer gets it once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from slurm.lib.checkpoints import Checkpoints, NewCheckpoint
from slurm.lib.deadlines import Deadline
from slurm.lib.logs import log
from slurm.lib.settings import Settings

GRACE_S = 30.0  # for a trainer that has saved; VERL takes 3 s


@dataclass
class EarlyStop:
    """For one trainer. ``send`` signals it; ``goes_on`` says whether another attempt is queued.

    Without RESTARTS nothing is watched, and a SIGUSR1 goes straight on to a trainer that is not VERL.
    """

    settings: Settings
    deadline: Deadline
    checkpoints: Checkpoints
    goes_on: bool
    send: Callable[[int], None]
    clock: Callable[[], float] = time.monotonic
    told: bool = field(default=False, init=False)
    _watch: NewCheckpoint | None = field(default=None, init=False)

    def signalled(self, number: int) -> None:
        """The handler of the forwarded signals; only notes SIGUSR1, whose turn comes with the next look."""
        if number != signal.SIGUSR1 or not (self.settings.restarts or self.settings.saves_like_verl):
            self.send(number)
        elif self.settings.restarts:
            self.told = True

    def saved(self) -> str | None:
        """The checkpoint with which the trainer can be stopped, once there is one. To be asked about once a second."""
        if self._watch is not None:
            return self._watch.arrived() if self.goes_on else None
        if self.told or self._is_near():
            self._begin()
        return None

    def _is_near(self) -> bool:
        left = self.deadline.left_s(self.clock())
        return bool(self.settings.restarts) and left is not None and left <= self.settings.restart_lead

    def _begin(self) -> None:
        self.told = True
        self._watch = NewCheckpoint(self.checkpoints)  # before the trainer knows, or its checkpoint would be an old one
        left = self.deadline.left_s(self.clock())
        when = "soon" if left is None else f"in {left:.0f} s"
        what = "it is stopped after its next checkpoint" if self.goes_on else "this is the last attempt"
        log.warning("the time limit comes %s; %s (now: %s)", when, what, self._watch.before or "none")
        if not self.settings.saves_like_verl:
            self.send(signal.SIGUSR1)

    def killed_by_it(self, code: int) -> bool:
        """Whether a trainer without a handler for SIGUSR1 died of ours."""
        return self.told and not self.settings.saves_like_verl and code == 128 + signal.SIGUSR1
