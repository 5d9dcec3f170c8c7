"""The same plan run as processes of this machine, where there is no Slurm.

Both job bodies run as they do under Slurm, in sessions of their own, logging into the run's directory; the launcher
follows the logs. A signal stops the training job first, which ends the runtime job by its completion flag. If the
launcher dies, the kernel tells both bodies.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from slurm.lib.coordination import CoordinationDir, make_run_dir, write_atomically
from slurm.lib.errors import EXIT_INTERNAL
from slurm.lib.job_context import LOCAL_JOBS_NAME
from slurm.lib.leftovers import discard
from slurm.lib.logs import KIND_COLOURS, give_up, log, wants_colour
from slurm.lib.plan import JobPlan, LaunchPlan, local_argv
from slurm.lib.processes import Child, ChildSpec, start_ticks
from slurm.lib.run_record import furnish, provenance, write_record
from slurm.lib.signals import SignalNotes

LOOK_EVERY_S = 0.1
PARTNER_GRACE_S = 20.0  # from one job's end to the other's; both bodies notice within a few seconds
FORCED_GRACE_S = 0.0


@dataclass
class LogFollower:
    """Prints what is appended to a log file, a prefix before each line."""

    path: Path
    kind: str
    out: IO[str] = field(default_factory=lambda: sys.stderr)
    _position: int = field(default=0, init=False)

    def lines(self) -> Iterator[str]:
        """The whole lines that have come since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except OSError:
            return
        whole, newline, _ = data.rpartition(b"\n")
        self._position += len(whole) + len(newline)
        yield from whole.decode("utf-8", "replace").splitlines()

    def show(self) -> None:
        prefix = f"{self.kind:>8} | "
        if wants_colour(sys.stderr):
            prefix = f"{KIND_COLOURS[self.kind]}{prefix}\x1b[0m"
        try:
            for line in self.lines():
                self.out.write(f"{prefix}{line}\n")
            self.out.flush()
        except OSError:  # the terminal was closed; the logs themselves are in the run's directory
            give_up(self.out)


@dataclass(frozen=True)
class LocalJob:
    """A job body that runs here."""

    kind: str
    job_id: str
    child: Child
    follower: LogFollower


def run(plan: LaunchPlan, notes: SignalNotes, checkout: Path) -> int:
    """Run both jobs to their end; the exit code is the trainer's (the runtime's in a launch of it alone)."""
    ids = plan.local_ids(os.getpid())
    directory = make_run_dir(Path(plan.jobs[0].with_local_ids(ids).directory))
    try:
        furnish(directory, plan, ids, checkout, [])
        write_record(directory, plan, ids, provenance(checkout, plan.settings))
    except BaseException:
        discard(directory.path)
        raise
    sys.stdout.write(f"coordination directory: {directory.path}\n")
    sys.stdout.flush()
    jobs: list[LocalJob] = []
    try:
        for job in plan.jobs:
            jobs.append(start(plan, job.with_local_ids(ids), ids[job.kind], directory))
            record_processes(directory, jobs)
        return follow(jobs, notes)
    finally:
        for running in reversed(jobs):
            running.child.stop(FORCED_GRACE_S if notes.forced else PARTNER_GRACE_S)
            running.follower.show()


def start(plan: LaunchPlan, job: JobPlan, job_id: str, directory: CoordinationDir) -> LocalJob:
    """Start one job body; it dies with the launcher, in order."""
    environment = {
        **plan.inherited,
        **plan.environment,
        **job.environment,
        "SKYRL_JOB_ID": job_id,
        LOCAL_JOBS_NAME: str(directory.path / "local_jobs.txt"),
    }
    argv = local_argv(job)
    out, err = directory.log(job.kind, job_id, "out"), directory.log(job.kind, job_id, "err")
    with out.open("wb") as stdout, err.open("wb") as stderr:
        spec = ChildSpec(
            argv, environment, f"the {job.kind} job", stdout=stdout, stderr=stderr, death_signal=signal.SIGTERM
        )
        child = Child(spec)
    return LocalJob(job.kind, job_id, child, LogFollower(out, job.kind))


def record_processes(directory: CoordinationDir, jobs: list[LocalJob]) -> None:
    """Keep the processes where the bodies look each other up."""
    lines = [f"{job.job_id} {job.child.pid} {start_ticks(job.child.pid) or 0}\n" for job in jobs]
    write_atomically(directory.path / "local_jobs.txt", "".join(lines))


def follow(jobs: list[LocalJob], notes: SignalNotes) -> int:
    """Show the logs until all jobs have ended; pass a stop on, once, to the job that the run is about."""
    main = jobs[-1]
    asked = False
    last_end: float | None = None
    while any(job.child.exit_code is None for job in jobs):
        for job in jobs:
            job.follower.show()
        if notes.stop_signal is not None and not asked:
            log.warning("stopping the %s job; press Ctrl-C again to force", main.kind)
            main.child.send(signal.SIGTERM)
            asked = True
        ended = any(job.child.exit_code is not None for job in jobs)
        last_end = (last_end or time.monotonic()) if ended else None
        if notes.forced or (last_end and time.monotonic() - last_end > PARTNER_GRACE_S):
            break
        notes.sleep(LOOK_EVERY_S) if notes.stop_signal is None else time.sleep(LOOK_EVERY_S)
    for job in jobs:
        job.follower.show()
    code = main.child.exit_code
    return EXIT_INTERNAL if code is None else code
