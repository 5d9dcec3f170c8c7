"""A launch that is killed, or whose Slurm falls silent: never half a pair, and nothing left for ever."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import faults
from tests.conftest import NothingLeft, OrdinaryUser
from tests.faults import within
from tests.runs import Run, launch_argv, parse_report, until

pytestmark = [pytest.mark.slurm, pytest.mark.faults]

NO_GPU = "GPUS_PER_NODE=0"
TRUE = "TRAINING_COMMAND=true"
LATER = "CPU_SBATCH_ARGS=--begin=now+3600"
OUTAGE_S = 120.0
ELSEWHERE = "skyrl:login9.example/boot/1/2/3/0"
# Does what Slurm's command does; at one of its calls, before or after it, kills the launcher or waits to go on.
WRAPPER = """#!/bin/sh
case " $* " in *" --test-only "*|*" show "*) exec {real} "$@" ;; esac
n=$(($(cat {folder}/{name}.count 2>/dev/null || echo 0) + 1))
echo $n > {folder}/{name}.count
at() {{
    [ "$SKYRL_TEST_POINT" = "$1" ] || return
    [ "$SKYRL_TEST_ACT" = kill ] && kill -9 $PPID && exit 1
    touch {folder}/reached
    while [ ! -e {folder}/go ]; do sleep 0.1; done
}}
at "{name} $n before"
{real} "$@"
code=$?
at "{name} $n after"
exit $code
"""


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


@dataclass(frozen=True)
class Job:
    """A job in the queue, as squeue prints it."""

    job_id: str
    name: str
    state: str
    reason: str

    @property
    def can_start(self) -> bool:
        """Whether it has been let go: a training that waits for its runtime depends on that one's."""
        return self.reason not in {"JobHeldUser", "Dependency"}


@dataclass
class Desk:
    """Where a user launches from: a folder for wrappers of Slurm's commands, and one for runs."""

    user: OrdinaryUser
    checkout: Path
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "runs"

    def argv(self, *settings: str) -> list[str]:
        return launch_argv(self.checkout, f"SKYRL_JOBS_BASE={self.base}", TRUE, NO_GPU, *settings)

    def wrapped(self, name: str, point: str, act: str) -> dict[str, str]:
        """The environment of a launch that is killed, or waits, at a point such as ``sbatch 2 before``."""
        folder = self.folder / name
        folder.mkdir()
        os.chown(folder, self.user.uid, self.user.gid)
        for command in ("sbatch", "scontrol"):
            real = self.user.run(["sh", "-c", f"command -v {command}"]).stdout.strip()
            script = folder / command
            script.write_text(WRAPPER.format(real=real, folder=shlex.quote(str(folder)), name=command))
            script.chmod(0o755)
        path = f"{folder}:{self.user.environment['PATH']}"
        return {"PATH": path, "SKYRL_TEST_POINT": point, "SKYRL_TEST_ACT": act}

    def start(self, *settings: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return self.user.popen(self.argv(*settings), env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def launch(self, *settings: str) -> tuple[Run, str]:
        """A launch that succeeds: its run, and what it said."""
        done = self.user.run(self.argv(*settings))
        assert done.returncode == 0, done.stderr
        return parse_report(self.user, done.stdout), done.stderr

    def queue(self) -> list[Job]:
        answer = self.user.run(["squeue", "-h", f"--user={self.user.name}", "-o", "%A|%j|%T|%r"])
        assert answer.returncode == 0, answer.stderr
        return [Job(*line.split("|")) for line in answer.stdout.splitlines()]

    def folders(self) -> set[Path]:
        return set(self.base.glob("2*")) if self.base.is_dir() else set()

    def whole_runs(self) -> dict[Path, set[str]]:
        """The runs with a complete directory, whose last file is the record, and the ids of their jobs."""
        finished = [path for path in self.folders() if (path / "run.json").exists()]
        records = {path: json.loads((path / "run.json").read_text()) for path in finished}
        return {path: {job["id"] for job in record["jobs"].values()} for path, record in records.items()}


@pytest.fixture
def desk(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> Iterator[Desk]:
    yield Desk(user, checkout, jobs_base)
    user.run(["scancel", "-u", user.name])


def assert_nothing_can_start(desk: Desk) -> None:
    """What may start belongs to a run with its whole directory and both jobs."""
    jobs = desk.queue()
    whole = desk.whole_runs()
    for job in jobs:
        ids = next((ids for ids in whole.values() if job.job_id in ids), set())
        if job.can_start:
            assert ids, jobs
            assert len(ids) == 2, jobs
        if job.reason == "Dependency":
            runtime = [other for other in jobs if other.name == "skyrl-runtime" and other.reason == "JobHeldUser"]
            assert ids or runtime, jobs


POINTS = [
    *(f"{command} {n} {when}" for command in ("sbatch", "scontrol") for n in (1, 2) for when in ("before", "after"))
]


def test_a_launcher_killed_at_each_call(desk: Desk) -> None:
    """Without anything to wait for: what could start would have started."""
    for number, point in enumerate(POINTS):
        env = desk.wrapped(f"bin{number}", point, "kill")
        with desk.start(env=env) as launcher:
            out, err = launcher.communicate(timeout=60)
        assert launcher.returncode == -signal.SIGKILL, (point, out, err)
        time.sleep(1)
        assert_nothing_can_start(desk)
        left = [job for job in desk.queue() if job.name.startswith("skyrl")]
        if point != POINTS[-1]:
            assert len(left) == [0, 1, 1, 2, 2, 2, 2][number], (point, left)
            assert not [job for job in left if job.can_start], (point, left)
    finished = {path for path in desk.folders() if list(path.glob("*.out"))}
    assert len(finished) == 1, "the one that was killed after its commit"
    until("its end", lambda: not desk.queue(), 60)
    run, said = desk.launch(LATER)
    assert {job.job_id for job in desk.queue()} == set(run.jobs.values())
    assert desk.folders() == {*finished, run.directory}
    assert not list(desk.base.glob("*/submission_*")), said
    within(faults.KILLED_AT_A_CALL, 0.0)


def test_a_launcher_killed_at_any_time(desk: Desk) -> None:
    kept: set[Path] = set()
    for number in range(20):
        launcher = desk.start(LATER)
        time.sleep(0.3 + 0.06 * number)
        launcher.kill()
        launcher.communicate()
        time.sleep(0.2)  # a call of sbatch goes on without it
        assert_nothing_can_start(desk)
        started = {job.job_id for job in desk.queue() if job.can_start}
        kept |= {path for path, ids in desk.whole_runs().items() if ids & started}
    run, _ = desk.launch(LATER)
    whole = desk.whole_runs()
    assert desk.folders() == whole.keys()
    assert whole.keys() == {*kept, run.directory}
    assert {job.job_id for job in desk.queue()} == set().union(*whole.values())
    within(faults.KILLED_ANY_TIME, 0.0)


def test_what_is_not_a_leftover_stays(desk: Desk) -> None:
    held, _ = desk.launch(LATER)
    assert desk.user.run(["scontrol", "hold", held.jobs["runtime"]]).returncode == 0
    script = ["sbatch", "--parsable", "--hold", f"--comment={ELSEWHERE}", f"--output={desk.base}/made-later/%j.out"]
    foreign = desk.user.run([*script, "--wrap=true"]).stdout.strip()
    env = desk.wrapped("bin", "sbatch 2 before", "wait")
    with desk.start(LATER, env=env) as living:
        until("its second sbatch", lambda: (desk.folder / "bin" / "reached").exists(), 30)
        other, said = desk.launch(LATER)
        assert f"job {foreign} is held by a launch on login9.example" in said
        assert f"scancel {foreign}" in said
        assert "removed what" not in said
        (desk.folder / "bin" / "go").touch()
        out, err = living.communicate(timeout=60)
    assert living.returncode == 0, err
    ids = {foreign, *held.jobs.values(), *other.jobs.values(), *parse_report(desk.user, out).jobs.values()}
    assert {job.job_id for job in desk.queue()} == ids
    assert len(ids) == 7
    within(faults.NOT_ITS_OWN, 0.0)
