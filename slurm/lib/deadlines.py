"""Until when may this training go on, and what is its trainer told about that?

Both jobs of a run are needed, so the earlier time limit is the deadline of both. It is kept as a moment of this
process's monotonic clock: the clocks of two hosts may differ by minutes, and one may be set while a training runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from slurm.lib.errors import TooLate
from slurm.lib.logs import log
from slurm.lib.processes import own_age_s
from slurm.lib.scheduler import Scheduler
from slurm.lib.settings import Settings

# Epoch seconds, both of one clock; from Slurm 23.02 on.
START_NAME, END_NAME = "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"
# VERL saves after a step when what is left is at most its longest step + 60 s + trainer.esi_redundant_time; not after
# its process's first step, when it knows of none (read and run in 0.5.0; not in the V1 trainer of 0.9).
EXPIRY_NAME = "MLP_CURRENT_CAPACITY_BLOCK_EXPIRATION_TIMESTAMP"


@dataclass(frozen=True)
class Deadline:
    """When the first of both jobs reaches its time limit, and which one.

    ``at`` is a moment of ``time.monotonic``, None where no limit is known.
    """

    at: float | None = None
    whose: str = ""

    def left_s(self, now: float) -> float | None:
        return None if self.at is None else self.at - now

    @property
    def by_this_hosts_clock(self) -> float | None:
        """The same in epoch seconds, as this host tells them now."""
        return None if self.at is None else time.time() + self.at - time.monotonic()

    def __str__(self) -> str:
        if self.at is None:
            return "no time limit is known"
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.by_this_hosts_clock))
        return f"until {moment}, the time limit of {self.whose}"


def earlier(ends: Mapping[str, float | None]) -> Deadline:
    """The earliest of several ends, named; those that are None do not count."""
    known = {whose: at for whose, at in ends.items() if at is not None}
    whose = min(known, key=lambda name: known[name], default="")
    return Deadline(known.get(whose), whose)


def own_end(job_id: str, environment: Mapping[str, str], scheduler: Scheduler) -> float | None:
    """When this job reaches its time limit, by this host's clock: as Slurm says now, else as it told the job."""
    said = scheduler.facts(job_id).ends_at
    if said is not None:
        return said
    start, end = environment.get(START_NAME, ""), environment.get(END_NAME, "")
    if not (start.isdigit() and end.isdigit() and int(end)):
        return None
    return time.time() - own_age_s() + int(end) - int(start)


def deadline_of(job_id: str, runtime_job_id: str, environment: Mapping[str, str], scheduler: Scheduler) -> Deadline:
    """The deadline of a training job and its runtime job (empty: none of ours)."""
    ends = {"this job": own_end(job_id, environment, scheduler)}
    if runtime_job_id:
        ends[f"the runtime job {runtime_job_id}"] = scheduler.facts(runtime_job_id).ends_at
    now, here = time.monotonic(), time.time()
    return earlier({whose: None if at is None else now + at - here for whose, at in ends.items()})


def announce(deadline: Deadline, settings: Settings, now: float) -> None:
    """Say how long the training may go on; ``TooLate`` where that is less than MIN_RUN_TIME."""
    left = deadline.left_s(now)
    if left is None:
        log.info("no time limit is known")
        return
    if left < settings.min_run_time:
        raise TooLate(
            f"{max(0, round(left))} s are left {deadline}, less than MIN_RUN_TIME={settings.min_run_time}; launch "
            "again (the runtime job's time runs while the training job waits for GPUs: a longer TIME_LIMIT helps)"
        )
    log.info("this training may go on for %d s, %s", left, deadline)


def told_variables(deadline: Deadline, settings: Settings, run: str, given: Mapping[str, str]) -> dict[str, str]:
    """What the trainer finds in its environment about time: when to save at the latest, and the run's name at wandb.

    All attempts at the run named ``run`` are one run there; what the user has ``given`` for wandb stays.
    """
    at = deadline.by_this_hosts_clock
    told = {} if at is None else {EXPIRY_NAME: str(int(at))}
    if not settings.restarts:
        return told
    wandb = {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"}
    return told | {name: value for name, value in wandb.items() if not given.get(name)}
