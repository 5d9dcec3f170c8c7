"""Trainings that are interrupted on a real Slurm, as an ordinary user: which go on in another pair of jobs, and how.

All runs share one cluster and go on at the same time, since Slurm's shortest time limits are minutes; each test then
reads what became of one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser, fresh_folder, leaving_nothing
from tests.runs import Run, launch, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

# Counts, saves the count on SIGUSR1, and has done its work two seconds after it went on from a saved one.
COUNTS = """TRAINING_COMMAND=file="$CHECKPOINT_DIR/count"; n=$(cat "$file" 2>/dev/null || echo 0); began=$n
save() { echo "$n" > "$file.part" && mv "$file.part" "$file"; }
echo "trainer started at $n"
tell USR1
[ "$began" != 0 ] || at_start
while :; do
    sleep 0.5 & wait $!
    n=$((n + 1))
    [ "$began" = 0 ] || [ $((n - began)) -lt 4 ] || { save; echo "trainer ends at $n"; exit 0; }
done"""
ON_TIME = COUNTS.replace("tell", "trap save").replace("at_start", ":")
SAVES_AT_ONCE = COUNTS.replace("tell", "trap ''").replace("at_start", "{ n=1; save; }")
NEVER_SAVES = COUNTS.replace("tell", "trap ''").replace("at_start", ":")
FAILS = "TRAINING_COMMAND=touch $CHECKPOINT_DIR/saved; echo trainer started at 0; sleep 2; exit 7"

NO_GPU = "GPUS_PER_NODE=0"
ON_A, ON_B = ("GPU_SBATCH_ARGS=--nodelist=gpu-a", "GPU_SBATCH_ARGS=--nodelist=gpu-b")
# In the partition whose jobs go first, so that nobody takes their node away.
TWO_MINUTES = ("TIME_LIMIT=00:02:00", "GPU_PARTITION=urgent", NO_GPU)
LATE = f"{ON_A} --begin=now+6"  # than its runtime job, whose limit then comes first


SAVES_LATER = {"limit", "preempted too early", "failed"}


@dataclass
class Story:
    """The runs by name, and what was seen of them while they went on."""

    user: OrdinaryUser
    checkout: Path
    base: Path
    runs: dict[str, Run] = field(default_factory=dict)
    nexts: dict[str, Run] = field(default_factory=dict)

    def begin(self, name: str, *settings: str) -> None:
        words = ("RESTARTS=2", "RESTART_LEAD=40", "CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", *settings)
        self.runs[name] = launch(self.user, self.checkout, self.base / name, *words)

    def started(self, *names: str) -> None:
        """Wait until the trainers have started and what they save at once is there; note who follows."""
        for name in names:
            run = self.runs[name]
            run.wait_for_text("training", "trainer started", 90)
            self.nexts[name] = run.queued_attempt()
            if name not in SAVES_LATER:
                until(f"what {name} saves", (run.directory / "checkpoints" / "count").exists, 60)

    def attempt(self, run: Run, number: int) -> dict[str, Any]:
        return dict(json.loads(run.text(f"attempt_{number}.json") or "{}"))

    def end(self, name: str, seconds: float) -> None:
        """Wait until both pairs of a run are over."""
        self.runs[name].wait_over(seconds=seconds)
        self.nexts[name].wait_over(seconds=seconds)

    def scancel(self, job_id: str) -> None:
        assert self.user.run(["scancel", job_id]).returncode == 0

    def preempt(self, node: str) -> None:
        """Run a job that needs all GPUs of a node, in the partition whose jobs go first."""
        options = [
            "-p",
            "urgent",
            f"--nodelist={node}",
            "--gres=gpu:8",
            "--mem=1G",
            "-W",
            "--wrap=sleep 1",
            "--output=/dev/null",
        ]
        done = self.user.run(["sbatch", *options])
        assert done.returncode == 0, done.stderr


def tell(story: Story) -> None:
    """Everything that happens to the runs; the slow ones begin first."""
    story.begin("limit", *TWO_MINUTES, LATE, ON_TIME)
    story.begin("killed at the limit", *TWO_MINUTES, ON_A, SAVES_AT_ONCE)
    story.started("limit", "killed at the limit")
    story.begin("preempted", ON_A, SAVES_AT_ONCE)
    story.begin("preempted too early", ON_A, NEVER_SAVES)
    story.begin("lost", ON_B, SAVES_AT_ONCE)
    story.started("preempted", "preempted too early", "lost")
    story.preempt("gpu-a")
    test_cluster.power_off("gpu-b")
    story.end("preempted", 60)
    story.end("preempted too early", 60)
    test_cluster.power_on("gpu-b")
    for name in ("cancelled", "cancelled by its runtime", "ended by hand"):
        story.begin(name, NO_GPU, SAVES_AT_ONCE)
    story.begin("failed", NO_GPU, FAILS)
    story.started("cancelled", "cancelled by its runtime", "ended by hand", "failed")
    story.scancel(story.runs["cancelled"].jobs["training"])
    story.scancel(story.runs["cancelled by its runtime"].jobs["runtime"])
    flag = story.runs["ended by hand"].directory / "training_complete.flag"
    assert story.user.run(["touch", str(flag)]).returncode == 0
    for name in story.runs:
        story.end(name, 150)


@pytest.fixture(scope="module")
def told(user: OrdinaryUser, checkout: Path) -> Iterator[Story]:
    with leaving_nothing(user) as check:
        story = Story(user, checkout, fresh_folder(user, "restarts"))
        try:
            tell(story)
            check()
            yield story
        finally:
            test_cluster.power_on("gpu-b")


def went_on(story: Story, name: str) -> tuple[Run, Run]:
    """Both attempts of a run that went on from a count above 0, finished its work, and was over then."""
    first, second = story.runs[name], story.nexts[name]
    assert first.directory == second.directory
    assert second.completion["job_id"] == second.jobs["training"], second.completion
    assert second.completion["exit_code"] == 0
    assert second.completion["ended"] == "completed"
    started, ends = (re.search(rf"trainer {word} at (\d+)", second.log("training")) for word in ("started", "ends"))
    assert started and ends, second.log("training")
    assert int(ends[1]) == int(started[1]) + 4 > 4
    assert {second.exit_code(kind) for kind in second.jobs} == {"0"}
    third = first.next_attempt(2)
    assert {third.state(kind) for kind in third.jobs} == {"CANCELLED"}, "nothing is left to be done"
    return first, second


def ended_there(story: Story, name: str) -> Run:
    """A run whose next pair was taken out of the queue."""
    second = story.nexts[name]
    assert {second.state(kind) for kind in second.jobs} == {"CANCELLED"}
    assert not story.attempt(second, 2)
    return story.runs[name]


def test_a_chain_of_two_jobs_across_a_time_limit(told: Story) -> None:
    first, second = went_on(told, "limit")
    assert first.exit_code("training") == "75"
    assert first.exit_code("runtime") == "0"
    log = first.log("training")
    assert re.search(r"this training may go on for 1?\d\d s, until .* the time limit of the runtime job", log), log
    assert "the time limit comes in" in log
    assert "the trainer has saved" in log
    assert f"it goes on in the jobs {', '.join(second.jobs.values())}" in log
    assert first.state("training") == "FAILED", "stopped before Slurm did it"
    assert "was interrupted (stopped at its checkpoint" in second.log("runtime")


def test_a_trainer_that_is_killed_at_the_limit_goes_on_from_what_it_saved(told: Story) -> None:
    first, second = went_on(told, "killed at the limit")
    assert "TIMEOUT" in {first.state(kind) for kind in first.jobs}
    assert "going on from 1 file" in second.log("runtime")


def test_a_preempted_training_goes_on(told: Story) -> None:
    first, second = went_on(told, "preempted")
    assert first.state("training") == "PREEMPTED"
    assert "ended by SIGTERM (preemption)" in first.log("training")
    assert second.node("training") == "gpu-a"


def test_a_training_whose_node_is_lost_goes_on(told: Story) -> None:
    first, second = went_on(told, "lost")
    assert first.state("training") == "NODE_FAIL"
    assert "it left no completion flag, and Slurm says: NODE_FAIL" in second.log("runtime")


def test_an_attempt_without_a_new_checkpoint_ends_the_chain(told: Story) -> None:
    second = told.nexts["preempted too early"]
    assert told.runs["preempted too early"].state("training") == "PREEMPTED"
    assert second.exit_code("runtime") == "76"
    assert "attempt 2 does not begin" in second.log("runtime", "err")
    assert "saved no checkpoint at all; not trying again" in second.log("runtime", "err")
    assert "trainer started" not in second.log("training")
    assert second.state("training") in {"CANCELLED", "FAILED"}
    assert second.completion["job_id"] == told.runs["preempted too early"].jobs["training"]


def test_a_cancelled_training_takes_the_next_pair_with_it(told: Story) -> None:
    run = ended_there(told, "cancelled")
    assert run.completion["ended"] == "cancelled"
    assert "(scancel)" in run.completion["reason"]


def test_a_cancelled_runtime_does_too(told: Story) -> None:
    run = ended_there(told, "cancelled by its runtime")
    assert run.completion["ended"] == "cancelled"
    assert run.completion["exit_code"] == 69


def test_a_completion_flag_made_by_hand_does_too(told: Story) -> None:
    run = ended_there(told, "ended by hand")
    assert run.completion["ended"] == "cancelled"


def test_an_error_of_the_trainers_own_is_not_tried_again(told: Story) -> None:
    run = ended_there(told, "failed")
    assert run.completion["ended"] == "failed"
    assert run.exit_code("training") == "7"
