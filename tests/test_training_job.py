"""How a trainer's own end counts where something else went at the same moment: the trainers are real processes."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slurm.lib.coordination import CoordinationDir, Counter, Flag
from slurm.lib.errors import PartnerGone
from slurm.lib.job_context import JobContext
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.ray_cluster import RayCluster, Step
from slurm.lib.restarts import Ended
from slurm.lib.runtime_client import Heartbeat, RuntimeClient
from slurm.lib.runtime_step import RuntimeStep
from slurm.lib.scheduler import JobFacts
from slurm.lib.settings import Settings
from slurm.lib.signals import Interrupted, SignalNotes
from slurm.lib.training_job import Endpoint, Outcome, TrainingSession, attempt, start_canary
from slurm_runtime.heartbeats import Heartbeats
from tests.receiver import receiver
from tests.runs import until
from tests.test_partner import FakeScheduler

ROOT = Path(__file__).resolve().parent.parent
NOWHERE = "http://127.0.0.1:1"  # refuses every connection


class Ending(FakeScheduler):
    """A Slurm that takes this job away for another one, or not."""

    preempted = True

    def facts(self, job_id: str, timeout_s: float = 0.0) -> JobFacts:
        return JobFacts(preempted=self.preempted)


@pytest.fixture
def ending() -> Ending:
    return Ending()


@pytest.fixture
def session(tmp_path: Path, ending: Ending) -> TrainingSession:
    """A training job with another attempt behind it, whose server does not answer."""
    directory = CoordinationDir(tmp_path)
    directory.publish_url(NOWHERE)
    job = JobContext("8", directory, Settings(), {"SKYRL_RUNTIME_JOB_ID": "7"}, ending, ROOT, own_dir=True)
    made = TrainingSession(job, SignalNotes(), RuntimeStep())
    made.chain.successor = {"runtime": "9", "training": "10"}
    return made


def process(*argv: str) -> Child:
    return Child(ChildSpec(argv, {"PATH": os.defpath}, "a process"), stop_grace_s=0.0)


def outcome(session: TrainingSession, cluster: RayCluster | None = None, code: int = 1) -> Outcome:
    """What is said of a trainer that ends with this code."""
    with start_canary() as canary, process("sh", "-c", f"exit {code}") as child:
        child.process.wait()
        found = cluster or RayCluster()
        return session.supervise(child, lambda: None, canary, found, session.early_stop(child))


@contextmanager
def signalled(session: TrainingSession, after_s: float) -> Iterator[None]:
    """SIGTERM comes a moment after the trainer's end."""
    timer = threading.Timer(after_s, session.notes.note, (signal.SIGTERM, None))
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.parametrize(
    ("preempted", "expected"), [(True, Ended.INTERRUPTED), (False, Ended.CANCELLED)], ids=["preemption", "scancel"]
)
def test_a_signal_while_the_runtime_is_waited_for_says_why(
    session: TrainingSession, ending: Ending, preempted: bool, expected: Ended
) -> None:
    """The node of the runtime goes, the trainer fails, and then Slurm ends this job too."""
    ending.preempted = preempted
    with signalled(session, 1.0):
        said = outcome(session)
    word = "preemption" if preempted else "scancel"
    assert said == Outcome(1, f"ended by SIGTERM ({word}); the trainer failed with exit code 1", expected)


@pytest.mark.parametrize(("step", "code"), [(RuntimeStep(job_id="7"), 143), (RuntimeStep(), 69)], ids=["het", "pair"])
def test_a_signal_right_after_the_runtimes_own_word_is_the_reason_where_both_are_one_job(
    session: TrainingSession, ending: Ending, step: RuntimeStep, code: int
) -> None:
    """scancel of a heterogeneous job ends its parts one after the other; another job's end is this one's reason."""
    ending.preempted = False
    session.step = step
    gone = PartnerGone("the runtime job 7 failed: ended by SIGTERM (scancel)")
    with signalled(session, 0.3):
        said = session.failed_with(gone)
    assert said.exit_code == code
    assert said.reason.startswith("ended by signal SIGTERM before" if code == 143 else "the runtime job 7 failed")


def test_a_signal_beside_the_runtimes_own_word_says_both(session: TrainingSession) -> None:
    flag = Flag("7", "7", exit_code=143, reason="ended by SIGTERM", ended="cancelled")
    look = session._answers

    def answers() -> bool:
        session.job.directory.publish(session.job.directory.runtime_failed, flag)
        session.notes.note(signal.SIGTERM)
        return look()

    session._answers = answers  # type: ignore[method-assign]
    said = outcome(session)
    assert said.exit_code == 69
    assert said.reason.endswith("the runtime job 7 failed: ended by SIGTERM; meanwhile ended by preemption")
    assert said.ended is Ended.INTERRUPTED


def test_a_signal_soon_after_the_runtimes_end_is_the_reason_of_a_trainer_that_was_stopped(
    session: TrainingSession, ending: Ending
) -> None:
    """``scancel`` of both jobs reaches one after the other, and the flag of the first may be seen in between."""
    ending.preempted = False
    why = "the runtime job 7 failed: ended by SIGTERM"
    with start_canary() as canary, process("sleep", "60") as child, signalled(session, 0.5):
        said = session.supervise(child, lambda: why, canary, RayCluster(), session.early_stop(child))
    assert said == Outcome(69, f"{why}; meanwhile ended by scancel", Ended.CANCELLED)


@pytest.mark.parametrize("everybody", [True, False], ids=["the whole job is signalled", "nobody is"])
def test_a_trainer_that_ends_well_at_once_when_signalled_is_not_complete(
    session: TrainingSession, everybody: bool
) -> None:
    """Slurm signals one process after the other: the trainer's end may be seen before this job's own signal."""
    session.chain.successor = {}
    with start_canary() as canary, process("true") as child, signalled(session, 0.15):
        if everybody:
            canary.send(signal.SIGTERM)
            canary.wait(5)
        child.process.wait()
        said = session.supervise(child, lambda: None, canary, RayCluster(), session.early_stop(child))
    assert (said.ended is Ended.COMPLETED) is not everybody, said


def test_a_lost_node_is_named_also_beside_a_signal(session: TrainingSession, tmp_path: Path) -> None:

    def node_state(node: str) -> str:
        session.notes.note(signal.SIGTERM)
        return "down*"

    with process("true") as step:
        step.process.wait()
        said = outcome(session, RayCluster(steps=[Step("gpu-b", step, tmp_path / "log")], node_state=node_state))
    assert said.exit_code == 74
    assert said.reason.startswith("node gpu-b was lost")
    assert said.reason.endswith(
        "(Slurm's state of the node: down*); the trainer failed with exit code 1; meanwhile ended by preemption"
    )
    assert said.ended is Ended.INTERRUPTED


def test_what_is_left_of_kill_wait_counts_from_the_signal(
    session: TrainingSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.left_s() == math.inf
    session.kill_wait_s = 30.0
    session.notes.note(signal.SIGTERM)
    session.notes.note(signal.SIGTERM)
    now = session.notes.stopped_at
    assert now is not None
    monkeypatch.setattr("slurm.lib.training_job.time.monotonic", lambda: now + 20)
    assert session.left_s() == 8.0
    session.kill_wait_s = 0.0
    assert session.left_s() == 0.0


class Server(ThreadingHTTPServer):
    """The part of an API server that the training job itself asks; ``heartbeats`` is None for another's."""

    heartbeats: Heartbeats | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def _say(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_POST(self) -> None:
        known = self.server.heartbeats
        self._say(200, {"count": known.beat(self.path).count}) if known else self._say(404, "no such route")

    def do_GET(self) -> None:
        beat = self.server.heartbeats.get(self.path) if self.server.heartbeats else None
        here = beat or self.path == "/health"
        self._say(200, {"count": beat.count if beat else 0}) if here else self._say(404, "not heard of")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(session: TrainingSession) -> Iterator[Server]:
    """One that answers, in place of the session's."""
    with Server(("127.0.0.1", 0), Handler) as made:
        session.job.directory.publish_url(made.url)
        made.heartbeats = Heartbeats()
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.parametrize("beats_after", [0, 1, 2])
@pytest.mark.parametrize("before", [1, 3])
def test_a_trainer_that_fails_as_the_server_was_started_again_is_interrupted(
    session: TrainingSession, server: Server, beats_after: int, before: int
) -> None:
    """Its requests that were open had no answer; the server is there again before anybody asks."""
    heartbeat = Heartbeat(RuntimeClient(server.url, None), "training-8")
    session.server_restarted_s_ago = heartbeat.restarted_s_ago
    for _ in range(before):
        heartbeat._beat()
    assert outcome(session) == Outcome(1, "the trainer failed with exit code 1", Ended.FAILED)
    server.heartbeats = Heartbeats()
    for _ in range(beats_after):
        heartbeat._beat()
    found = outcome(session)
    assert (found.exit_code, found.ended) == (1, Ended.INTERRUPTED)
    expected = r"the trainer failed with exit code 1, \d s after the API server was started again"
    assert re.fullmatch(expected, found.reason)
    assert outcome(session, code=0) == Outcome(0, "the trainer ended", Ended.COMPLETED)
    session.chain.successor = {}
    assert outcome(session) == Outcome(1, "the trainer failed with exit code 1", Ended.FAILED)


def test_a_restart_is_felt_for_a_minute(session: TrainingSession, server: Server) -> None:
    ago = {59.6: Ended.INTERRUPTED, 60.4: Ended.FAILED}
    for seconds, expected in ago.items():
        session.server_restarted_s_ago = partial(float, seconds)
        assert outcome(session).ended is expected


def test_a_server_that_counts_no_beats_was_never_started_again(session: TrainingSession, server: Server) -> None:
    server.heartbeats = None
    with Heartbeat(RuntimeClient(server.url, None), "training-8") as heartbeat:
        assert heartbeat.restarted_s_ago() is None
        assert heartbeat.age_s() < 5
    server.shutdown()
    server.server_close()
    assert heartbeat.restarted_s_ago() is None, "silence is no restart"


@pytest.mark.parametrize("late", [False, True])
def test_a_runtime_that_beats_by_a_counter_is_answered_by_one(
    session: TrainingSession, server: Server, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Its counter may be seen late, or its first beat have failed; without an answer it would end the run in time."""
    monkeypatch.setattr("slurm.lib.training_job.PARTNER_LOOK_EVERY_S", 0.1)
    server.heartbeats = None
    directory = session.job.directory
    theirs, ours = Counter(directory.heartbeat("runtime", "7")), directory.heartbeat("training", "8")
    if not late:
        theirs.beat()
    client = RuntimeClient(server.url, None)
    endpoint = Endpoint(server.url, None, "7")
    with Heartbeat(client, "training-8") as heartbeat, session.partner_watch(endpoint, heartbeat) as gone:
        if late:
            time.sleep(0.5)
            assert not ours.exists(), "a server of ours is told by HTTP"
            theirs.beat()
        until("beats of the training", lambda: ours.exists() and int(ours.read_text()) > 2, 5)
        assert gone() is None


def test_without_a_signal_a_runtime_that_stays_away_interrupts(
    session: TrainingSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.lib.training_job.SERVER_BACK_S", 0.5)
    said = outcome(session)
    assert said == Outcome(69, "the trainer failed, and the runtime does not answer", Ended.INTERRUPTED)


def test_a_trainers_own_end_is_its_own(session: TrainingSession) -> None:
    session._answers = lambda: True  # type: ignore[method-assign]
    assert outcome(session, code=3) == Outcome(3, "the trainer failed with exit code 3", Ended.FAILED)
    assert outcome(session, code=0) == Outcome(0, "the trainer ended", Ended.COMPLETED)


# --- the last steps ---------------------------------------------------------------------------------------------------


def ends_noted(session: TrainingSession) -> dict[str, object]:
    """What the run's record says of this job's end."""
    jobs = json.loads(session.job.directory.run_record.read_text())["jobs"]
    ended = jobs["training"]["ended"]
    assert isinstance(ended, dict)
    return ended


def with_webhook(session: TrainingSession, url: str) -> None:
    session.chain.successor = {}
    session.job = replace(session.job, settings=Settings(notify=(url,)))
    jobs = {"training": {"id": "8"}, "runtime": {"id": "7"}}
    session.job.directory.run_record.write_text(json.dumps({"jobs": jobs}))


def test_a_completed_training_stays_one_where_no_thread_can_be_had(
    session: TrainingSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of processes nobody can be told, and the run's record says how it ended."""

    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with_webhook(session, NOWHERE)
    session.train = lambda: Outcome(0, "the trainer ended", Ended.COMPLETED)  # type: ignore[method-assign]
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert attempt(session) == 0
    assert ends_noted(session)["exit_code"] == 0
    assert json.loads(session.job.directory.training_complete.read_text())["exit_code"] == 0


def test_a_receiver_that_hangs_does_not_hold_a_job_that_was_told_to_stop(
    session: TrainingSession, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is killed 8 s after that, by ``launch.py cancel``: the message is under way still as the job ends."""

    def train() -> Outcome:
        session.kill_wait_s = 30.0
        session.notes.note(signal.SIGTERM)
        raise Interrupted(signal.SIGTERM)

    with receiver() as hook:
        hook.hangs.set()
        with_webhook(session, hook.url)
        session.train = train  # type: ignore[method-assign]
        assert attempt(session) == 128 + signal.SIGTERM
        assert "no answer in time; the job ends without it" in caplog.text
        assert ends_noted(session)["exit_code"] == 128 + signal.SIGTERM
