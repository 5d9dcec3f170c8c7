"""Runtime jobs whose trainings wait for GPUs on a real Slurm: which give their node back, and that the run goes on.

All runs wait at the same time, for GPUs that another job has; each test then reads what became of one of them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser, belongings, fresh_folder, leaving_nothing
from tests.runs import Run, launch, launch_argv, squeue, until
from tests.test_slurm_restarts import SAVES_AT_ONCE

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

TRAINS = 'TRAINING_COMMAND=echo "trained in $SKYRL_COORD_DIR"'
ON_A, ON_B = ("GPU_SBATCH_ARGS=--nodelist=gpu-a", "GPU_SBATCH_ARGS=--nodelist=gpu-b")
AT_ONCE, NEVER = "RUNTIME_IDLE_LIMIT=6", "RUNTIME_IDLE_LIMIT=0"
TIMES = ("SubmitTime", "StartTime")
SOON_TOO_LATE = ("TIME_LIMIT=00:02:00", "MIN_RUN_TIME=100")


@dataclass
class Story:
    """The runs by name, each with its first pair of jobs, and what was seen of them while they waited."""

    user: OrdinaryUser
    checkout: Path
    base: Path
    runs: dict[str, Run] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)

    def begin(self, name: str, *settings: str) -> None:
        words = ("CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", *settings)
        self.runs[name] = launch(self.user, self.checkout, self.base / name, *words)

    def occupy(self, node: str, minutes: int) -> str:
        """Take all GPUs of a node, from trainings too; returns the job's id."""
        options = ["-p", "urgent", f"--nodelist={node}", "--gres=gpu:8", "--mem=1G", f"--time={minutes}"]
        done = self.user.run(["sbatch", "--parsable", *options, "--wrap=sleep 3600", "--output=/dev/null"])
        assert done.returncode == 0, done.stderr
        job_id = done.stdout.strip()
        state = ["squeue", "-h", "-j", job_id, "-o", "%T"]
        until(f"all GPUs of {node}", lambda: self.user.run(state).stdout.strip() == "RUNNING", 30)
        return job_id

    def do(self, *argv: str) -> None:
        done = self.user.run(list(argv))
        assert done.returncode == 0, done.stderr

    def pairs(self, name: str) -> list[Run]:
        """All pairs of jobs of a run, in the order in which they were queued."""
        run = self.runs[name]
        records = [json.loads(path.read_text())["jobs"] for path in run.directory.glob("run*.json")]
        found = [{kind: job["id"] for kind, job in jobs.items()} for jobs in records]
        return [replace(run, jobs=jobs) for jobs in sorted(found, key=lambda jobs: int(jobs["runtime"]))]

    def given_back(self, name: str, seconds: float = 150) -> Run:
        """The second pair, once the first runtime job is over."""
        self.runs[name].wait_over(seconds=seconds)
        return self.pairs(name)[1]

    def hurry(self, name: str) -> None:
        """Let the last pair begin now, as its user can where the GPUs have come before Slurm expected them."""
        runtime = self.pairs(name)[-1].jobs["runtime"]
        if "BeginTime" in reason(self.user, runtime):
            self.do("scontrol", "update", f"JobId={runtime}", "StartTime=now")

    def trained(self, name: str, seconds: float = 90) -> Run:
        """The pair that trained, once it is over."""
        run = self.runs[name]
        until(f"{name} to train", lambda: run.completion.get("ended") == "completed", seconds)
        trained = next(pair for pair in self.pairs(name) if pair.jobs["training"] == run.completion["job_id"])
        trained.wait_over(seconds=30)
        return trained


def set_state(partition: str, state: str) -> None:
    """With DRAIN Slurm takes no further job for a partition, and starts those that it has."""
    words = ["scontrol", "update", f"PartitionName={partition}", f"State={state}"]
    subprocess.run(words, env={**os.environ, **test_cluster.environment()}, check=True)


def tell(story: Story) -> None:
    """Everything that happens to the runs."""
    story.begin("attempt 2", AT_ONCE, "RESTARTS=1", "RESTART_LEAD=40", ON_A, SAVES_AT_ONCE)
    story.runs["attempt 2"].wait_for_text("training", "trainer started", 90)
    on_a, on_b = story.occupy("gpu-a", 50), story.occupy("gpu-b", 9)
    story.begin("refused", AT_ONCE, ON_B, TRAINS, "GPU_PARTITION=urgent")
    set_state("urgent", "DRAIN")
    story.begin("given back", AT_ONCE, ON_B, TRAINS)
    story.begin("attempt 1", AT_ONCE, "RESTARTS=1", ON_B, TRAINS)
    story.begin("too late", NEVER, *SOON_TOO_LATE, ON_B, TRAINS)
    story.begin("given back before it is too late", "RUNTIME_IDLE_LIMIT=3600", *SOON_TOO_LATE, ON_B, TRAINS)
    words = launch_argv(story.checkout, f"SKYRL_JOBS_BASE={story.base}", ON_A, TRAINS, options=("--check",))
    story.seen["what the checks say"] = story.user.run(words).stdout
    second = story.given_back("given back before it is too late")  # first: soon it is given back in its turn
    story.seen["in the queue again"] = " ".join(second.state(kind) for kind in second.jobs)
    story.do("scancel", *second.jobs.values())
    story.given_back("given back")
    node = f"skyrl-{story.user.uid}-{story.runs['given back'].jobs['runtime']}"
    story.seen["left by the first runtime job"] = " ".join(
        str(path) for path in belongings(story.user).paths if path.name == node
    )
    story.given_back("attempt 1")
    story.runs["too late"].wait_over(seconds=150)
    story.runs["refused"].wait_for_text("runtime", "keeps its node", 60)
    story.seen["still serving"] = story.runs["refused"].state("runtime")
    story.do("scancel", on_b)
    for name in ("given back", "attempt 1"):
        story.hurry(name)
    for name in ("given back", "attempt 1", "refused"):
        story.trained(name)
    until("the third pair", lambda: len(story.pairs("attempt 2")) == 3, 90)
    story.pairs("attempt 2")[1].wait_over(seconds=30)
    third = story.pairs("attempt 2")[2].jobs["runtime"]
    until("its release", lambda: "BeginTime" in reason(story.user, third), 15)
    story.seen["the third runtime job"] = story.user.run(["scontrol", "show", "job", third]).stdout
    story.do("scancel", on_a)
    story.hurry("attempt 2")
    story.trained("attempt 2")


def reason(user: OrdinaryUser, job_id: str) -> str:
    return squeue(user, "-j", job_id, "-o", "%r")


@pytest.fixture(scope="module")
def told(user: OrdinaryUser, checkout: Path) -> Iterator[Story]:
    with leaving_nothing(user) as check:
        story = Story(user, checkout, fresh_folder(user, "idle"))
        try:
            tell(story)
            check()
            yield story
        finally:
            set_state("urgent", "UP")


def was_given_back(story: Story, first: Run, second: Run, why: str) -> None:
    """The end of a pair in whose place another was queued."""
    assert first.directory == second.directory
    assert first.exit_code("runtime") == "0"
    assert first.state("runtime") == "COMPLETED"
    assert first.state("training") == "CANCELLED"
    assert "trained" not in first.log("training")
    log = first.log("runtime")
    assert re.search(r"has waited \d+ s for GPUs \(PENDING, .+\), and", log), log
    assert why in log
    assert f"the run is queued again as the jobs {second.jobs['runtime']}, {second.jobs['training']}" in log
    assert "[ERROR]" not in first.log("runtime", "err")


def test_the_node_is_given_back_and_the_run_trains_in_a_later_pair(told: Story) -> None:
    first, second, *_ = told.pairs("given back")
    was_given_back(told, first, second, "RUNTIME_IDLE_LIMIT=6 s allows no more")
    assert told.seen["left by the first runtime job"] == ""
    last = told.trained("given back")
    assert last.jobs != first.jobs
    assert f"trained in {last.directory}" in last.log("training")
    assert {last.exit_code(kind) for kind in last.jobs} == {"0"}
    assert last.completion["runtime_job_id"] == last.jobs["runtime"]
    assert not (last.directory / "runtime_failed.flag").exists()


def test_every_pair_before_the_last_was_given_back_like_the_first(told: Story) -> None:
    pairs = told.pairs("given back")
    for first, second in itertools.pairwise(pairs):
        was_given_back(told, first, second, "RUNTIME_IDLE_LIMIT")


def test_an_attempt_that_is_queued_again_is_the_same_attempt(told: Story) -> None:
    first, second, *_ = told.pairs("attempt 1")
    was_given_back(told, first, second, "RUNTIME_IDLE_LIMIT")
    last = told.trained("attempt 1")
    record = json.loads(last.text("attempt_1.json"))
    assert record["jobs"] == last.jobs
    assert "attempt 1 of at most 2" in last.log("training")
    following = replace(last, jobs=record["successor"])
    assert {following.state(kind) for kind in following.jobs} == {"CANCELLED"}
    assert not last.text("attempt_2.json")


def test_a_restart_that_waits_for_gpus_is_queued_again_too(told: Story) -> None:
    first, second, third = told.pairs("attempt 2")
    assert first.state("training") == "PREEMPTED"
    was_given_back(told, second, third, "RUNTIME_IDLE_LIMIT")
    for pair in (second, third):
        assert f"attempt 2: the training job {first.jobs['training']} was interrupted" in pair.log("runtime")
    assert json.loads(third.text("attempt_2.json"))["jobs"] == third.jobs
    assert "trainer started at 1" in third.log("training"), "from what the first attempt saved"
    assert {third.exit_code(kind) for kind in third.jobs} == {"0"}


def test_it_comes_back_when_slurm_expects_the_gpus(told: Story) -> None:
    shown = told.seen["the third runtime job"]
    assert "JobState=PENDING Reason=BeginTime" in shown
    submitted, begins = (datetime.fromisoformat(re.findall(rf"{word}=(\S+)", shown)[0]) for word in TIMES)
    assert 2300 < (begins - submitted).total_seconds() <= 2400, "in fifty minutes, less ten"


def test_the_checks_say_how_long_the_runtime_job_would_wait(told: Story) -> None:
    said = told.seen["what the checks say"]
    assert re.search(r"the training job would start [0-9hmin ]+ after the runtime job, which holds 8 CPUs", said), said
    assert "more than half of its TIME_LIMIT=00:20:00" in said
    assert "RUNTIME_IDLE_LIMIT=600 has it give its node back" in said


def test_where_slurm_takes_no_job_the_runtime_goes_on(told: Story) -> None:
    run = told.runs["refused"]
    assert told.seen["still serving"] == "RUNNING"
    assert told.pairs("refused") == [run]
    said = run.log("runtime", "err")
    assert "this job keeps its node: Slurm did not take the job" in said
    assert "Required partition not available" in said, said
    assert said.count("keeps its node") == 1
    assert f"trained in {run.directory}" in run.log("training")
    assert {run.exit_code(kind) for kind in run.jobs} == {"0"}


def test_a_run_that_can_no_longer_begin_ends(told: Story) -> None:
    run = told.runs["too late"]
    assert told.pairs("too late") == [run]
    assert run.exit_code("runtime") == "75"
    assert run.state("training") == "CANCELLED"
    assert "less than MIN_RUN_TIME=100 s: the training could not begin any more" in run.log("runtime", "err")
    assert f"cancelled the pending training job {run.jobs['training']}" in run.log("runtime", "err")
    assert "MIN_RUN_TIME" in json.loads(run.text("runtime_failed.flag"))["reason"]


def test_with_a_limit_it_is_queued_again_with_its_whole_time(told: Story) -> None:
    first, second, *_ = told.pairs("given back before it is too late")
    was_given_back(told, first, second, "less than MIN_RUN_TIME=100 s")
    assert "PENDING" in told.seen["in the queue again"]
