"""How a trainer's own end counts where something else went at the same moment: the trainers are real processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slurm.lib.coordination import CoordinationDir, Flag
from slurm.lib.job_context import JobContext
from slurm.lib.processes import Child, ChildSpec
from slurm.lib.ray_cluster import RayCluster, Step
from slurm.lib.restarts import Ended
from slurm.lib.runtime_step import RuntimeStep
from slurm.lib.scheduler import JobFacts
from slurm.lib.settings import Settings
from slurm.lib.signals import SignalNotes
from slurm.lib.training_job import Outcome, TrainingSession, start_canary
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
