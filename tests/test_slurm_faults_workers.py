"""What becomes of a runtime's workers, and of its run, when something of either is killed: on a real Slurm."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests import faults
from tests.conftest import NothingLeft, OrdinaryUser
from tests.faults import released, within
from tests.runs import STARTS_SANDBOXES, Run, answers, body_pid, launch, squeue, until
from tests.test_slurm_faults_launch import Desk, killed_at
from tests.test_slurm_many_nodes import TWO_SLOTS, all_over, ask, sandboxes, tasks

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

ON_GO = '\nuntil [ -e "$SKYRL_COORD_DIR/go" ]; do sleep 0.1; done'
TRAINS = STARTS_SANDBOXES.replace("range(2)", "range(4)") + ON_GO
TRAINS_LONG = STARTS_SANDBOXES.replace("range(2)", "range(8)") + ON_GO
# Two nodes fit on each of the cluster's hosts: the runtime job and three workers run, one waits for a place.
FOUR_NODES = (*TWO_SLOTS, "RUNTIME_NODES=5", "RUNTIME_MIN_SLOTS=8", "GPUS_PER_NODE=0", TRAINS_LONG)


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


def arrays(run: Run) -> tuple[str, str]:
    jobs = json.loads(run.text("run.json"))["jobs"]
    return jobs["workers"]["id"], jobs["more_workers"]["id"]


def words_about(run: Run, made: list[dict[str, Any]]) -> list[str]:
    """What the head says of sandboxes that do not answer."""
    return [
        json.dumps(ask(run, "GET", f"/runtime/{sandbox['runtime_id']}")[1])
        for sandbox in made
        if not answers(sandbox["url"])
    ]


def of_worker(user: OrdinaryUser, worker: str) -> list[str]:
    """What is left of a worker: processes, and its storage."""
    storage = Path(f"/tmp/skyrl-{user.uid}-{worker}")
    found = [line for line in user.processes().values() if f"{storage}/" in line]
    return [*found, *([str(storage)] if storage.exists() else [])]


def lost(user: OrdinaryUser, run: Run, made: list[dict[str, Any]], worker: str, case: faults.Case, left: int) -> None:
    """Wait until a worker is lost with its two sandboxes, and that many are left, which are those of others."""
    begin = time.monotonic()
    until("the end of its sandboxes", lambda: sum(answers(one["url"]) for one in made) <= left, case.bound_s)
    until("its name", lambda: sum(worker in words for words in words_about(run, made)) >= 2, case.bound_s)
    until("that nothing of it is left", lambda: not of_worker(user, worker), case.bound_s)
    within(case, time.monotonic() - begin)
    assert not run.is_over("training")
    assert sum(answers(one["url"]) for one in made) == left


def kill_worker(run: Run, worker: str) -> None:
    number = squeue(run.user, "-j", worker, "-o", "%A").strip()
    os.kill(body_pid(Run(run.user, run.directory, {"worker": number}), "worker"), signal.SIGKILL)


def test_workers_and_then_the_runtime_job_are_killed(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, nothing_left: NothingLeft
) -> None:
    run = launch(user, checkout, jobs_base, *FOUR_NODES)
    made, (array, more) = sandboxes(run), arrays(run)
    assert user.run(["scontrol", "hold", more]).returncode == 0, (
        "as where no node gets free for hours: nobody starts it"
    )
    assert tasks(run)[f"{more}_4"] == "PENDING"
    kill_worker(run, f"{array}_2")
    lost(user, run, made, f"{array}_2", faults.WORKER_KILLED, 6)
    user.run(["scancel", f"{array}_3"])
    lost(user, run, made, f"{array}_3", faults.WORKER_CANCELLED, 4)

    os.kill(body_pid(run, "runtime"), signal.SIGKILL)
    begin = time.monotonic()
    until("the end of all", lambda: all_over(run), faults.HEAD_JOB_KILLED.bound_s)
    released(run, nothing_left, faults.HEAD_JOB_KILLED, since=begin, mute=("runtime",))


def test_the_body_of_an_allocation_is_killed(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, nothing_left: NothingLeft
) -> None:
    settings = ("RUNTIME_NODES=2", "RUNTIME_MODE=allocation", "GPUS_PER_NODE=0", TRAINS)
    run = launch(user, checkout, jobs_base, *TWO_SLOTS, *settings)
    sandboxes(run)
    os.kill(body_pid(run, "runtime"), signal.SIGKILL)
    released(run, nothing_left, faults.STEPS_JOB_KILLED, mute=("runtime",))


def test_the_training_ends_while_slurm_is_silent(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    run = launch(user, checkout, jobs_base, *TWO_SLOTS, "RUNTIME_NODES=2", "GPUS_PER_NODE=0", TRAINS)
    sandboxes(run)
    with test_cluster.silent_controller():
        (run.directory / "go").touch()
        bodies = ("runtime_worker.py", "runtime_server.py", "slurm_runtime", f"skyrl-{user.uid}-")

        def is_left() -> bool:
            return any(word in line for line in user.processes().values() for word in bodies)

        within(faults.WORKERS_UNLED, until("their end", lambda: not is_left(), faults.WORKERS_UNLED.bound_s))
    until("the end of all", lambda: all_over(run), 60)
    assert {run.exit_code(kind) for kind in run.jobs} == {"0"}


POINTS = ("sbatch 2 after", "sbatch 3 after", "scontrol 1 after", "scontrol 4 before")


def test_a_launcher_killed_between_its_calls_for_a_runtime_on_several_nodes(
    user: OrdinaryUser, checkout: Path, jobs_base: Path
) -> None:
    desk = Desk(user, checkout, jobs_base)
    settings = ("RUNTIME_NODES=3", "RUNTIME_MIN_SLOTS=9", "RUNTIME_DRAIN_LEAD=200")
    for point in POINTS:
        killed_at(desk, point, *settings)
        left = [job for job in desk.queue() if job.name.startswith("skyrl")]
        assert left, point
        assert not [job for job in left if job.can_start], (point, left)
    killed_at(desk, "scontrol 4 after", *settings)
    until("the end of the one that was killed after its commit", lambda: not desk.queue(), 60)
    (folder,) = desk.folders()
    assert json.loads((folder / "training_complete.flag").read_text())["exit_code"] == 0
    within(faults.KILLED_AT_A_CALL_MANY, 0.0)
