"""What has happened to the run? Each look says the first thing seen, as an event of the runtime job's supervisor.

Signals and our own children are seen at every look. The shared directory and Slurm may take seconds to answer, so
they are asked in the background, each by itself.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from slurm.lib.api_server_child import ApiServer
from slurm.lib.coordination import Counter, CounterWatch, Flag, FlagReader
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.idle import IdleWatch
from slurm.lib.job_context import JobContext
from slurm.lib.lookout import Lookout
from slurm.lib.partner import FLAG_LATE_S, PartnerWatch
from slurm.lib.podman_service import PodmanService
from slurm.lib.run_record import partner_and_bond
from slurm.lib.runtime_client import QUICK_TIMEOUT_S, RuntimeClient
from slurm.lib.signals import SignalNotes
from slurm.lib.supervisor import (
    Answers,
    Crashed,
    Deadline,
    Event,
    Failed,
    NotBegun,
    Part,
    Silent,
    State,
    StopSignal,
    TrainingComplete,
    TrainingGone,
)

LOOK_AFAR_EVERY_S = 0.4  # at what other hosts have to answer for: the shared directory, Slurm
FLAG_AT_SIGNAL_S = 0.5  # a look's time more: the training may have said that it is complete just before the signal came
SAME_SIGNAL_S = 0.3  # between one process's TERM and another's, when slurmstepd signals a whole job


@dataclass
class TrainingWatcher:
    """Looks for the training's end: its completion flag, and whether its job is still there.

    ``server`` is set once it answers: from then on it is asked who was heard of. ``launched_with`` is the training's id
    once it is known that no other can take its place.
    """

    job: JobContext
    reader: FlagReader
    counter: Counter
    server: ApiServer | None = None
    partner: PartnerWatch | None = None
    launched_with: str | None = None

    @staticmethod
    def of(job: JobContext) -> TrainingWatcher:
        def ours(flag: Flag) -> bool:
            return flag.runtime_job_id == job.job_id

        reader = FlagReader.of_new_directory if job.own_dir else FlagReader.from_now
        counter = Counter(job.directory.heartbeat("runtime", job.job_id))
        return TrainingWatcher(job, reader(job.directory.training_complete, ours), counter)

    @property
    def has_heard(self) -> bool:
        """Whether the training has been heard of, or Slurm has said that it runs."""
        return self.partner is not None and self.partner.expected

    def serves(self, server: ApiServer) -> None:
        """The server answers, and is about to be published."""
        self.server = server
        self.beat()  # before the address is published: the training job takes it for the sign to do likewise

    def beat(self) -> None:
        """Be heard by a training whose heartbeat no server of ours answers."""
        if self.server is not None and not self.server.is_ours:
            self.counter.beat()

    def complete(self) -> Event | None:
        self.beat()
        flag = self.reader.read()
        return TrainingComplete(flag) if flag else None

    def gone(self) -> Event | None:
        self.partner = partner = self.partner or self._find_partner()
        if partner is None:
            return None
        if self.server is not None and math.isinf(partner.patience_s):
            partner.hear(self.job.settings.partner_patience)  # while images were loaded it could not be heard
        why = partner.gone()
        if why is None:
            return None
        return self.complete() or TrainingGone(partner.job_id, why, partner.ended_well)  # its last act may be the flag

    def _find_partner(self) -> PartnerWatch | None:
        training, bond = partner_and_bond(self.job.directory, "runtime", self.job.job_id)
        if training is None:
            return None
        self.launched_with = training if bond else None
        watch = CounterWatch(self.job.directory.heartbeat("training", training))

        def age_s() -> float | None:
            if self.server is None:
                return None
            client = RuntimeClient(self.server.local_url, self.server.key)
            return client.heard_s_ago(f"training-{training}") if self.server.is_ours else watch.age_s()

        return PartnerWatch("training", training, self.job.scheduler, age_s, flag_late_s=FLAG_LATE_S)


def crash_of(parts: Mapping[Part, ApiServer | PodmanService | None]) -> Event | None:
    """The first of these parts that has ended; None while all of them run that have been started."""
    for part, child in parts.items():
        try:
            if child is not None:
                child.check_alive()
        except EnvironmentProblem as problem:
            again = not isinstance(child, ApiServer) or child.is_ours  # another's server takes over no sandbox
            return Crashed(part, str(problem)) if again else Failed(problem.exit_code, str(problem))
    return None


def recovery_of(service: PodmanService | None, *servers: ApiServer | None) -> Event:
    """Whether all answer again."""
    if service is None or not service.answers():
        return Silent()
    return Answers() if all(map(_is_well, servers)) else Silent()


def _is_well(server: ApiServer | None) -> bool:
    return server is not None and RuntimeClient(server.local_url, None).ask("GET", "/health", QUICK_TIMEOUT_S).ok


@dataclass
class RunWatch:
    """Everything that the runtime job watches; ``server``, ``service`` and ``head`` from their start on.

    ``joined`` says once that enough nodes have joined the head, or that they cannot.
    """

    job: JobContext
    notes: SignalNotes
    training: TrainingWatcher
    server: ApiServer | None = None
    service: PodmanService | None = None
    idle: IdleWatch | None = None
    head: ApiServer | None = None
    joined: Callable[[], Event | None] = lambda: None
    _deadline: float = field(default=math.inf, init=False)
    _next_idle_look: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._complete: Lookout[Event] = Lookout(self.training.complete, LOOK_AFAR_EVERY_S)
        self._gone: Lookout[Event] = Lookout(self.training.gone, LOOK_AFAR_EVERY_S)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """The directory and Slurm are asked in the background for the length of the block."""
        with self._complete, self._gone:
            yield

    def serves(self, server: ApiServer) -> None:
        """The server is about to be published; from now on the training is waited for."""
        self.training.serves(server)
        self.idle = IdleWatch(self.job, self.notes)
        self._deadline = time.monotonic() + self.job.settings.training_complete_timeout

    def look(self, state: State) -> Event | None:
        """The first thing seen that matters to a job in this state."""
        seen = (look() for look in self._looks(state))
        return next((event for event in seen if event is not None), None)

    def _looks(self, state: State) -> Iterator[Callable[[], Event | None]]:
        yield from (self._complete.seen, self.signal, self.crash, self._gone.seen)
        if state is State.RECOVERING:
            yield self.recovery
        if state is State.GATHERING:
            yield self.joined
        if state is State.SERVING:
            yield from (self.not_begun, self.deadline)

    def signal(self) -> Event | None:
        """A signal; a training that is complete by then tells more."""
        number = self.notes.stop_signal
        if number is None:
            return None
        self._complete.wait(FLAG_AT_SIGNAL_S)
        return self._complete.seen() or StopSignal(number)

    def crash(self) -> Event | None:
        """A part that has ended; ``scancel`` signals every process of the job, perhaps the part first."""
        event = crash_of({Part.HEAD: self.head, Part.SERVER: self.server, Part.SERVICE: self.service})
        if event is None:
            return None
        self.notes.sleep(SAME_SIGNAL_S)
        return self.signal() or event

    def recovery(self) -> Event | None:
        return recovery_of(self.service, self.server, *([self.head] if self.head else []))

    def not_begun(self) -> Event | None:
        if self.idle is None or time.monotonic() < self._next_idle_look:
            return None
        self._next_idle_look = time.monotonic() + LOOK_AFAR_EVERY_S
        ending = self.idle.look(self.training.has_heard)
        return NotBegun(ending.exit_code, ending.reason, ending.goes_on) if ending else None

    def deadline(self) -> Event | None:
        over = time.monotonic() > self._deadline
        return Deadline(self.job.settings.training_complete_timeout) if over else None
