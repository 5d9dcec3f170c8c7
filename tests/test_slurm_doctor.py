"""``launch.py doctor`` on a real cluster: a sound site, sites that lack something, and an end that leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slurm.lib.doctor.exchange import SILENCE_S
from tests import cluster as test_cluster
from tests.conftest import NothingLeft, OrdinaryUser
from tests.runs import squeue, until

pytestmark = pytest.mark.slurm

PODMAN = Path(shutil.which("podman") or "/usr/bin/podman")
# One node of each partition, so that it is known on which one a test takes something away.
ONE_OF_EACH = ("EXCLUDE_NODES=cpu-b,gpu-b", "CHECKPOINT_DIR=", "ROLLOUT_DIR=")
# No card is here: what its driver's program would print.
SMI = "#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 550.54.15, 81920 MiB, Disabled'\n"
UV = "#!/bin/sh\necho uv 0.5.1\n"


@dataclass(frozen=True)
class Said:
    """What the doctor printed with --json, and its exit code."""

    code: int
    printed: dict[str, Any]
    log: str

    @property
    def verdicts(self) -> list[tuple[str, str, str, str]]:
        """Place, check, health and sentence of each."""
        return [
            (place["place"], each["check"], each["health"], each["sentence"])
            for place in self.printed["places"]
            for each in place["verdicts"]
        ]

    def of(self, check: str, place: str = "") -> list[str]:
        """The health of a check, in the places whose name begins so."""
        return [health for where, name, health, _ in self.verdicts if name == check and where.startswith(place)]

    def works(self, check: str, place: str = "") -> bool:
        """Whether it was looked at and does not fail; on a busy machine it may be slow."""
        found = self.of(check, place)
        return bool(found) and "fail" not in found

    def sentences(self, health: str) -> list[str]:
        return [f"{check}: {sentence}" for _, check, how, sentence in self.verdicts if how == health]


@pytest.fixture
def programs(user: OrdinaryUser) -> Path:
    """A folder for PATH with what a GPU node has besides."""
    folder = user.home / "doctor-bin"
    folder.mkdir(exist_ok=True)
    for name, text in (("nvidia-smi", SMI), ("uv", UV)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@dataclass(frozen=True)
class Doctor:
    """The command, as the user starts it."""

    user: OrdinaryUser
    checkout: Path
    base: Path
    programs: Path

    def argv(self, *settings: str, options: tuple[str, ...] = ()) -> list[str]:
        words = [word for setting in (*ONE_OF_EACH, *settings) for word in ("--set", setting)]
        return [str(self.checkout / "slurm" / "launch.py"), "doctor", "--config", "dev", *words, *options]

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.programs}:{self.user.environment['PATH']}"
        return {"SKYRL_JOBS_BASE": str(self.base), "PATH": path}

    def __call__(self, *settings: str, options: tuple[str, ...] = ()) -> Said:
        argv = self.argv(*settings, options=("--json", *options))
        done = self.user.run(argv, env=self.environment, timeout=150)
        assert done.stdout, done.stderr
        return Said(done.returncode, json.loads(done.stdout), done.stderr)


@pytest.fixture
def doctor(user: OrdinaryUser, checkout: Path, jobs_base: Path, programs: Path, nothing_left: NothingLeft) -> Doctor:
    return Doctor(user, checkout, jobs_base, programs)


def folders_left(base: Path) -> list[Path]:
    return list(base.glob(".cache/doctor/*"))


def test_a_sound_site(doctor: Doctor, user: OrdinaryUser, nothing_left: NothingLeft) -> None:
    said = doctor()
    assert said.code == 0, said.verdicts
    assert said.printed["fail"] == 0
    assert said.of("subuid", "cpu-a") == said.of("podman", "cpu-a") == ["ok"]
    assert said.works("container", "cpu-a") and said.works("visibility")
    assert said.of("gpu", "gpu-a") == said.of("uv", "gpu-a") == said.of("python", "gpu-a") == ["ok"]
    assert any("NVIDIA A100-SXM4-80GB, driver 550.54.15" in sentence for sentence in said.sentences("ok"))
    assert said.of("clock") == ["ok", "ok"]
    assert said.of("port") == ["ok", "ok"], "from the other node, and from here"
    assert [sentence for sentence in said.sentences("ok") if sentence.startswith("account: no accounting")]
    nothing_left()
    assert not folders_left(doctor.base)


def test_where_accounts_are_kept(doctor: Doctor, accounting: None) -> None:
    said = doctor()
    assert said.code == 0, said.verdicts
    assert f"account: {doctor.user.name}: lab" in said.sentences("ok")
    refused = doctor("ACCOUNT=theirs")
    assert refused.code == 71
    assert any("has no association with it" in sentence for sentence in refused.sentences("fail"))


LACKING: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[None]], str, str]] = {
    "podman": (lambda: test_cluster.hide("cpu-a", PODMAN), "cpu-a", "not on PATH: podman"),
    "subuid": (lambda: test_cluster.hide("cpu-a", Path("/etc/subuid")), "cpu-a", "no range for"),
    "port": (lambda: test_cluster.isolate("cpu-a", "gpu-a"), "between", "is not reached from gpu-a"),
}


@pytest.mark.parametrize("check", LACKING)
def test_what_a_node_lacks_is_named_there(doctor: Doctor, check: str) -> None:
    lacking, place, words = LACKING[check]
    with lacking():
        said = doctor()
    assert said.code == 71
    assert said.of(check, place)[0] == "fail", said.verdicts
    failures = said.sentences("fail")
    assert len(failures) == 1 and words in failures[0], failures
    assert said.of("gpu", "gpu-a") == ["ok"], "the other node is looked at all the same"


def test_a_node_without_an_interpreter_says_so(doctor: Doctor) -> None:
    python = (doctor.checkout / ".venv" / "bin" / "python").resolve()
    with test_cluster.hide("cpu-a", python):
        said = doctor()
    assert said.code == 71
    [failure] = said.sentences("fail")
    assert failure.startswith("job: ") and "ended without a report" in failure
    assert said.of("port") == [], "without a page there is nothing to reach"


def test_a_partition_that_is_full_is_waited_for_no_longer_than_said(doctor: Doctor, user: OrdinaryUser) -> None:
    held = user.run(["sbatch", "--parsable", "-p", "gpu_test", "-w", "gpu-a", "--exclusive", "--wrap=sleep 600"])
    until("the node to be taken", lambda: squeue(user, "-t", "R").strip(), 30)
    try:
        said = doctor(options=("--wait", "20"))
    finally:
        user.run(["scancel", held.stdout.strip()])
    [sentence] = [each for each in said.sentences("warn") if each.startswith("job: ")]
    assert "did not start within 20 s (PENDING, Resources)" in sentence
    assert said.code == 0 and said.works("container", "cpu-a")
    assert any("was not tried from partition gpu_test" in each for each in said.sentences("warn"))


def test_silence_of_slurm_is_said_and_ends_the_look(doctor: Doctor) -> None:
    with test_cluster.silent_controller():
        said = doctor()
    assert said.code == 71
    assert said.sentences("fail")[0].startswith("slurm: Slurm does not answer")
    assert not [place for place, *_ in said.verdicts if "partition" in place]


def looking(doctor: Doctor) -> subprocess.Popen[str]:
    """A doctor whose container serves its page, and which waits for a node that is taken."""
    options = ("--wait", "240")
    process = doctor.user.popen(
        doctor.argv(options=options), env=doctor.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until("a report", lambda: list(doctor.base.glob(".cache/doctor/*/runtime-0.report.json")), 180)
    assert any("httpd" in words for words in doctor.user.processes().values())
    return process


@pytest.fixture
def taken_gpus(user: OrdinaryUser, nothing_left: NothingLeft) -> None:
    """No job starts on gpu-a; ended by the sweep of ``nothing_left`` at the latest."""
    user.run(["sbatch", "--job-name=taken", "-p", "gpu_test", "-w", "gpu-a", "--exclusive", "--wrap=sleep 600"])
    until("the node to be taken", lambda: squeue(user, "-t", "R").strip(), 30)


def free_gpus(user: OrdinaryUser) -> None:
    user.run(["scancel", "--name=taken"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_is_left_by_one_that_is_stopped(
    doctor: Doctor, taken_gpus: None, nothing_left: NothingLeft, number: signal.Signals
) -> None:
    process = looking(doctor)
    process.send_signal(number)
    _, log = process.communicate(timeout=90)
    assert process.returncode == 128 + number, log
    assert not folders_left(doctor.base)
    free_gpus(doctor.user)
    nothing_left()


def test_what_a_killed_one_leaves_ends_by_itself(doctor: Doctor, taken_gpus: None, nothing_left: NothingLeft) -> None:
    process = looking(doctor)
    process.kill()
    process.communicate()
    shown = squeue(doctor.user, "-n", "skyrl-doctor", "-o", "%T").split()
    assert sorted(shown) == ["PENDING", "RUNNING"]
    free_gpus(doctor.user)  # so that the pending one starts, and finds nobody
    until("the jobs to end by themselves", lambda: not nothing_left.now(), 2 * SILENCE_S + 60)
    until("the folder to go", lambda: not folders_left(doctor.base), 10)


def test_a_look_that_is_killed_leaves_nothing_and_is_told(
    doctor: Doctor, taken_gpus: None, nothing_left: NothingLeft
) -> None:
    process = looking(doctor)
    bodies = [pid for pid, words in doctor.user.processes().items() if " slurm.lib.doctor.node " in words]
    for pid in bodies:
        os.kill(pid, signal.SIGKILL)
    until("its container to go", lambda: not any("httpd" in w for w in doctor.user.processes().values()), 30)
    free_gpus(doctor.user)
    out, log = process.communicate(timeout=90)
    assert process.returncode == 71, log
    assert re.search(r"fail  job +job \d+ ended while it was needed \(FAILED", out), out
    nothing_left()


def test_this_machine_alone(doctor: Doctor, nothing_left: NothingLeft) -> None:
    argv = [str(doctor.checkout / "slurm" / "launch.py"), "doctor", "--config", "local"]
    done = doctor.user.run(argv, env=doctor.environment, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(ok  |warn)  container   a container ran in", done.stdout)
    assert "partition" not in done.stdout
    nothing_left()
