"""Why does the runtime job end, and what is done about a server that ended by itself? Decided here, and only here.

The job is STARTING, then SERVING; while its API server or its Podman service is being started again it is RECOVERING;
then it is STOPPING, for the first reason that came, and ENDED. A job with a head is GATHERING before it serves: its
nodes are to join. ``step`` is pure: ``serving_body`` hands it what the watchers saw and does what it answers. A worker,
which is a further node of such a runtime, has the same life.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace

from slurm.lib.coordination import Flag
from slurm.lib.endings import End
from slurm.lib.errors import EXIT_ENVIRONMENT, EXIT_OK, EXIT_SIGNAL_BASE, EXIT_TIMEOUT, EXIT_UNAVAILABLE
from slurm.lib.partner import FLAG_LATE_S

# What ends again and again has a cause that a restart does not mend: this many crashes within so many seconds end the
# run. Two are two accidents, such as a node short of memory that killed the server and then the service.
MOST_CRASHES, CRASH_WINDOW_S = 3, 60.0
RECOVERY_DEADLINE_S = 60.0  # as for the first start


class State(enum.Enum):
    """Where the runtime job is in its life."""

    STARTING = "starting"
    GATHERING = "waiting for its nodes"
    SERVING = "serving"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    ENDED = "ended"


NEXT_STATES: Mapping[State, frozenset[State]] = {
    State.STARTING: frozenset({State.SERVING, State.GATHERING, State.STOPPING}),
    State.GATHERING: frozenset({State.SERVING, State.RECOVERING, State.STOPPING}),
    State.SERVING: frozenset({State.RECOVERING, State.STOPPING}),
    State.RECOVERING: frozenset({State.SERVING, State.GATHERING, State.STOPPING}),
    State.STOPPING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}


class Part(enum.Enum):
    """A child of the job's that is started again when it ends by itself."""

    SERVER = "the API server"
    SERVICE = "the Podman service"
    HEAD = "the head"


@dataclass(frozen=True)
class Outcome:
    """Why the job ends: its exit code, a sentence, and whether that is as planned: no training loses its runtime.

    ``others``: how the training ended, as far as that is known.
    """

    exit_code: int
    reason: str
    as_planned: bool = False
    others: tuple[End, ...] = ()


# --- events: what has been seen ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """All parts answer."""


@dataclass(frozen=True)
class Joined:
    """Nodes with room for enough sandboxes have joined the head."""


@dataclass(frozen=True)
class Silent:
    """After a restart, one of them does not answer yet."""


@dataclass(frozen=True)
class Crashed:
    """A part has ended by itself; ``words`` is the sentence about it, with its last words."""

    part: Part
    words: str


@dataclass(frozen=True)
class StopSignal:
    """A signal asks the job to end."""

    number: int


@dataclass(frozen=True)
class TrainingComplete:
    """The training's completion flag is there."""

    flag: Flag


@dataclass(frozen=True)
class TrainingGone:
    """The training job ``job_id`` has ended without a flag that was seen here; ``why`` is the sentence about it.

    ``ended_well``: Slurm says so, which is believed where a slow directory tells less.
    """

    job_id: str
    why: str
    ended_well: bool = False


@dataclass(frozen=True)
class NotBegun:
    """The training has not begun and is waited for no longer; ``goes_on``: in another pair of jobs."""

    exit_code: int
    reason: str
    goes_on: bool


@dataclass(frozen=True)
class RuntimeGone:
    """The runtime that a worker belongs to has ended, ``as_planned`` or not; ``why`` is the sentence about it."""

    why: str
    as_planned: bool


@dataclass(frozen=True)
class Deadline:
    """The training was not complete within ``seconds`` of the publication."""

    seconds: int


@dataclass(frozen=True)
class Failed:
    """Something that cannot be mended here; ``reason`` is the sentence about it."""

    exit_code: int
    reason: str


@dataclass(frozen=True)
class AllStopped:
    """Everything that the job started is gone."""


Event = (
    Answers
    | Joined
    | Silent
    | Crashed
    | StopSignal
    | TrainingComplete
    | TrainingGone
    | NotBegun
    | RuntimeGone
    | Deadline
    | Failed
    | AllStopped
)


# --- actions: what is to be done --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Publish:
    """Tell the training where the server is: it answers for the first time, and has all the room that is needed."""


@dataclass(frozen=True)
class Restart:
    """Start a part again, because of ``why``."""

    part: Part
    why: str


@dataclass(frozen=True)
class Recovered:
    """Say that all answers again, so many seconds after the last crash."""

    seconds: float


@dataclass(frozen=True)
class TellTraining:
    """Say in the coordination directory why the training loses its runtime."""

    outcome: Outcome


@dataclass(frozen=True)
class Stop:
    """Stop everything, in reverse order of its start."""

    outcome: Outcome


@dataclass(frozen=True)
class Withdraw:
    """Take a training that is still pending out of the queue: it could only fail."""

    outcome: Outcome


@dataclass(frozen=True)
class NoteEnd:
    """Write into the run's record how the job ended."""

    outcome: Outcome


Action = Publish | Restart | Recovered | TellTraining | Stop | Withdraw | NoteEnd


@dataclass(frozen=True)
class Supervisor:
    """The job's state; when its parts crashed, in seconds of one clock; and why it ends, once that is decided.

    ``has_head``: whether it waits for nodes that join its head, and ``is_complete`` whether enough of them have.
    """

    state: State = State.STARTING
    crashes: tuple[float, ...] = ()
    outcome: Outcome | None = None
    has_head: bool = False
    is_complete: bool = False

    @property
    def state_when_well(self) -> State:
        """The state once all parts answer."""
        return State.GATHERING if self.has_head and not self.is_complete else State.SERVING

    @property
    def parts(self) -> tuple[Part, ...]:
        """What may crash, as messages name it."""
        return ((Part.HEAD,) if self.has_head else ()) + (Part.SERVER, Part.SERVICE)

    def to(self, state: State) -> Supervisor:
        """The same in its next state; ``ValueError`` for a change that NEXT_STATES does not allow."""
        if state not in NEXT_STATES[self.state]:
            raise ValueError(f"a runtime job that is {self.state.value} cannot become {state.value}")
        return replace(self, state=state)


Step = tuple[Supervisor, tuple[Action, ...]]


def step(supervisor: Supervisor, event: Event, now: float) -> Step:
    """What an event changes and what is to be done about it; ``now`` in seconds. Pure.

    The first reason to end counts: what is seen while the job stops changes nothing.
    """
    if isinstance(event, AllStopped):
        return _all_stopped(supervisor)
    if supervisor.state in {State.STOPPING, State.ENDED}:
        return supervisor, ()
    if isinstance(event, Answers):
        return _answers(supervisor, now)
    if isinstance(event, Joined):
        return _joined(supervisor)
    if isinstance(event, Silent):
        return _silent(supervisor, now)
    if isinstance(event, Crashed):
        return _crashed(supervisor, event, now)
    return _stops(supervisor, outcome_of(event))


def _all_stopped(supervisor: Supervisor) -> Step:
    outcome = supervisor.outcome
    ended = supervisor.to(State.ENDED)
    assert outcome is not None, "a job stops for a reason"
    return ended, (NoteEnd(outcome),) if outcome.as_planned else (Withdraw(outcome), NoteEnd(outcome))


def _answers(supervisor: Supervisor, now: float) -> Step:
    well = supervisor.state_when_well
    if supervisor.state is State.STARTING:
        return supervisor.to(well), () if well is State.GATHERING else (Publish(),)
    if supervisor.state is State.RECOVERING:
        return supervisor.to(well), (Recovered(now - supervisor.crashes[-1]),)
    return supervisor, ()


def _joined(supervisor: Supervisor) -> Step:
    if supervisor.state is not State.GATHERING:
        return supervisor, ()
    return replace(supervisor, is_complete=True).to(State.SERVING), (Publish(),)


def _silent(supervisor: Supervisor, now: float) -> Step:
    if supervisor.state is not State.RECOVERING or now - supervisor.crashes[-1] < RECOVERY_DEADLINE_S:
        return supervisor, ()
    names = " and ".join(part.value for part in supervisor.parts)
    reason = f"waited {RECOVERY_DEADLINE_S:g} s for {names} to answer again, in vain"
    return _stops(supervisor, Outcome(EXIT_TIMEOUT, reason))


def _crashed(supervisor: Supervisor, event: Crashed, now: float) -> Step:
    """One that ends before anything was published has a cause of its own, such as a wrong flag: no second attempt."""
    if supervisor.state is State.STARTING:
        return _stops(supervisor, Outcome(EXIT_ENVIRONMENT, event.words))
    recent = (*(at for at in supervisor.crashes if now - at < CRASH_WINDOW_S), now)
    counted = replace(supervisor, crashes=recent)
    if len(recent) >= MOST_CRASHES:
        return _stops(counted, Outcome(EXIT_ENVIRONMENT, _too_often(supervisor, event.words)))
    recovering = counted if supervisor.state is State.RECOVERING else counted.to(State.RECOVERING)
    return recovering, (Restart(event.part, event.words),)


def _too_often(supervisor: Supervisor, last_words: str) -> str:
    names = " or ".join(part.value for part in supervisor.parts)
    return f"{names} ended {MOST_CRASHES} times within {CRASH_WINDOW_S:g} s; the last time: {last_words}"


def _stops(supervisor: Supervisor, outcome: Outcome) -> Step:
    tell = () if outcome.as_planned else (TellTraining(outcome),)
    return replace(supervisor.to(State.STOPPING), outcome=outcome), (Stop(outcome), *tell)


def outcome_of(
    event: StopSignal | TrainingComplete | TrainingGone | NotBegun | RuntimeGone | Deadline | Failed,
) -> Outcome:
    """How the job ends by an event that ends it. Pure."""
    if isinstance(event, StopSignal):
        return Outcome(EXIT_SIGNAL_BASE + event.number, f"ended by {signal.Signals(event.number).name}")
    if isinstance(event, TrainingComplete):
        return _completed(event.flag)
    if isinstance(event, TrainingGone):
        if event.ended_well:
            others = (End("training", event.job_id, EXIT_OK, event.why, "runtime"),)
            reason = f"{event.why}; its completion flag was not seen here within {FLAG_LATE_S:g} s"
            return Outcome(EXIT_OK, reason, as_planned=True, others=others)
        others = (End("training", event.job_id, None, event.why, "runtime"),)
        return Outcome(EXIT_UNAVAILABLE, f"{event.why}, without a completion flag", others=others)
    if isinstance(event, NotBegun):
        return Outcome(event.exit_code, event.reason, as_planned=event.goes_on)
    if isinstance(event, RuntimeGone):
        return Outcome(EXIT_OK if event.as_planned else EXIT_UNAVAILABLE, event.why, as_planned=event.as_planned)
    if isinstance(event, Deadline):
        what = f"TRAINING_COMPLETE_TIMEOUT={event.seconds}"
        return Outcome(EXIT_TIMEOUT, f"the training was not complete after {what}")
    return Outcome(event.exit_code, event.reason)


def _completed(flag: Flag) -> Outcome:
    """What the completion flag means for the runtime job: it has done its work, however the trainer ended."""
    if flag.by_hand:
        return Outcome(EXIT_OK, "training_complete.flag was set by hand", as_planned=True)
    reason = f"training job {flag.job_id} is complete: {flag.reason or 'no reason given'} (exit code {flag.exit_code})"
    return Outcome(EXIT_OK, reason, as_planned=True, others=(End.of_flag("training", flag),))
