"""The runtime job's supervisor: what follows from what, and what holds after any sequence of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slurm.lib.coordination import Flag
from slurm.lib.endings import End
from slurm.lib.supervisor import (
    CRASH_WINDOW_S,
    MOST_CRASHES,
    NEXT_STATES,
    RECOVERY_DEADLINE_S,
    Action,
    AllStopped,
    Answers,
    Crashed,
    Deadline,
    Event,
    Failed,
    Joined,
    NotBegun,
    NoteEnd,
    Outcome,
    Part,
    Publish,
    Recovered,
    Restart,
    RuntimeGone,
    Silent,
    State,
    Stop,
    StopSignal,
    Supervisor,
    TellTraining,
    TrainingComplete,
    TrainingGone,
    Withdraw,
    step,
)

SERVER_ENDED = Crashed(Part.SERVER, "the API server on cpu-a ended with exit code 137: last words")
SERVICE_ENDED = Crashed(Part.SERVICE, "the Podman service on cpu-a ended with exit code 125: out of memory")
COMPLETE = Flag("8", "7", exit_code=3, reason="the trainer failed")
ENDINGS: dict[str, tuple[Event, Outcome]] = {
    "a signal": (StopSignal(15), Outcome(143, "ended by SIGTERM")),
    "a complete training": (
        TrainingComplete(COMPLETE),
        Outcome(
            0,
            "training job 8 is complete: the trainer failed (exit code 3)",
            as_planned=True,
            others=(End("training", "8", 3, "the trainer failed", "training"),),
        ),
    ),
    "a flag made by hand": (
        TrainingComplete(Flag(by_hand=True)),
        Outcome(0, "training_complete.flag was set by hand", as_planned=True),
    ),
    "a training that is gone": (
        TrainingGone("8", "the training job 8 is gone: NODE_FAIL"),
        Outcome(
            69,
            "the training job 8 is gone: NODE_FAIL, without a completion flag",
            others=(End("training", "8", None, "the training job 8 is gone: NODE_FAIL", "runtime"),),
        ),
    ),
    "a training that goes on elsewhere": (NotBegun(0, "queued again", True), Outcome(0, "queued again", True)),
    "a training that cannot begin": (NotBegun(75, "too late", False), Outcome(75, "too late")),
    "a runtime that ends as planned": (RuntimeGone("the run is over", True), Outcome(0, "the run is over", True)),
    "a runtime that is gone": (RuntimeGone("it is gone", False), Outcome(69, "it is gone")),
    "the deadline": (
        Deadline(60),
        Outcome(75, "the training was not complete after TRAINING_COMPLETE_TIMEOUT=60"),
    ),
    "an error": (Failed(71, "no Podman on cpu-a"), Outcome(71, "no Podman on cpu-a")),
}


def after(*events: tuple[float, Event], supervisor: Supervisor | None = None) -> tuple[Supervisor, list[Action]]:
    """The state after events, each with its time, and all actions."""
    now = supervisor or Supervisor()
    done: list[Action] = []
    for at, event in events:
        now, actions = step(now, event, at)
        done += actions
    return now, done


SERVING, _ = after((0.0, Answers()))
RECOVERING, _ = after((0.0, Answers()), (1.0, SERVER_ENDED))


@pytest.mark.parametrize("begin", [Supervisor(), SERVING, RECOVERING], ids=lambda begin: begin.state.value)
@pytest.mark.parametrize("name", ENDINGS)
def test_each_reason_ends_the_run_in_every_state_in_which_it_lives(begin: Supervisor, name: str) -> None:
    event, outcome = ENDINGS[name]
    stopping, actions = step(begin, event, 5.0)
    assert stopping == replace(begin, state=State.STOPPING, outcome=outcome)
    assert actions == ((Stop(outcome),) if outcome.as_planned else (Stop(outcome), TellTraining(outcome)))
    ended, last = step(stopping, AllStopped(), 6.0)
    assert ended == replace(stopping, state=State.ENDED)
    assert last == ((NoteEnd(outcome),) if outcome.as_planned else (Withdraw(outcome), NoteEnd(outcome)))


@pytest.mark.parametrize("crash", [SERVER_ENDED, SERVICE_ENDED])
def test_a_part_that_crashes_is_started_again_and_that_is_said(crash: Crashed) -> None:
    serving, actions = after((0.0, Answers()), (10.0, crash), (10.5, Silent()), (12.0, Answers()))
    assert actions == [Publish(), Restart(crash.part, crash.words), Recovered(2.0)]
    assert serving == Supervisor(State.SERVING, (10.0,))


def test_a_part_that_crashes_before_the_job_serves_ends_it_with_its_last_words() -> None:
    stopping, actions = after((0.0, SERVER_ENDED))
    outcome = Outcome(71, SERVER_ENDED.words)
    assert stopping.outcome == outcome
    assert actions == [Stop(outcome), TellTraining(outcome)]


def test_the_third_crash_of_either_part_within_a_minute_ends_the_run() -> None:
    crashes = ((1.0, SERVER_ENDED), (2.0, SERVICE_ENDED), (1.0 + CRASH_WINDOW_S - 0.1, SERVICE_ENDED))
    stopping, actions = after((0.0, Answers()), *crashes)
    outcome = Outcome(
        71, f"the API server or the Podman service ended 3 times within 60 s; the last time: {SERVICE_ENDED.words}"
    )
    assert stopping.outcome == outcome
    assert actions[-2:] == [Stop(outcome), TellTraining(outcome)]
    assert sum(isinstance(action, Restart) for action in actions) == MOST_CRASHES - 1


def test_a_crash_that_is_a_minute_old_does_not_count() -> None:
    crashes = ((1.0, SERVER_ENDED), (2.0, SERVER_ENDED), (1.0 + CRASH_WINDOW_S, SERVER_ENDED))
    recovering, actions = after((0.0, Answers()), *crashes)
    assert recovering.state is State.RECOVERING
    assert actions[-1] == Restart(Part.SERVER, SERVER_ENDED.words)


def test_a_restart_that_never_answers_ends_the_run() -> None:
    almost = 1.0 + RECOVERY_DEADLINE_S - 0.1
    assert step(RECOVERING, Silent(), almost) == (RECOVERING, ())
    stopping, _ = step(RECOVERING, Silent(), 1.0 + RECOVERY_DEADLINE_S)
    assert stopping.outcome == Outcome(
        75, "waited 60 s for the API server and the Podman service to answer again, in vain"
    )


def test_a_head_is_published_once_enough_nodes_have_joined_also_after_a_crash() -> None:
    crash = Crashed(Part.HEAD, "the head on cpu-a ended with exit code 137")
    events = ((0.0, Answers()), (1.0, crash), (2.0, Joined()), (3.0, Answers()), (4.0, Joined()), (5.0, Joined()))
    serving, actions = after(*events, supervisor=Supervisor(has_head=True))
    assert actions == [Restart(Part.HEAD, crash.words), Recovered(2.0), Publish()]
    assert serving == Supervisor(State.SERVING, (1.0,), has_head=True, is_complete=True)


def test_a_crash_that_ends_a_run_with_a_head_names_all_parts() -> None:
    silent = after((0.0, Answers()), (1.0, SERVER_ENDED), (61.0, Silent()), supervisor=Supervisor(has_head=True))[0]
    assert silent.outcome == Outcome(
        75, "waited 60 s for the head and the API server and the Podman service to answer again, in vain"
    )


def test_a_job_cannot_have_stopped_before_it_began_to() -> None:
    with pytest.raises(ValueError, match="a runtime job that is serving cannot become ended"):
        step(SERVING, AllStopped(), 1.0)


class Lives(RuleBasedStateMachine):
    """A runtime job through any sequence of events; its parts as an edge that obeys keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.supervisor = Supervisor()
        self.living: dict[Part, int] = {}
        self.restarts: list[float] = []
        self.done: list[Action] = []

    @initialize(begin=st.floats(0, 1e6), has_head=st.booleans())
    def begins(self, begin: float, has_head: bool) -> None:
        self.now = begin
        self.supervisor = Supervisor(has_head=has_head)
        self.living = dict.fromkeys(self.supervisor.parts, 1)

    def take(self, event: Event) -> None:
        before = self.supervisor
        self.supervisor, actions = step(before, event, self.now)
        assert self.supervisor.state is before.state or self.supervisor.state in NEXT_STATES[before.state]
        assert before.outcome is None or self.supervisor.outcome == before.outcome, "the first reason stays"
        assert before.state is not State.ENDED or (self.supervisor == before and not actions)
        for action in actions:
            self.done.append(action)
            if isinstance(action, Restart):
                self.living[action.part] += 1
                self.restarts.append(self.now)

    @rule(seconds=st.floats(0, 90))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(part=st.sampled_from(Part), words=st.text(max_size=9))
    def a_part_crashes(self, part: Part, words: str) -> None:
        if self.living.get(part):
            self.living[part] -= 1
            self.take(Crashed(part, words))

    @rule()
    def all_answers(self) -> None:
        if all(self.living.values()):
            self.take(Answers())

    @rule()
    def enough_nodes_join(self) -> None:
        self.take(Joined())

    @rule()
    def something_is_silent(self) -> None:
        self.take(Silent())

    @rule(name=st.sampled_from(sorted(ENDINGS)))
    def a_reason_to_end(self, name: str) -> None:
        self.take(ENDINGS[name][0])

    @precondition(lambda self: self.supervisor.state is State.STOPPING)
    @rule()
    def all_is_stopped(self) -> None:
        self.take(AllStopped())

    @invariant()
    def there_are_never_two_of_a_part(self) -> None:
        assert max(self.living.values(), default=0) <= 1

    @invariant()
    def what_serves_or_recovers_has_its_parts(self) -> None:
        if self.supervisor.state in {State.SERVING, State.RECOVERING, State.GATHERING}:
            assert set(self.living.values()) == {1}

    @invariant()
    def at_most_two_restarts_a_minute(self) -> None:
        for at in self.restarts:
            assert sum(at <= other < at + CRASH_WINDOW_S for other in self.restarts) < MOST_CRASHES

    @invariant()
    def each_thing_is_said_once(self) -> None:
        for kind in (Publish, Stop, TellTraining, Withdraw, NoteEnd):
            assert sum(isinstance(action, kind) for action in self.done) <= 1, kind

    @invariant()
    def what_has_a_head_serves_only_once_its_nodes_have_joined(self) -> None:
        said = any(isinstance(action, Publish) for action in self.done)
        if self.supervisor.has_head:
            assert said is self.supervisor.is_complete
        if self.supervisor.state is State.SERVING:
            assert said

    @invariant()
    def a_job_that_stops_has_a_reason_and_no_other_has(self) -> None:
        stops = self.supervisor.state in {State.STOPPING, State.ENDED}
        assert (self.supervisor.outcome is not None) is stops
        assert any(isinstance(action, Stop) for action in self.done) is stops

    @invariant()
    def a_training_that_loses_its_runtime_is_told_and_no_other_is(self) -> None:
        outcome = self.supervisor.outcome
        told = [action.outcome for action in self.done if isinstance(action, TellTraining)]
        assert told == ([outcome] if outcome is not None and not outcome.as_planned else [])


Lives.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLives: type = Lives.TestCase


def test_every_state_can_be_reached_and_left_but_the_last() -> None:
    reached = {State.STARTING}
    while more := {new for state in reached for new in NEXT_STATES[state]} - reached:
        reached |= more
    assert reached == set(State)
    assert [state for state in State if not NEXT_STATES[state]] == [State.ENDED]
