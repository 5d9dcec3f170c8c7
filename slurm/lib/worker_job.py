"""A worker: a further node of a runtime on several nodes, whose API server joins the head in the runtime job.

It is a task of a job array, or with RUNTIME_MODE=allocation a step of the runtime job. It reads where the head is in
the run's directory, and serves until the run ends: its completion flag, the end or the silence of the runtime job, a
signal of its own. The training is none of its affairs: the head's job watches that one. Nor is a worker's end the
run's: its own sandboxes are lost, and the others go on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from slurm.lib.api_server_child import ApiServer, Membership
from slurm.lib.coordination import Flag, FlagReader, is_listed
from slurm.lib.deadlines import own_end
from slurm.lib.errors import UsageError
from slurm.lib.job_context import JobContext, run_body
from slurm.lib.logs import log
from slurm.lib.lookout import Lookout, answered
from slurm.lib.partner import FLAG_LATE_S, PartnerWatch
from slurm.lib.plan import WORKER_STEP
from slurm.lib.podman_service import PodmanService
from slurm.lib.run_record import read_jobs
from slurm.lib.runtime_client import Heartbeat, RuntimeClient
from slurm.lib.serving import Ground, ServingBody, Watch
from slurm.lib.signals import SignalNotes
from slurm.lib.supervisor import (
    Action,
    Event,
    NoteEnd,
    Outcome,
    Part,
    Publish,
    RuntimeGone,
    State,
    StopSignal,
    TrainingComplete,
)
from slurm.lib.waiting import wait_for
from slurm.lib.watchers import LOOK_AFAR_EVERY_S, SAME_SIGNAL_S, crash_of, recovery_of


def main(argv: Sequence[str]) -> int:
    """Run the job; returns its exit code."""
    return run_body("worker", "runtime_worker.py", argv, run)


def run(job: JobContext, notes: SignalNotes) -> int:
    """Join the head, and serve until there is a reason to end."""
    runtime = job.environment.get("SKYRL_RUNTIME_JOB_ID") or runtime_of(job)
    log.info("worker %s of the runtime job %s, on %s", job.job_id, runtime or "(unknown)", socket.gethostname())
    if not runtime:
        raise UsageError(
            f"no runtime job is known in {job.directory.path}: set SKYRL_COORD_DIR to the directory of a run with "
            "RUNTIME_NODES, as launch.py prints it"
        )
    return WorkerJob(job, notes, runtime_job_id=runtime).run()


def runtime_of(job: JobContext) -> str:
    """The runtime job that a worker joins which nobody launched: the one whose head answers, else the last recorded.

    A later one may be recorded already, the next attempt's.
    """
    head = FlagReader.of_new_directory(job.directory.runtime_head, lambda flag: bool(flag.runtime_job_id)).read()
    return (head.runtime_job_id if head else "") or read_jobs(job.directory).get("runtime", "")


@dataclass(frozen=True)
class Head:
    """Where the head is, and the run's key."""

    url: str
    key: str


@dataclass
class RuntimeWatcher:
    """Looks for the end of the run: its flags, whether the runtime job is there, and of a step whether its body is."""

    job: JobContext
    runtime_job_id: str
    partner: PartnerWatch = field(init=False)

    def __post_init__(self) -> None:
        reader = FlagReader.of_new_directory if self.job.own_dir else FlagReader.from_now
        directory = self.job.directory
        self._complete = reader(directory.training_complete, self._is_ours)
        self._failed = reader(directory.runtime_failed, self._is_ours)
        self.partner = PartnerWatch(
            "runtime", self.runtime_job_id, self.job.scheduler, lambda: None, expected=True, flag_late_s=FLAG_LATE_S
        )

    def _is_ours(self, flag: Flag) -> bool:
        return flag.runtime_job_id == self.runtime_job_id

    def flags(self) -> Event | None:
        """What the run's flags say."""
        complete = self._complete.read()
        if complete:
            return TrainingComplete(complete)
        failed = self._failed.read()
        why = f"the runtime job {self.runtime_job_id} has ended: {failed.reason}" if failed else ""
        return RuntimeGone(why, as_planned=False) if failed else None

    def gone(self) -> Event | None:
        """Whether the runtime job has ended, or is silent for too long."""
        why = self.partner.gone()
        if why is None:
            return None
        return self.flags() or RuntimeGone(why, self.partner.ended_well)

    def let_go(self) -> Event | None:
        """Where this is a step: waits until the body of the runtime job closes its standard input."""
        if not self.job.environment.get(WORKER_STEP):
            return None
        while os.read(sys.stdin.fileno(), 4096):
            pass
        return self.flags() or RuntimeGone(f"the runtime job {self.runtime_job_id} ends", as_planned=True)


@dataclass
class WorkerWatch:
    """Everything that a worker watches."""

    notes: SignalNotes
    runtime: RuntimeWatcher
    server: ApiServer | None = None
    service: PodmanService | None = None

    def __post_init__(self) -> None:
        looks = (self.runtime.flags, self.runtime.gone, self.runtime.let_go)
        self._lookouts: list[Lookout[Event]] = [Lookout(look, LOOK_AFAR_EVERY_S) for look in looks]

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """The directory and Slurm are asked in the background for the length of the block."""
        with contextlib.ExitStack() as stack:
            for lookout in self._lookouts:
                stack.enter_context(lookout)
            yield

    def look(self, state: State) -> Event | None:
        """The first thing seen that matters to a worker in this state."""
        looks: list[Callable[[], Event | None]] = [self.run_end, self.signal, self.crash]
        looks += [self.recovery] if state is State.RECOVERING else []
        return next((event for look in looks if (event := look()) is not None), None)

    def run_end(self) -> Event | None:
        return next((event for lookout in self._lookouts if (event := lookout.seen()) is not None), None)

    def signal(self) -> Event | None:
        number = self.notes.stop_signal
        return None if number is None else self.run_end() or StopSignal(number)

    def crash(self) -> Event | None:
        """A part that has ended; ``scancel`` signals every process of the job, perhaps the part first."""
        event = crash_of({Part.SERVER: self.server, Part.SERVICE: self.service})
        if event is None:
            return None
        self.notes.sleep(SAME_SIGNAL_S)
        return self.signal() or event

    def recovery(self) -> Event | None:
        return recovery_of(self.service, self.server)


@dataclass
class WorkerJob(ServingBody):
    """A worker's edge of the supervisor."""

    runtime_job_id: str = ""
    watch: WorkerWatch = field(init=False)

    kind = "worker"

    def __post_init__(self) -> None:
        self.watch = WorkerWatch(self.notes, RuntimeWatcher(self.job, self.runtime_job_id))

    @property
    def watching(self) -> Watch:
        return self.watch

    @contextlib.contextmanager
    def membership(self, ground: Ground) -> Iterator[tuple[str, Membership | None]]:
        """Waits for the head; from then on the runtime job is heard by it."""
        job, head = self.job, self.await_head()
        until = answered(lambda: own_end(self.slurm_id, job.environment, job.scheduler), self.notes)
        with Heartbeat(RuntimeClient(head.url, head.key), f"worker-{job.job_id}") as heartbeat:
            partner = self.watch.runtime.partner
            partner.heartbeat_age_s = heartbeat.age_s
            partner.hear(job.settings.partner_patience)
            yield head.key, Membership(head.url, node_name(job), until, job.settings.runtime_drain_lead, number_of(job))

    @property
    def slurm_id(self) -> str:
        """The id by which Slurm knows the time limit: of a step that of its job."""
        return self.job.environment.get(WORKER_STEP) or self.job.job_id

    def await_head(self) -> Head:
        """Wait until the head answers, which is said in the run's directory; the end of the runtime ends the wait."""
        directory = self.job.directory
        flag = FlagReader.of_new_directory(
            directory.runtime_head, lambda flag: flag.runtime_job_id == self.runtime_job_id
        )

        def there() -> Head | None:
            said = flag.read()
            server = directory.read_server(said) if said else None
            return Head(server[0], server[1] or "") if server else None

        deadline_s = self.job.settings.runtime_ready_timeout
        log.info("waiting up to %s s for the head of the runtime job %s", deadline_s, self.runtime_job_id)
        what = f"the head of the runtime job {self.runtime_job_id} (RUNTIME_READY_TIMEOUT={deadline_s})"
        return wait_for(what, there, deadline_s, still_possible=self.still_possible, sleep=self.notes.sleep)

    def still_possible(self) -> None:
        """Raise if there is nothing to join any more, or never was."""
        self.still_starting()
        directory = self.job.directory
        has_none = is_listed(directory.runtime_ready) and not is_listed(directory.runtime_head)
        if has_none and not self.job.was_launched:
            raise UsageError(
                f"the runtime in {directory.path} has no head, so no node can join it: launch one with RUNTIME_NODES=2 "
                "or more"
            )

    def do_own(self, action: Action) -> None:
        """A worker tells nobody of its end: it is not the run's."""
        if isinstance(action, Publish):
            assert self.watch.server is not None
            log.info("API server ready at %s; it joins the head", self.watch.server.url)
        elif isinstance(action, NoteEnd):
            outcome = action.outcome
            say = log.info if outcome.as_planned else log.error
            say("worker %s ends: %s", self.job.job_id, outcome.reason)

    def note_end(self, outcome: Outcome) -> None:
        """It is not the run's, and stands in no record."""


def number_of(job: JobContext) -> int:
    """Which node of the runtime this is: the number of the task, or step, in its id; 0 is the runtime job's own."""
    return int(job.job_id.rpartition("_")[2])


def node_name(job: JobContext) -> str:
    """How this node is called at the head.

    Slurm may start two tasks of an array on one host, or a new one where another was lost: so the task is named too.
    """
    host = job.environment.get("SLURMD_NODENAME") or socket.gethostname()
    return host if job.environment.get(WORKER_STEP) else f"{host}.{job.job_id}"
