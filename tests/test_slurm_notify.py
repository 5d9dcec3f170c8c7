"""NOTIFY on a real Slurm with a real receiver: one message for each end of a run, and Slurm's mail for the same job.

All runs share one cluster and go on at the same time, since Slurm's shortest time limits are minutes; each test then
reads what was received about one of them.
"""

from __future__ import annotations

import os
import secrets
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser, fresh_folder, leaving_nothing
from tests.receiver import Receiver, receiver
from tests.runs import Run, body_pid, launch_argv, parse_report, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.verbs]

MAIL = "researcher@lab.example"
LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 900"
# Saves a count when the time limit is near, and has done its work two seconds after it went on from it.
COUNTS = """TRAINING_COMMAND=file="$CHECKPOINT_DIR/count"; trap 'echo 1 > "$file.part"; mv "$file.part" "$file"' USR1
echo trainer started
if [ -e "$file" ]; then echo "step 2/2"; exit 0; fi
while :; do sleep 0.5 & wait $!; done"""
NEVER_SAVES = "TRAINING_COMMAND=trap '' USR1; echo trainer started; while :; do sleep 0.5; done"
SMALL = ("CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", "GPUS_PER_NODE=0")
TWO_MINUTES = ("RESTARTS=1", "RESTART_LEAD=40", "TIME_LIMIT=00:02:00", "GPU_PARTITION=urgent")
LATER = "GPU_SBATCH_ARGS=--begin=now+600"


@dataclass
class Story:
    """The runs by name, with what was received about them."""

    user: OrdinaryUser
    checkout: Path
    base: Path
    hook: Receiver
    slow_hook: Receiver
    token: str = field(default_factory=lambda: secrets.token_hex(12))
    runs: dict[str, Run] = field(default_factory=dict)
    slow_answered: int = -1

    def begin(self, name: str, *settings: str, options: tuple[str, ...] = (), slow: bool = False) -> None:
        url = f"{(self.slow_hook if slow else self.hook).url}/{self.token}"
        env = {"NOTIFY": f"{url} {MAIL}"}
        base = f"SKYRL_JOBS_BASE={self.base / name}"
        argv = launch_argv(self.checkout, base, *SMALL, *settings, options=options)
        done = self.user.run(argv, env)
        assert done.returncode == 0, done.stderr
        assert self.token not in done.stdout + done.stderr
        self.runs[name] = parse_report(self.user, done.stdout)

    def messages(self, name: str) -> list[dict[str, Any]]:
        return self.hook.of(self.runs[name].directory.name)

    def mails(self, job_id: str) -> list[str]:
        return [line for line in mail_lines() if f"Job_id={job_id} " in line]

    def signal(self, name: str, kind: str, number: int) -> None:
        os.kill(body_pid(self.runs[name], kind), number)

    def scancel(self, name: str, kind: str) -> None:
        assert self.user.run(["scancel", self.runs[name].jobs[kind]]).returncode == 0


def mail_lines() -> list[str]:
    return test_cluster.MAILS.read_text().splitlines() if test_cluster.MAILS.exists() else []


def happen(story: Story) -> None:
    """Everything that happens to the runs."""
    story.begin("limit", COUNTS, *TWO_MINUTES)
    # Its limit is to come before its runtime's: Slurm looks every 30 s, and may end the two at different looks.
    story.begin("no progress", NEVER_SAVES, *TWO_MINUTES, "CPU_SBATCH_ARGS=--time=00:05:00")
    for name in ("limit", "no progress"):  # before its lead is reached, on a machine that is not yet busy
        story.runs[name].wait_for_text("training", "trainer started", 75)
    story.begin("completed", "TRAINING_COMMAND=echo step 3 of 5")
    story.begin("failed", "TRAINING_COMMAND=exit 7")
    story.begin("one heterogeneous job", "TRAINING_COMMAND=exit 5", "PAIRING=het")
    story.begin("slow", "TRAINING_COMMAND=exit 3", slow=True)
    for name in ("training killed", "runtime killed", "cancelled"):
        story.begin(name, LONG)
    story.begin("withdrawn", LONG, LATER)
    story.begin("runtime alone", LONG, options=("--runtime-only",))
    story.runs["slow"].wait_over("training", seconds=90)
    story.slow_answered = story.slow_hook.answered
    story.slow_hook.hangs.clear()
    for name in ("training killed", "runtime killed", "cancelled"):
        story.runs[name].wait_for_text("training", "trainer started", 90)
    for name in ("failed", "one heterogeneous job"):
        story.runs[name].wait_over(seconds=120)
    # One after the other: what is cancelled has a few seconds for its message.
    story.signal("training killed", "training", signal.SIGKILL)
    story.runs["training killed"].wait_over(seconds=120)
    story.signal("runtime killed", "runtime", signal.SIGKILL)
    story.runs["runtime killed"].wait_over(seconds=120)
    story.scancel("cancelled", "training")
    story.runs["cancelled"].wait_over(seconds=120)
    until("ready", lambda: story.runs["withdrawn"].text("runtime_ready.flag"), 60)
    story.scancel("withdrawn", "training")
    until("ready", lambda: story.runs["runtime alone"].text("runtime_ready.flag"), 60)
    flag = story.runs["runtime alone"].directory / "training_complete.flag"
    assert story.user.run(["touch", str(flag)]).returncode == 0
    for run in story.runs.values():
        run.wait_over(seconds=240)
    for name in ("limit", "no progress"):
        story.runs[f"{name} second"] = story.runs[name].next_attempt()
        story.runs[f"{name} second"].wait_over(seconds=180)


@pytest.fixture(scope="module")
def told(user: OrdinaryUser, checkout: Path) -> Iterator[Story]:
    with leaving_nothing(user) as check, receiver(test_cluster.LOGIN) as hook, receiver(test_cluster.LOGIN) as slow:
        slow.hangs.set()
        story = Story(user, checkout, fresh_folder(user, "notify"), hook, slow)
        happen(story)
        check()
        yield story


@pytest.mark.parametrize(
    ("name", "kind", "state", "exit_code", "reason"),
    [
        ("completed", "training", "completed", 0, "the trainer ended"),
        ("failed", "training", "failed", 7, "the trainer failed with exit code 7"),
        ("one heterogeneous job", "training", "failed", 5, "the trainer failed with exit code 5"),
        ("training killed", "training", "failed", None, "is gone"),
        ("runtime killed", "training", "interrupted", 69, "the runtime job"),
        ("cancelled", "training", "cancelled", 143, "scancel"),
        ("withdrawn", "training", "cancelled", None, "CANCELLED"),
        ("runtime alone", "runtime", "completed", 0, "set by hand"),
    ],
)
def test_one_message_for_each_end(
    told: Story, name: str, kind: str, state: str, exit_code: int | None, reason: str
) -> None:
    [message] = told.messages(name)
    run = told.runs[name]
    assert (message["state"], message["exit_code"]) == (state, exit_code)
    assert reason in message["reason"]
    assert message["job_id"] == run.jobs[kind]
    assert message["directory"] == str(run.directory)
    assert 0 <= message["elapsed"] < 600
    assert message["text"].startswith(f"skyrl run {run.directory.name} ")


def test_the_step_that_the_trainer_said(told: Story) -> None:
    [message] = told.messages("completed")
    assert (message["step"], message["steps"]) == (3, 5)


def test_a_chain_of_attempts_is_one_run(told: Story) -> None:
    """The first attempt ends at its time limit and is followed: no message; the second one completes."""
    first, second = told.runs["limit"], told.runs["limit second"]
    assert first.exit_code("training") == "75", first.log("training")
    [message] = told.messages("limit")
    assert (message["state"], message["job_id"]) == ("completed", second.jobs["training"])


def test_a_chain_that_does_not_go_on_says_so_once(told: Story) -> None:
    """By the second attempt, which does not begin: about the first one, which was interrupted."""
    first, second = told.runs["no progress"], told.runs["no progress second"]
    assert second.exit_code("runtime") == "76", second.log("runtime", "err")
    [message] = told.messages("no progress")
    assert (message["state"], message["job_id"]) == ("interrupted", first.jobs["training"])
    assert "the time limit" in message["reason"]


def test_a_receiver_that_hangs_holds_no_job(told: Story) -> None:
    """The job had ended before the receiver gave its answer, and with the trainer's code."""
    assert told.slow_answered == 0
    assert len(told.slow_hook.posts) == 1
    run = told.runs["slow"]
    assert run.exit_code("training") == "3"
    assert f"NOTIFY: the webhook at {test_cluster.LOGIN} was not told: no answer in time" in run.log("training", "err")


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("completed", "training", "Ended"),
        ("failed", "training", "Failed"),
        ("one heterogeneous job", "training", "Failed"),
        ("training killed", "training", "Failed"),
        ("cancelled", "training", "Ended"),
        ("withdrawn", "training", "Ended"),
        ("runtime alone", "runtime", "Ended"),
    ],
)
def test_slurm_sends_one_mail_about_the_same_job(told: Story, name: str, kind: str, words: str) -> None:
    run = told.runs[name]
    until(f"mail about {run.jobs[kind]} in {mail_lines()}", lambda: told.mails(run.jobs[kind]), 60)
    [mail] = told.mails(run.jobs[kind])
    subject, _, to = mail.partition(" | ")
    assert to == MAIL
    assert f"Name=skyrl-{'train' if kind == 'training' else 'runtime'} {words}" in subject
    others = [job_id for other, job_id in run.jobs.items() if other != kind]
    assert not any(told.mails(job_id) for job_id in others)


def test_of_a_chain_slurm_sends_a_mail_for_each_attempt(told: Story) -> None:
    """Which the documentation says."""
    for name in ("limit", "limit second"):
        job_id = told.runs[name].jobs["training"]
        until(f"mail about {job_id}", lambda job_id=job_id: told.mails(job_id), 60)  # type: ignore[misc]
        assert len(told.mails(job_id)) == 1


def test_the_webhook_stands_in_no_file_but_that_of_the_secrets(told: Story) -> None:
    token = told.token.encode()
    for run in told.runs.values():
        files = [path for path in run.directory.rglob("*") if path.is_file() and not path.is_symlink()]
        holding = {path.name for path in files if token in path.read_bytes()}
        assert holding == {"secrets.json"}, run.directory
        assert stat.S_IMODE((run.directory / "secrets.json").stat().st_mode) == 0o600
        for job_id in run.jobs.values():
            assert told.token not in told.user.run(["scontrol", "show", "job", "-dd", job_id]).stdout
    for log in test_cluster.LOGS.rglob("*"):
        assert not log.is_file() or token not in log.read_bytes(), log
