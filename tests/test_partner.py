"""The partner is gone only when two witnesses say so, and Slurm is not asked more often than sites allow."""

from __future__ import annotations

from collections.abc import Sequence

from slurm.lib.partner import PartnerWatch
from slurm.lib.scheduler import JobFacts, JobState, JobStatus


class FakeScheduler:
    def __init__(self) -> None:
        self.state = JobState.RUNNING
        self.asked_at: list[float] = []
        self.now = 0.0

    def status(self, job_id: str) -> JobStatus:
        self.asked_at.append(self.now)
        return JobStatus(self.state, job_id)

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


def test_slurms_word_alone_ends_nothing_while_the_heart_beats() -> None:
    world = World()
    world.scheduler.state = JobState.PURGED
    assert world.run(300) is None


def test_a_job_that_never_beat_ends_on_slurms_word() -> None:
    world = World(expected=False)
    world.age, world.scheduler.state = None, JobState.ENDED_BADLY
    assert world.run(61) is not None


def test_a_job_that_slurm_no_longer_lists_is_missed_twice() -> None:
    world = World(expected=False)
    world.age, world.scheduler.state = None, JobState.PURGED
    assert world.run(61) is None
    assert world.run(61) is not None


def test_a_job_that_runs_without_a_beat_is_asked_about_more_often() -> None:
    world = World(expected=False)
    world.age = None
    world.run(61)
    world.scheduler.state = JobState.ENDED_BADLY
    assert world.run(10) is not None


def test_an_unknown_state_is_no_end() -> None:
    world = World()
    world.age, world.scheduler.state = 1000.0, JobState.UNKNOWN
    assert world.run(600) is None


def test_a_partner_that_has_not_started_is_not_silent() -> None:
    world = World(expected=False)
    world.age, world.scheduler.state = None, JobState.PENDING
    world.run(120)
    assert len(world.scheduler.asked_at) == 2


def test_the_flag_of_a_job_that_ended_well_may_be_late() -> None:
    """On a shared directory that is slow; one that ended badly may have left none."""
    for state, seconds in ((JobState.ENDED_WELL, 15), (JobState.ENDED_BADLY, 5)):
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
