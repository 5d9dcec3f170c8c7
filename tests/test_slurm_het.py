"""Runs as one heterogeneous job (PAIRING=het) on a real Slurm with real Podman, as an ordinary user."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from slurm.lib.observe.usage import read_usage
from tests import cluster as test_cluster
from tests.ray_environment import ray_python
from tests.runs import Run, User, launch, until
from tests.test_slurm_restarts import SAVES_AT_ONCE

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

HET = "PAIRING=het"
TRAIN_LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 300"
END_S = 20.0  # of both parts, KillWait (5 s) included


@pytest.fixture(autouse=True)
def clean(user: User, nothing_left: Callable[[], None]) -> None:
    """Every test here ends with nothing left on any node (the fixture checks at its end)."""


def training(user: User, checkout: Path, jobs_base: Path, *settings: str) -> Run:
    """A run whose trainer has started and goes on."""
    run = launch(user, checkout, jobs_base, HET, TRAIN_LONG, *settings)
    run.wait_for_text("training", "trainer started", 60)
    return run


def body_pid(run: Run, kind: str) -> int:
    """The pid of a body: slurmstepd's child. In its environment the runtime's has the component's id."""
    leader, runtime = (f"{name}={run.jobs[kind]}".encode() for name, kind in PLACES)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if leader in environment and (runtime in environment) == (kind == "runtime"):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    return int(entry.name)
    raise AssertionError(f"no body of the {kind}")


PLACES = (("SLURM_JOB_ID", "training"), ("SKYRL_JOB_ID", "runtime"))


def scancel(run: Run, kind: str) -> None:
    done = run.user.run(["scancel", run.jobs[kind]])
    assert done.returncode == 0, done.stderr


def test_both_parts_start_together_and_end_well(user: User, checkout: Path, jobs_base: Path) -> None:
    """The rewards come from real sandboxes; two steps are too few to learn (exit code 3)."""
    loop = '"$SKYRL_PYTHON" -m shell_rl.train --sandboxes 2 --steps 2 || [ $? = 3 ]'
    run = launch(user, checkout, jobs_base, HET, f"TRAINING_COMMAND=env > env.txt; {loop}")
    assert list(run.jobs) == ["training", "runtime"]
    assert run.directory.name.endswith(f"_{run.jobs['training']}")
    run.wait_over(seconds=120)
    assert run.completion["exit_code"] == 0, run.log("training")[-3000:]
    assert {run.exit_code(kind) for kind in run.jobs} == {"0"}
    assert {run.state(kind) for kind in run.jobs} == {"COMPLETED"}
    starts = [datetime.fromisoformat(run.shown(kind, "%S")) for kind in run.jobs]
    assert abs(starts[0] - starts[1]) <= timedelta(seconds=1), "at the same time: Slurm reads its clock for each"
    assert (run.node("training")[:3], run.node("runtime")[:3]) == ("gpu", "cpu")
    summary = json.loads(next(run.directory.rglob("summary.json")).read_text())
    assert summary["commands_run"] > 10
    record = json.loads(run.text("run.json"))
    assert record["pairing"] == "het"
    assert {kind: job["id"] for kind, job in record["jobs"].items()} == run.jobs
    assert "8 slots: 8 CPUs" in run.log("runtime"), "the component's CPUs, not the training's"
    assert f"training job {run.jobs['training']} is complete" in run.log("runtime")
    assert f"the runtime job {run.jobs['runtime']} has ended with exit code 0" in run.log("training"), "waited for"
    assert "[ERROR]" not in run.log("runtime", "err")
    environment = run.text("env.txt").splitlines()
    assert "SLURM_CPUS_PER_TASK=2" in environment
    assert not [line for line in environment if line.startswith("SKYRL_JOB_ID=")]
    for kind, cpus in (("training", 2), ("runtime", 8)):
        samples = read_usage(run.text(f"usage_{kind}_{run.jobs[kind]}.jsonl"))
        assert [(sample.node, sample.cpus) for sample in samples[:1]] == [(run.node(kind), cpus)]


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_code_is_the_trainers(user: User, checkout: Path, jobs_base: Path, command: str, code: int) -> None:
    run = launch(user, checkout, jobs_base, HET, f"TRAINING_COMMAND={command}")
    until("the completion flag", lambda: run.completion, 60)
    run.wait_over(seconds=END_S)
    assert run.completion["exit_code"] == code
    assert run.exit_code("training") == str(code)
    assert f"training job {run.jobs['training']} is complete" in run.log("runtime")


def test_a_killed_runtime_body_ends_the_training(user: User, checkout: Path, jobs_base: Path) -> None:
    """Slurm goes on calling its component running: the step's end tells."""
    run = training(user, checkout, jobs_base)
    os.kill(body_pid(run, "runtime"), signal.SIGKILL)
    until("the completion flag", lambda: run.completion, 15)
    run.wait_over(seconds=END_S)
    assert run.completion["exit_code"] == 69
    assert run.completion["ended"] == "interrupted"
    assert f"the runtime job {run.jobs['runtime']} has ended: exit code 137 of its step" in run.completion["reason"]
    assert run.exit_code("training") == "69"


def test_a_runtime_killed_before_it_is_ready_ends_the_training(user: User, checkout: Path, jobs_base: Path) -> None:
    run = launch(user, checkout, jobs_base, HET, TRAIN_LONG)
    run.wait_for_text("runtime", "runtime job", 60)
    os.kill(body_pid(run, "runtime"), signal.SIGKILL)
    run.wait_over(seconds=END_S)
    assert "exit code 137 of its step" in run.completion["reason"]
    assert "starting the trainer" not in run.log("training")


def test_a_runtime_that_fails_at_its_start_says_why(user: User, checkout: Path, jobs_base: Path) -> None:
    options = ("--no-check=images",)
    run = launch(user, checkout, jobs_base, HET, "IMAGE_ARCHIVE=/nowhere/image.tar", TRAIN_LONG, options=options)
    until("the completion flag", lambda: run.completion, 60)
    run.wait_over(seconds=END_S)
    words = f"the runtime job {run.jobs['runtime']} failed: IMAGE_ARCHIVE=/nowhere/image.tar is not a file"
    assert words in run.completion["reason"]
    assert words in run.log("training", "err")
    assert run.exit_code("training") == "69"


def test_a_runtime_without_its_python_says_why(user: User, checkout: Path, jobs_base: Path) -> None:
    """What a body cannot say itself, because it never began, stands in the log that its step opened."""
    run = launch(user, checkout, jobs_base, HET, TRAIN_LONG, "GPU_SBATCH_ARGS=--begin=now+600")
    script = run.directory / "code" / "slurm" / "jobs" / "runtime_server.py"
    assert user.run(["mv", str(script), f"{script}.gone"]).returncode == 0
    assert run.state("training") == "PENDING"
    run.start_now("training")
    until("the completion flag", lambda: run.completion, 60)
    run.wait_over(seconds=END_S)
    assert "can't open file" in run.completion["reason"], run.completion
    assert "exit code 2 of its step" in run.completion["reason"]


def test_a_killed_training_body_ends_everything(user: User, checkout: Path, jobs_base: Path) -> None:
    run = training(user, checkout, jobs_base)
    os.kill(body_pid(run, "training"), signal.SIGKILL)
    run.wait_over(seconds=END_S)
    assert not run.completion
    run.wait_for_text("runtime", "stopping everything: ended by SIGTERM", 10)  # in order, by Slurm's TERM


def test_scancel_of_the_job_that_runs(user: User, checkout: Path, jobs_base: Path) -> None:
    run = training(user, checkout, jobs_base)
    scancel(run, "training")
    run.wait_over(seconds=END_S)
    assert run.completion["exit_code"] == 143
    assert run.completion["ended"] == "cancelled"
    run.wait_for_text("runtime", "ended by SIGTERM", 10)


def test_scancel_of_the_runtimes_component_ends_the_training(user: User, checkout: Path, jobs_base: Path) -> None:
    run = training(user, checkout, jobs_base)
    scancel(run, "runtime")
    run.wait_over(seconds=END_S)
    assert run.completion["exit_code"] == 69
    assert f"the runtime job {run.jobs['runtime']} failed: ended by SIGTERM" in run.completion["reason"]


def test_scancel_while_it_waits(user: User, checkout: Path, jobs_base: Path) -> None:
    run = launch(user, checkout, jobs_base, HET, TRAIN_LONG, "GPU_SBATCH_ARGS=--begin=now+600")
    assert {run.state(kind) for kind in run.jobs} == {"PENDING"}
    scancel(run, "training")
    run.wait_over(seconds=END_S)
    assert not run.log("training")


def test_scancel_while_the_runtime_starts(user: User, checkout: Path, jobs_base: Path) -> None:
    run = launch(user, checkout, jobs_base, HET, TRAIN_LONG)
    run.wait_for_text("training", "as the second component", 60)
    scancel(run, "training")
    run.wait_over(seconds=END_S)
    assert run.completion["exit_code"] == 143
    assert "starting the trainer" not in run.log("training")


def test_a_refused_job_leaves_nothing(user: User, checkout: Path, jobs_base: Path) -> None:
    with pytest.raises(AssertionError, match=r"invalid partition.*nothing was queued"):
        launch(user, checkout, jobs_base, HET, TRAIN_LONG, "GPU_PARTITION=nonesuch", options=("--no-check",))
    assert not list(jobs_base.glob("2*"))


# --- restarts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def power() -> Iterator[None]:
    yield
    test_cluster.power_on("cpu-a")


def restartable(user: User, checkout: Path, jobs_base: Path, *settings: str) -> tuple[Run, Run]:
    """A run that has saved and goes on, and its next attempt, which waits."""
    run = launch(user, checkout, jobs_base, HET, "RESTARTS=2", SAVES_AT_ONCE, *settings)
    run.wait_for_text("training", "trainer started", 60)
    until("a checkpoint", lambda: (run.directory / "checkpoints" / "count").exists(), 10)
    return run, run.queued_attempt()


def went_on(first: Run, second: Run) -> None:
    """The next attempt has gone on from what the first one saved, finished the work, and taken back the third."""
    second.wait_over(seconds=90)
    assert second.completion["job_id"] == second.jobs["training"], second.completion
    assert second.completion["exit_code"] == 0
    assert re.search(r"attempt 2: .* going on from 1 file", second.log("training"))
    assert "attempt 2:" not in second.log("runtime"), "judged once"
    third = first.next_attempt(2)
    assert {third.state(kind) for kind in third.jobs} == {"CANCELLED"}


def test_a_preempted_run_goes_on(user: User, checkout: Path, jobs_base: Path) -> None:
    first, second = restartable(user, checkout, jobs_base, "GPU_SBATCH_ARGS=--nodelist=gpu-a")
    urgent = ["-p", "urgent", "--nodelist=gpu-a", "--gres=gpu:8", "--mem=1G", "-W", "--wrap=sleep 1", "-o/dev/null"]
    assert user.run(["sbatch", *urgent]).returncode == 0
    first.wait_over(seconds=END_S)
    assert "ended by SIGTERM (preemption)" in first.log("training")
    went_on(first, second)


def test_a_run_goes_on_after_its_time_limit(user: User, checkout: Path, jobs_base: Path) -> None:
    """Slurm counts limits in minutes, and looks at them twice a minute."""
    limit = ("TIME_LIMIT=00:01:00", "RESTART_LEAD=20", "GPUS_PER_NODE=0")
    first, second = restartable(user, checkout, jobs_base, *limit)
    first.wait_over(seconds=150)
    assert "ended by SIGTERM (the time limit)" in first.log("training")
    assert {first.state(kind) for kind in first.jobs} == {"TIMEOUT"}
    went_on(first, second)


def test_a_run_that_loses_its_cpu_node_goes_on(user: User, checkout: Path, jobs_base: Path, power: None) -> None:
    first, second = restartable(user, checkout, jobs_base, "CPU_SBATCH_ARGS=--nodelist=cpu-a", "GPUS_PER_NODE=0")
    test_cluster.power_off("cpu-a")
    first.wait_over(seconds=30)
    test_cluster.power_on("cpu-a")
    went_on(first, second)


def test_scancel_takes_the_next_attempt_along(user: User, checkout: Path, jobs_base: Path) -> None:
    first, second = restartable(user, checkout, jobs_base)
    scancel(first, "training")
    first.wait_over(seconds=END_S)
    second.wait_over(seconds=END_S)
    assert {second.state(kind) for kind in second.jobs} == {"CANCELLED"}
    assert "cancelled the next attempt, which is not needed\n" in first.log("training")


@pytest.mark.ray
def test_two_nodes_with_ray(user: User, checkout: Path, jobs_base: Path) -> None:
    """Ray's steps run on the training's nodes alone."""
    settings = ("GPU_NODES=2", "GPUS_PER_NODE=2", "RAY_CLUSTER=on", f"RAY_PYTHON={ray_python()}")
    driver = f"TRAINING_COMMAND=exec {ray_python()} {checkout}/tests/ray_driver.py 2 2"
    scratch = f"LOCAL_SCRATCH={test_cluster.LOCAL_DISK}"
    run = launch(user, checkout, jobs_base, HET, *settings, driver, scratch)
    run.wait_over(seconds=150)
    assert run.completion["exit_code"] == 0, run.log("training")[-3000:]
    found = json.loads(re.findall(r"^DRIVER (.+)$", run.log("training"), re.MULTILINE)[0])
    assert found["gpus"] == [2.0, 2.0]
    assert {path.name for path in run.directory.glob("ray_*gpu*.log")} == {
        f"ray_{run.jobs['training']}_{node}.log" for node in ("gpu-a", "gpu-b")
    }
