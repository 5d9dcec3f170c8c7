"""What the runtime job sees of its run, and its server's second life; the server is a real process that waits."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.lib.api_server_child import ApiServer, _own_spec
from slurm.lib.coordination import CoordinationDir, Flag, FlagReader
from slurm.lib.errors import EnvironmentProblem
from slurm.lib.images import busybox_archive
from slurm.lib.job_context import JobContext
from slurm.lib.partner import PartnerWatch
from slurm.lib.podman_storage import PodmanStorage
from slurm.lib.prebuild_job import child_spec
from slurm.lib.processes import ChildSpec
from slurm.lib.scheduler import JobState
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.supervisor import (
    Crashed,
    Event,
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

    def seen(self, state: State) -> Event:
        """What is seen first, beside a part that does not answer."""

        found: list[Event] = []

        def look() -> bool:
            event = self.watch.look(state)
            if event is not None and event != Silent():
                found.append(event)
            return bool(found)

        with self.watch.asking():
            until("something to be seen", look, 10)
        return found[0]

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
    assert place.seen(state) == TrainingComplete(flag)


@pytest.mark.parametrize("state", [State.STARTING, State.SERVING, State.RECOVERING])
def test_a_training_that_is_gone_is_seen_in_every_state(place: Place, state: State) -> None:
    place.scheduler.state = JobState.ENDED_BADLY
    partner = PartnerWatch("training", "8", place.scheduler, lambda: 99.0, clock=lambda: place.scheduler.now)
    place.watch.training.partner = partner
    event = place.seen(state)
    assert isinstance(event, TrainingGone)
    assert event.job_id == "8"
    assert len(place.scheduler.asked_at) == 1


def test_the_time_of_loading_images_is_not_the_trainings_silence(place: Place) -> None:
    now = place.scheduler
    now.words = "RUNNING, on cpu-a"
    training = place.watch.training
    partner = PartnerWatch("training", "8", now, lambda: None, clock=lambda: now.now)
    training.partner = partner
    for _ in range(1000):
        now.now += 10
        assert training.gone() is None
    training.server = place.server
    for _ in range(59):
        now.now += 10
        assert training.gone() is None
    now.now += 20
    event = training.gone()
    assert isinstance(event, TrainingGone)
    assert "was not heard of for 600 s; Slurm says RUNNING (PARTNER_PATIENCE)" in event.why


@pytest.mark.parametrize("state", [State.STARTING, State.SERVING, State.RECOVERING])
def test_neither_a_slow_directory_nor_a_silent_controller_holds_up_a_signal(place: Place, state: State) -> None:
    answer = threading.Event()
    asked: list[str] = []

    def hangs(what: str) -> bool:
        asked.append(what)
        return answer.wait(30)

    flag = Flag.of_this_host("8", "7", 0, "the trainer ended")
    place.directory.publish(place.directory.training_complete, flag)
    place.watch.training.reader = FlagReader(place.directory.training_complete, lambda _: hangs("the directory"), None)
    place.watch.training.partner = PartnerWatch("training", "8", place.scheduler, lambda: float(hangs("Slurm")))
    with place.watch.asking():
        until("both questions", lambda: len(asked) == 2, 10)
        place.notes.note(signal.SIGTERM)
        begin = time.monotonic()
        assert place.watch.look(state) == StopSignal(signal.SIGTERM)
        assert time.monotonic() - begin < 5
        answer.set()


def test_the_server_and_the_prebuild_read_no_code_where_a_local_run_was_launched(tmp_path: Path) -> None:
    """Where Python starts with ``-m``, the current folder comes first."""
    job = JobContext("7", CoordinationDir(tmp_path), Settings(), {}, FakeScheduler(), ROOT, own_dir=True)
    storage = PodmanStorage(tmp_path)
    with socket.socket() as listener:
        assert _own_spec(job, storage, listener, "key", 1.0).cwd == ROOT
    assert child_spec(Settings(dataset_path=tmp_path / "data.parquet"), storage, {}, ROOT).cwd == ROOT


def test_the_image_is_made_by_no_code_where_a_local_run_was_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tarfile.py").write_text(f"open({str(tmp_path / 'was_read')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(EnvironmentProblem):  # this host may have no busybox
        busybox_archive(tmp_path, ROOT, lambda: None)
    assert not (tmp_path / "was_read").exists()
