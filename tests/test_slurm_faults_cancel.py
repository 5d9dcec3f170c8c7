"""``launch.py cancel`` on a real Slurm: every kind of run, in every state, within 15 s."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests import faults
from tests.conftest import NothingLeft, OrdinaryUser
from tests.faults import within
from tests.local_runs import Place
from tests.runs import SMALL, body_pid, launch, until
from tests.test_slurm_restarts import SAVES_AT_ONCE

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

NO_GPU = "GPUS_PER_NODE=0"
TRAIN_LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 300"
DEAF = "TRAINING_COMMAND=trap '' TERM; echo trainer started; while :; do sleep 1; done"
LATER = ("CPU_SBATCH_ARGS=--begin=now+3600", NO_GPU)

Cancel = Callable[..., CompletedProcess[str]]


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


@pytest.fixture
def cancel(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> Cancel:
    """``launch.py cancel`` as a person says it."""

    def said(*words: object, cwd: Path | None = None) -> CompletedProcess[str]:
        argv = [str(checkout / "slurm" / "launch.py"), "cancel", *map(str, words)]
        return user.run(argv, {"SKYRL_JOBS_BASE": str(jobs_base)}, cwd)

    return said


@pytest.fixture
def here(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> Iterator[Place]:
    """Where local runs are started."""
    with Place(checkout, jobs_base / "local", user, user.environment).lent() as place:
        yield place


@contextlib.contextmanager
def kept_stopped(*pids: int) -> Iterator[None]:
    """Processes do nothing for the length of the block: scancel lets stopped ones go on, and is overruled."""
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.01):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        time.sleep(0.1)
        yield
    finally:
        over.set()
        thread.join()


def told(done: CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """What ``cancel --json`` says of each job, by its id."""
    return {job["id"]: job for run in json.loads(done.stdout)["runs"] for job in run["jobs"]}


def test_running_runs_of_every_kind(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, cancel: Cancel, here: Place
) -> None:
    restarts = launch(user, checkout, jobs_base, SAVES_AT_ONCE, NO_GPU, "RESTARTS=2", "RESTART_LEAD=40")
    het = launch(user, checkout, jobs_base, TRAIN_LONG, NO_GPU, "PAIRING=het")
    deaf = launch(user, checkout, jobs_base, DEAF, NO_GPU)
    waiting = launch(user, checkout, jobs_base, TRAIN_LONG, NO_GPU, "GPU_SBATCH_ARGS=--begin=now+3600")
    here.base.mkdir()
    os.chown(here.base, user.uid, user.gid)
    local = here.start(TRAIN_LONG)
    for run in (restarts, het, deaf):
        run.wait_for_text("training", "trainer started", 60)
    waiting.wait_for_text("runtime", "API server ready", 60)
    local.wait_for("training | trainer started")
    following = restarts.queued_attempt()
    starting = launch(user, checkout, jobs_base, TRAIN_LONG, NO_GPU)
    until("its start", lambda: starting.state("training") == "RUNNING", 30)
    begin = time.monotonic()
    by_id = (het.jobs["runtime"], deaf.jobs["runtime"], starting.jobs["training"], waiting.jobs["training"])
    done = cancel("--json", restarts.directory, *by_id, local.directory)
    within(faults.CANCELLED, time.monotonic() - begin)
    assert done.returncode == 0, done.stderr
    jobs = told(done)
    runs = (restarts, following, het, deaf, starting, waiting)
    ids = {job for run in runs for job in run.jobs.values()}
    assert jobs.keys() > ids
    assert all(job["ended"] for job in jobs.values())
    assert all(run.is_over(kind) for run in runs for kind in run.jobs)
    assert local.wait(10) == 143
    assert all(jobs[job_id]["done"] == ["withdraw"] for job_id in following.jobs.values())
    assert all("cancel" not in job["done"] for job in jobs.values()), "their bodies were told, and ended them"
    for run in (restarts, het, deaf):
        assert faults.CANCELLED.reads in run.completion["reason"], run.completion
        recorded = json.loads(run.text("run.json"))["jobs"]
        assert all("SIGTERM" in recorded[kind]["ended"]["reason"] for kind in run.jobs), recorded
    assert [jobs[waiting.jobs[kind]]["done"] for kind in ("runtime", "training")] == [["tell"], ["withdraw"]]
    assert waiting.completion["reason"]
    assert not following.log("training") + waiting.log("training")
    again = cancel("latest", restarts.directory.name)
    assert again.returncode == 0
    assert again.stdout.count("had ended") == 6, again.stdout


def test_pending_runs(user: OrdinaryUser, checkout: Path, jobs_base: Path, cancel: Cancel) -> None:
    pair = launch(user, checkout, jobs_base, TRAIN_LONG, *LATER)
    het = launch(user, checkout, jobs_base, TRAIN_LONG, NO_GPU, "PAIRING=het", "GPU_SBATCH_ARGS=--begin=now+3600")
    words = [word for setting in SMALL for word in ("--set", setting)]
    script = str(checkout / "slurm" / "jobs" / "runtime_server.py")
    direct = user.run(
        ["sbatch", "--parsable", "--begin=now+3600", "-J", "skyrl-runtime", script, *words], cwd=jobs_base
    )
    foreign = user.run(["sbatch", "--parsable", "--begin=now+3600", "--wrap=true"], cwd=jobs_base).stdout.strip()
    begin = time.monotonic()
    done = cancel(pair.jobs["training"], het.directory, direct.stdout.strip(), "--json")
    within(faults.CANCELLED_PENDING, time.monotonic() - begin)
    assert done.returncode == 0, done.stderr
    jobs = told(done)
    assert jobs.keys() == {*pair.jobs.values(), *het.jobs.values(), direct.stdout.strip()}
    assert all(job["done"] == ["withdraw"] and job["ended"] for job in jobs.values()), jobs
    for run in (pair, het):
        assert all(run.state(kind) == "CANCELLED" for kind in run.jobs)
        assert faults.CANCELLED_PENDING.reads in run.completion["reason"]
        recorded = json.loads(run.text("run.json"))["jobs"]
        assert all(faults.CANCELLED_PENDING.reads in recorded[kind]["ended"]["reason"] for kind in run.jobs)
        assert not run.log("training")
    refused = cancel(foreign, "20200101_000000_1", pair.directory)
    assert refused.returncode == 2
    assert f"there is no run with a job {foreign}; the newest" in refused.stderr
    assert "there is no run '20200101_000000_1'" in refused.stderr
    assert pair.directory.name in refused.stderr
    assert "nothing was cancelled" in refused.stderr
    assert user.run(["scancel", foreign]).returncode == 0


def test_bodies_that_hang_are_killed(user: OrdinaryUser, checkout: Path, jobs_base: Path, cancel: Cancel) -> None:
    run = launch(user, checkout, jobs_base, TRAIN_LONG, NO_GPU)
    run.wait_for_text("training", "trainer started", 60)
    with kept_stopped(*(body_pid(run, kind) for kind in run.jobs)):
        begin = time.monotonic()
        done = cancel(run.directory)
    within(faults.CANCELLED_HUNG, time.monotonic() - begin)
    assert done.returncode == 0, done.stdout
    told = rf"told to end, {faults.CANCELLED_HUNG.reads}(, cancelled)?; ended after"
    assert len(re.findall(told, done.stdout)) == 2, done.stdout  # Slurm may take 2 s to see that a body is gone
    assert "killed by launch.py cancel" in run.completion["reason"]
    recorded = json.loads(run.text("run.json"))["jobs"]
    assert all("killed by launch.py cancel" in recorded[kind]["ended"]["reason"] for kind in run.jobs), recorded
    assert all(run.is_over(kind) for kind in run.jobs)


def test_a_controller_that_does_not_answer(user: OrdinaryUser, checkout: Path, jobs_base: Path, cancel: Cancel) -> None:
    run = launch(user, checkout, jobs_base, TRAIN_LONG, *LATER)
    with test_cluster.silent_controller():
        begin = time.monotonic()
        done = cancel("latest")
        within(faults.CANCELLED_UNHEARD, time.monotonic() - begin)
    assert done.returncode == 75
    assert done.stdout.count(faults.CANCELLED_UNHEARD.reads) == 2, done.stdout
    assert "not ended within 15 s" in done.stderr
    assert cancel("latest").returncode == 0
    assert all(run.is_over(kind) for kind in run.jobs)
