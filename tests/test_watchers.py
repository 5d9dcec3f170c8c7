"""What the runtime job sees of its run, and its server's second life; the server is a real process that waits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.lib.api_server_child import ApiServer
from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.job_context import JobContext
from slurm.lib.partner import PartnerWatch
from slurm.lib.processes import ChildSpec
from slurm.lib.scheduler import JobState
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.supervisor import (
    Crashed,
    Failed,
    Part,
    Silent,
    State,
    StopSignal,
    TrainingComplete,
    TrainingGone,
)
from slurm.lib.watchers import RunWatch, TrainingWatcher
from tests.runs import until
from tests.test_partner import FakeScheduler

ROOT = Path(__file__).resolve().parent.parent
SAYS_ITS_ARGUMENTS = ("bash", "-c", 'echo "$*" > "$0.part"; mv "$0.part" "$0"; echo last words >&2; exec sleep 60')


class Place:
    """A runtime job with a server, whose process writes its arguments into a file."""

    def __init__(self, folder: Path, is_ours: bool = True) -> None:
        self.scheduler = FakeScheduler()
        self.directory = CoordinationDir(folder)
        job = JobContext("7", self.directory, Settings(), {}, self.scheduler, ROOT, own_dir=True)
        self.notes = SignalNotes()
        self.said = folder / "arguments"
        self.sessions: list[int] = []
        self.listener = socket.socket()
        fd = self.listener.fileno()
        argv = (*SAYS_ITS_ARGUMENTS, str(self.said), "--fd", str(fd))
        spec = ChildSpec(argv, dict(os.environ), "the API server", stderr=subprocess.PIPE, pass_fds=(fd,))
        self.server = ApiServer(spec, "key", "here", 1, is_ours=is_ours, stop_s=1.0, own_session=self.sessions.append)
        self.watch = RunWatch(job, self.notes, TrainingWatcher.of(job), self.server)

    def kill(self) -> None:
        until("its arguments", self.said.exists, 10)
        os.kill(self.sessions[-1], signal.SIGKILL)
        os.waitid(os.P_PID, self.sessions[-1], os.WEXITED | os.WNOWAIT)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    with made.server, made.listener:
        yield made


@pytest.mark.parametrize("state", [State.STARTING, State.SERVING, State.RECOVERING])
def test_a_server_that_is_killed_is_seen_in_every_state(place: Place, state: State) -> None:
    place.kill()
    words = f"the API server on {socket.gethostname()} ended with exit code 137 (SIGKILL: somebody killed it, or the "
    event = place.watch.look(state)
    assert isinstance(event, Crashed)
    assert event.part is Part.SERVER
    assert event.words.startswith(words), "what it logged before is not about its end"


def test_scancel_may_reach_the_server_before_the_body(place: Place) -> None:
    place.kill()
    threading.Timer(0.1, place.notes.note, (signal.SIGTERM,)).start()
    assert place.watch.look(State.SERVING) == StopSignal(signal.SIGTERM)


def test_another_server_than_ours_cannot_take_over(tmp_path: Path) -> None:
    place = Place(tmp_path, is_ours=False)
    with place.server, place.listener:
        place.kill()
        event = place.watch.look(State.SERVING)
        assert isinstance(event, Failed)
        assert event.exit_code == 71


def test_the_second_server_is_told_to_adopt_on_the_same_socket_and_is_the_guardians_too(place: Place) -> None:
    place.kill()
    first = place.said.read_text()
    place.said.unlink()
    place.server.restart()
    until("its arguments", place.said.exists, 10)
    assert place.said.read_text() == f"{first.strip()} --adopt\n"
    assert len(set(place.sessions)) == 2
    inherited = Path(f"/proc/{place.sessions[1]}/fd/{place.listener.fileno()}")
    assert inherited.stat().st_ino == os.fstat(place.listener.fileno()).st_ino
    place.server.check_alive()


@pytest.mark.parametrize("state", [State.STARTING, State.SERVING, State.RECOVERING])
def test_a_complete_training_is_seen_in_every_state_and_tells_more_than_a_signal(place: Place, state: State) -> None:
    assert place.watch.look(state) in {None, Silent()}
    flag = Flag.of_this_host("8", "7", 0, "the trainer ended")
    place.directory.publish(place.directory.training_complete, flag)
    place.notes.note(signal.SIGTERM)
    assert place.watch.look(state) == TrainingComplete(flag)


@pytest.mark.parametrize(("state", "is_seen"), [(State.STARTING, 1), (State.SERVING, 1), (State.RECOVERING, 0)])
def test_slurm_is_asked_for_the_training_but_not_while_a_part_is_started_again(
    place: Place, state: State, is_seen: int
) -> None:
    place.scheduler.state = JobState.ENDED_BADLY
    partner = PartnerWatch("training", "8", place.scheduler, lambda: 99.0, clock=lambda: place.scheduler.now)
    place.scheduler.now = 1000.0
    place.watch.training.partner = partner
    event = place.watch.look(state)
    assert len(place.scheduler.asked_at) == is_seen
    assert isinstance(event, TrainingGone if is_seen else Silent)
