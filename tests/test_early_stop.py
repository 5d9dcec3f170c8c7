"""The last minutes before a time limit: what counts as a new checkpoint, and what becomes of a real trainer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.lib.checkpoints import RESTS_S, TRACKER, Checkpoints, NewCheckpoint
from slurm.lib.deadlines import Deadline
from slurm.lib.early_stop import EarlyStop
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.settings import Settings


def tracker(folder: Path, step: object) -> None:
    path = folder / "skyrl" / TRACKER
    path.parent.mkdir(exist_ok=True)
    path.write_text(str(step))


def test_the_tracker_is_the_mark_of_verl(tmp_path: Path) -> None:
    of_verl = Checkpoints(tmp_path, "skyrl", tracked=True)
    (tmp_path / "skyrl" / "global_step_3").mkdir(parents=True)
    (tmp_path / "skyrl" / "global_step_3" / "data.pt").write_text("x")
    assert of_verl.mark() == "", "everything but the tracker is there: not complete"
    tracker(tmp_path, 3)
    assert of_verl.mark() == "step 3"
    tracker(tmp_path, "")
    assert of_verl.mark() == ""


def test_all_files_are_the_mark_of_another_trainer(tmp_path: Path) -> None:
    own = Checkpoints(tmp_path, "skyrl", tracked=False)
    marks = [own.mark()]
    assert marks == [""]
    path = tmp_path / "deep" / "weights.pt"
    path.parent.mkdir()
    path.write_text("1")
    marks.append(own.mark())
    path.write_text("12")
    marks.append(own.mark())
    os.utime(path, ns=(1, 1))
    marks.append(own.mark())
    path.rename(path.with_name("others.pt"))
    marks.append(own.mark())
    assert len(set(marks)) == len(marks)
    assert own.mark() == marks[-1]
    tracker(tmp_path, 4)
    assert own.mark() == "step 4", "where it keeps VERL's tracker, that is the mark"
    assert Checkpoints(tmp_path / "nowhere", "skyrl", tracked=False).mark() == ""


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_files_must_rest_before_they_are_a_checkpoint(tmp_path: Path) -> None:
    clock = Clock()
    watch = NewCheckpoint(Checkpoints(tmp_path, "skyrl", tracked=False), clock)
    path = tmp_path / "weights.pt"
    for size in range(1, 4):
        path.write_text("x" * size)
        clock.now += RESTS_S - 0.1
        assert watch.arrived() is None, "still being written"
    clock.now += RESTS_S
    assert watch.arrived()


def test_a_tracked_checkpoint_counts_at_once_and_an_old_one_never(tmp_path: Path) -> None:
    tracker(tmp_path, 3)
    watch = NewCheckpoint(Checkpoints(tmp_path, "skyrl", tracked=True))
    assert watch.arrived() is None
    tracker(tmp_path, 4)
    assert watch.arrived() == "step 4"


# --- with a real process ---------------------------------------------------------------------------------------------

SAVES = 'trap \'n=$((n + 1)); echo "$n" > "$1/saved.$$"; mv "$1/saved.$$" "$1/saved"\' USR1; n=0; : > "$1/up"; '
SAVES += "while :; do sleep 0.05; done"
DEAF = ': > "$1/up"; exec sleep 60'


class Trainer:
    """A real process that EarlyStop is for, and the clock of its deadline."""

    def __init__(self, folder: Path, script: str) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir()
        spec = ChildSpec(("bash", "-c", script, "trainer", str(folder)), dict(os.environ), "the trainer")
        self.child = Child(spec, stop_grace_s=0.0)
        self.clock = Clock(1000.0)

    def early(self, settings: Settings, at: float | None = None, goes_on: bool = True) -> EarlyStop:
        self.until(lambda: (self.folder / "up").exists())
        checkpoints = Checkpoints(self.checkpoints, "skyrl", tracked=not settings.training_command)
        return EarlyStop(settings, Deadline(at, "this job"), checkpoints, goes_on, self.child.send, self.clock)

    def until(self, condition: object) -> None:
        assert callable(condition)
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    @property
    def signals(self) -> str:
        path = self.folder / "saved"
        return path.read_text().strip() if path.exists() else ""


@pytest.fixture
def trainer(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Trainer]:
    made = Trainer(tmp_path, getattr(request, "param", SAVES))
    with made.child:
        yield made


OWN = Settings(restarts=1, restart_lead=100, training_command="x")
VERL = Settings(restarts=1, restart_lead=100)
OWN_VERL = Settings(restarts=1, restart_lead=100, training_command="x", training_command_is_verl=True)


def test_a_command_is_told_once_and_stopped_after_its_checkpoint(trainer: Trainer) -> None:
    early = trainer.early(OWN)
    assert early.saved() is None
    early.signalled(signal.SIGUSR1)
    early.signalled(signal.SIGUSR1)
    assert trainer.signals == "", "the handler only notes it: the present checkpoints have to be known first"
    assert early.saved() is None
    trainer.until(lambda: trainer.signals == "1")
    assert early.saved() is None, "what it does elsewhere is no checkpoint"
    tracker(trainer.checkpoints, 7)
    assert early.saved() == "step 7"
    assert trainer.signals == "1"


def test_a_checkpoint_made_right_after_the_signal_is_seen(trainer: Trainer) -> None:
    """The present state is taken before the trainer knows."""
    early = trainer.early(OWN)
    early.signalled(signal.SIGUSR1)
    early.send = lambda number: tracker(trainer.checkpoints, 1)
    early.saved()
    assert early.saved() == "step 1"


def test_the_clock_says_it_where_slurm_does_not(trainer: Trainer) -> None:
    """The runtime job's limit comes first, of which this job gets no signal."""
    early = trainer.early(OWN, at=1200.0)
    trainer.clock.now = 1099.0
    early.saved()
    assert not early.told
    trainer.clock.now = 1100.0
    early.saved()
    trainer.until(lambda: trainer.signals == "1")


@pytest.mark.parametrize("settings", [VERL, OWN_VERL])
def test_verl_never_gets_the_signal(trainer: Trainer, settings: Settings) -> None:
    early = trainer.early(settings)
    early.signalled(signal.SIGUSR1)
    early.saved()
    tracker(trainer.checkpoints, 5)
    assert early.saved() == "step 5"
    time.sleep(0.3)
    assert trainer.signals == ""


def test_the_last_attempt_is_told_but_not_stopped(trainer: Trainer) -> None:
    early = trainer.early(OWN, goes_on=False)
    early.signalled(signal.SIGUSR1)
    early.saved()
    trainer.until(lambda: trainer.signals == "1")
    tracker(trainer.checkpoints, 7)
    assert early.saved() is None


def test_without_restarts_the_signal_goes_straight_on(trainer: Trainer) -> None:
    early = trainer.early(Settings(training_command="x"), at=1000.0)
    early.signalled(signal.SIGUSR1)
    trainer.until(lambda: trainer.signals == "1")
    tracker(trainer.checkpoints, 7)
    assert early.saved() is None
    assert not early.told


@pytest.mark.parametrize("trainer", [DEAF], indirect=True)
def test_without_restarts_verl_is_not_killed_by_it(trainer: Trainer) -> None:
    early = trainer.early(Settings())
    early.signalled(signal.SIGUSR1)
    assert not trainer.child.wait(0.3)
    early.signalled(signal.SIGUSR2)
    assert trainer.child.wait(5), "another signal is the user's own affair"


@pytest.mark.parametrize("trainer", [DEAF], indirect=True)
def test_a_command_without_a_handler_dies_of_it_which_is_no_failure_of_its_own(trainer: Trainer) -> None:
    early = trainer.early(OWN)
    early.signalled(signal.SIGUSR1)
    early.saved()
    assert trainer.child.wait(5)
    code = trainer.child.exit_code
    assert code is not None
    assert early.killed_by_it(code)
    assert not early.killed_by_it(1)
