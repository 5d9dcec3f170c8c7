"""What the checks ask a real Slurm, and what a real node answers when a job begins.

Not in tests/preflight, which comes before tests/runtime: a cluster that is up does not survive the fork bombs there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser
from tests.runs import launch, launch_argv, squeue, until

pytestmark = pytest.mark.slurm
TRUE = "TRAINING_COMMAND=true"


def check(user: OrdinaryUser, checkout: Path, jobs_base: Path, *settings: str) -> tuple[int, list[dict[str, str]]]:
    """Exit code and findings of ``--check``."""
    base = f"SKYRL_JOBS_BASE={jobs_base}"
    done = user.run(launch_argv(checkout, base, TRUE, *settings, options=("--check", "--json")))
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["findings"]


def test_slurm_says_when_the_jobs_would_start(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    code, found = check(user, checkout, jobs_base)
    assert code == 0
    assert [finding["level"] for finding in found] == ["estimate", "estimate"]
    assert all("job would start about 20" in finding["sentence"] for finding in found)
    assert not squeue(user, "-u", user.name).strip(), "a question queues nothing"
    assert list(jobs_base.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("GPU_PARTITION=nowhere", "GPU_PARTITION=nowhere: there is no such partition"),
        ("CPU_PARTITION=nowhere", "Slurm would not take the runtime job: "),
        ("TIME_LIMIT=13:00:00", "more than GPU_PARTITION=gpu_test allows (12 h)"),
        ("GPU_NODES=3", "wants 3 nodes with 1 GPU each, GPU_PARTITION=gpu_test has 2"),
        ("GPUS_PER_NODE=9", "wants 1 node with 9 GPUs each"),
        ("GPU_TYPE=h100", "h100 GPU each, GPU_PARTITION=gpu_test has 0"),
        ("GPU_PARTITION=test", "the training job wants 1 node with 1 GPU each, GPU_PARTITION=test has 0"),
        ("CPUS_FOR_RUNTIME=500", "Slurm would not take the runtime job: "),
        ("TRAINING_MEMORY=9T", "Slurm would not take the training job: "),
        ("RESERVATION=nowhere", "Slurm would not take the training job: "),
        (
            "RUNTIME_NODES=3 RUNTIME_DRAIN_LEAD=9 RUNTIME_MODE=allocation",
            "the runtime job wants 3 nodes, CPU_PARTITION=test has 2 of them",
        ),
        ("RUNTIME_NODES=1002 RUNTIME_DRAIN_LEAD=9", "numbers up to 1000 (MaxArraySize=1001)"),
    ],
)
def test_what_slurm_would_not_do(user: OrdinaryUser, checkout: Path, jobs_base: Path, setting: str, said: str) -> None:
    code, found = check(user, checkout, jobs_base, *setting.split())
    assert code == 2
    errors = [finding for finding in found if finding["level"] == "error"]
    assert any(said in finding["sentence"] for finding in errors), found
    assert all(finding["check"] == "slurm" and finding["fix"] for finding in errors)


def test_a_partition_that_gives_a_job_fewer_nodes(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    """With jobs of one node each that is no hindrance."""
    words = ("RUNTIME_NODES=2", "RUNTIME_DRAIN_LEAD=9")
    with test_cluster.most_nodes("test", 1):
        found = [
            one
            for one in check(user, checkout, jobs_base, *words, "RUNTIME_MODE=allocation")[1]
            if one["level"] == "error"
        ]
        assert any("CPU_PARTITION=test gives a job at most 1 (MaxNodes)" in one["sentence"] for one in found), found
        assert check(user, checkout, jobs_base, *words)[0] == 0


def test_more_nodes_than_the_partition_has_are_a_warning(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    code, found = check(user, checkout, jobs_base, "RUNTIME_NODES=3", "RUNTIME_DRAIN_LEAD=9")
    assert code == 0
    said = [one["sentence"] for one in found if one["level"] == "warning"]
    assert any("RUNTIME_NODES=3, and CPU_PARTITION=test has 2 nodes" in sentence for sentence in said), found


def test_an_account_is_nobodys_worry_where_there_is_no_accounting(
    user: OrdinaryUser, checkout: Path, jobs_base: Path
) -> None:
    code, found = check(user, checkout, jobs_base, "ACCOUNT=lab")
    assert code == 0, found


def test_a_launch_stops_before_anything_is_queued(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    words = (f"SKYRL_JOBS_BASE={jobs_base}", TRUE, "GPUS_PER_NODE=9")
    done = user.run(launch_argv(checkout, *words))
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing was queued" in done.stderr
    assert not squeue(user, "-u", user.name).strip()
    assert list(jobs_base.iterdir()) == []


@pytest.mark.podman
def test_a_runtime_that_is_joined(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, nothing_left: Callable[[], None]
) -> None:
    """As it answers itself, with its key and with another, and when its job has ended."""
    run = launch(user, checkout, jobs_base, options=("--runtime-only",))
    joined = f"SKYRL_COORD_DIR={run.directory}"

    def found(*settings: str, options: tuple[str, ...] = ("--skip-runtime",)) -> tuple[int, list[tuple[str, str]]]:
        words = (f"SKYRL_JOBS_BASE={jobs_base}", TRUE, *settings)
        done = user.run(launch_argv(checkout, *words, options=("--check", "--json", *options)))
        findings = [finding for finding in json.loads(done.stdout)["findings"] if finding["check"] == "runtime"]
        return done.returncode, [(finding["level"], finding["sentence"]) for finding in findings]

    until("ready", lambda: run.text("runtime_ready.flag"), 90)
    url = run.text("runtime_url.txt").strip()
    well = ("estimate", f"the runtime at {url} answers and takes the key")
    until("an answer in time", lambda: found(joined) == (0, [well]), 60)
    assert [level for level, _ in found(joined, "RESTARTS=1")[1]] == ["warning", "estimate"]
    other = jobs_base / "another.key"
    other.write_text("sk-another\n")
    code, ((level, sentence),) = found(options=("--runtime-url", url, "--api-key-file", str(other)))
    assert (code, level, sentence.partition(" (")[0]) == (2, "error", f"the runtime at {url} refused the key")
    assert found(options=("--runtime-url", url, "--api-key-file", f"{run.directory}/runtime_api_key.txt")) == (
        0,
        [well],
    )
    user.run(["scancel", run.jobs["runtime"]])
    run.wait_over(seconds=60)
    code, ((level, sentence),) = found(joined)
    assert (code, level, "has ended (runtime_failed.flag" in sentence) == (2, "error", True), sentence
    (run.directory / "runtime_failed.flag").unlink()
    code, ((level, sentence),) = found(joined)
    assert (code, level, "has ended, by Slurm's word" in sentence) == (2, "error", True), sentence


@pytest.mark.podman
def test_a_node_that_cannot_write_says_so_at_once(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, nothing_left: Callable[[], None]
) -> None:
    """The login node is not asked here: a folder can be writable there and not on the GPU node."""
    run = launch(user, checkout, jobs_base, TRUE, "CHECKPOINT_DIR=/boot/ckpt", options=("--no-check=folders",))
    run.wait_over("runtime", "training", seconds=90)
    assert run.exit_code("training") == "71"
    assert "cannot run this job: CHECKPOINT_DIR=/boot/ckpt: /boot cannot be written on gpu-" in run.log(
        "training", "err"
    )
    assert "/boot cannot be written" in run.completion["reason"]
