"""The partner is gone only when two witnesses say so, and Slurm is not asked more often than sites allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from slurm.lib.partner import PartnerWatch
from slurm.lib.scheduler import JobFacts, JobState, JobStatus


class FakeScheduler:
    def __init__(self) -> None:
        self.state = JobState.RUNNING
        self.words = ""
        self.asked_at: list[float] = []
        self.now = 0.0

    def status(self, job_id: str, timeout_s: float = 0.0) -> JobStatus:
        self.asked_at.append(self.now)
        return JobStatus(self.state, self.words, node="cpu-a")

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        return None

    def kill_wait_s(self) -> float:
        return 5

    def facts(self, job_id: str, timeout_s: float = 0.0) -> JobFacts:
        return JobFacts()


class World:
    """A clock, a scheduler and a heartbeat under the test's control."""

    def __init__(self, expected: bool = True) -> None:
        self.scheduler = FakeScheduler()
        self.age: float | None = 0.0
        self.watch = PartnerWatch(
            "runtime", "7", self.scheduler, lambda: self.age, expected=expected, clock=lambda: self.scheduler.now
        )

    def run(self, seconds: int) -> str | None:
        for _ in range(seconds):
            self.scheduler.now += 1
            why = self.watch.gone()
            if why:
                return why
        return None


def test_a_living_heartbeat_is_asked_about_once_a_minute() -> None:
    world = World()
    assert world.run(600) is None
    assert len(world.scheduler.asked_at) == 10


def test_silence_alone_ends_nothing() -> None:
    world = World()
    world.age = 1000.0
    assert world.run(600) is None
    assert len(world.scheduler.asked_at) < 40


def test_silence_and_slurms_word_do() -> None:
    world = World()
    world.run(100)
    world.age, world.scheduler.state = 5.0, JobState.ENDED_BADLY
    why = world.run(6)
    assert why is not None
    assert "the runtime job 7 is gone" in why


@pytest.mark.parametrize("state", [JobState.PURGED, JobState.ENDED_BADLY, JobState.ENDED_WELL])
def test_slurms_word_alone_ends_nothing_while_the_heart_beats(state: JobState) -> None:
    world = World()
    world.scheduler.state = state
    assert world.run(300) is None


@pytest.mark.parametrize("after", [1, 30, 300])
def test_the_end_of_a_job_that_never_beat_is_seen_within_8_seconds(after: int) -> None:
    world = World(expected=False)
    world.age, world.scheduler.state = None, JobState.PENDING
    assert world.run(after) is None
    world.scheduler.state = JobState.ENDED_BADLY
    assert world.run(8) is not None


def test_one_that_slurm_is_just_ending_is_asked_about_sooner() -> None:
    world = World(expected=False)
    world.age, world.scheduler.words = None, "COMPLETING, None"
    assert world.run(1) is None
    world.scheduler.state = JobState.ENDED_BADLY
    assert world.run(4) is not None


def test_one_that_has_fallen_silent_and_that_slurm_is_just_ending_is_asked_about_every_2_seconds() -> None:
    world = World()
    world.run(100)
    world.age, world.scheduler.words = 5.0, "COMPLETING, None"
    assert world.run(6) is None
    world.scheduler.state = JobState.ENDED_BADLY
    assert world.run(2) is not None
    lasting = World()
    lasting.run(100)
    lasting.age, lasting.scheduler.words = 5.0, "COMPLETING, None"
    lasting.scheduler.asked_at.clear()
    assert lasting.run(600) is None
    assert len(lasting.scheduler.asked_at) < 50, "not for ever: its node may not answer Slurm"


def test_a_job_that_had_ended_before_is_seen_at_once() -> None:
    world = World(expected=False)
    world.age, world.scheduler.state = None, JobState.ENDED_BADLY
    assert world.run(1) is not None


def test_a_job_that_slurm_no_longer_lists_is_missed_twice() -> None:
    world = World()
    world.run(1)
    world.age, world.scheduler.state = 5.0, JobState.PURGED
    assert world.run(6) is None
    assert world.run(1) is not None
    assert world.scheduler.asked_at == [1, 6, 8]


def test_one_that_was_never_heard_of_is_missed_for_ten_seconds() -> None:
    """As where a controller was just started: nothing else says that the job is gone."""
    world = World(expected=False)
    world.age, world.scheduler.state = None, JobState.PENDING
    assert world.run(8) is None
    world.scheduler.state = JobState.PURGED
    assert world.run(10) is None
    assert world.run(8) is not None
    assert world.scheduler.asked_at == [1, 9, 19]


def test_one_that_is_listed_again_after_a_moment_is_pending_still() -> None:
    world = World(expected=False)
    for _ in range(20):
        world.age, world.scheduler.state = None, JobState.PURGED
        assert world.run(5) is None
        world.scheduler.state = JobState.PENDING
        assert world.run(20) is None


def test_a_job_that_is_listed_again_was_not_missed_twice() -> None:
    world = World(expected=False)
    for state in (JobState.PURGED, JobState.RUNNING, JobState.PURGED):
        world.age, world.scheduler.state = None, state
        assert world.run(10) is None


def test_an_unknown_state_is_no_end() -> None:
    world = World()
    world.age, world.scheduler.state = 1000.0, JobState.UNKNOWN
    assert world.run(600) is None


def test_a_partner_that_has_not_started_is_not_silent() -> None:
    world = World(expected=False)
    world.age, world.scheduler.state = None, JobState.PENDING
    world.run(120)
    assert len(world.scheduler.asked_at) == 15
    world.age = 0.0
    assert world.run(600) is None
    assert len(world.scheduler.asked_at) == 25


def test_the_flag_of_a_job_that_ended_well_may_be_late() -> None:
    """On a shared directory that is slow; one that ended badly may have left none."""
    for state, seconds in ((JobState.ENDED_WELL, 11), (JobState.ENDED_BADLY, 1)):
        world = World()
        world.watch.flag_late_s = 10.0
        world.age = 1000.0
        world.scheduler.state = state
        assert world.run(seconds - 1) is None
        why = world.run(1)
        assert why is not None
        assert state.value in why
        assert world.watch.ended_well == (state is JobState.ENDED_WELL)
        assert len(world.scheduler.asked_at) == 1, "its word is final"


def test_a_job_that_was_heard_once_and_of_which_nothing_is_known_now_is_silent_from_then_on() -> None:
    """As where an API server that counted the beats was started anew."""
    world = World()
    world.run(30)
    world.age, world.scheduler.state = None, JobState.ENDED_BADLY
    assert world.run(3) is None
    assert world.run(3) is not None


def impatient(patience_s: float = 60) -> World:
    world = World()
    world.watch.patience_s = patience_s
    world.run(5)
    world.age = math.inf
    return world


@pytest.mark.parametrize(
    ("state", "words", "said"),
    [
        (JobState.RUNNING, "RUNNING, on cpu-a", "Slurm says RUNNING"),
        (JobState.UNKNOWN, "connection refused", "Slurm does not answer (connection refused)"),
    ],
)
def test_silence_of_a_patience_ends_the_run_whatever_slurm_says(state: JobState, words: str, said: str) -> None:
    world = impatient()
    world.scheduler.state, world.scheduler.words = state, words
    assert world.run(59) is None
    why = world.run(2)
    assert why == f"the runtime job 7 on cpu-a was not heard of for 60 s; {said} (PARTNER_PATIENCE)"


def test_the_first_word_may_take_longer() -> None:
    world = World()
    world.watch.patience_s = 60
    world.age = None
    assert world.run(299) is None
    why = world.run(2)
    assert why is not None
    assert "was not heard of for 300 s" in why


def test_a_beat_in_between_restores_the_patience() -> None:
    world = impatient()
    world.run(50)
    world.age = 0.0
    world.run(1)
    world.age = math.inf
    assert world.run(50) is None
    assert world.run(11) is not None


def test_time_in_which_this_job_did_not_run_is_not_its_partners_silence() -> None:
    world = impatient()
    world.scheduler.now += 1000
    assert world.run(40) is None
    assert world.run(10) is not None


def test_a_partner_that_slurm_suspended_is_waited_for() -> None:
    world = impatient()
    world.scheduler.words = "SUSPENDED, on cpu-a"
    assert world.run(1000) is None
    world.scheduler.words = "RUNNING, on cpu-a"
    assert world.run(59) is None
    assert world.run(30) is not None


def test_a_partner_that_has_not_started_is_waited_for_without_end() -> None:
    world = World(expected=False)
    world.watch.patience_s = 60
    world.age, world.scheduler.state = None, JobState.PENDING
    assert world.run(5000) is None
