"""``launch.py list``, ``status`` and ``wait`` on a real Slurm, with runs in different states at the same time.

They are looked at by their user, by another user, and from another host.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser, fresh_folder, leaving_nothing
from tests.runs import STARTS_SANDBOXES, Run, body_pid, cancelled, launch, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

SMALL = ("CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", "GPUS_PER_NODE=0")
LATER = "--begin=now+3600"
ON_GO = 'until [ -e "$SKYRL_COORD_DIR/go" ]; do sleep 0.1; done'
STEPS = 'echo "Step 3/5: mean reward 0.1"'
FAILS = f"TRAINING_COMMAND={STEPS}; echo 'ValueError: the model is too large' >&2; exit 7"
ENDS = f"TRAINING_COMMAND={STEPS.replace('3/5', '5/5')}"
GOES_ON = f"{STARTS_SANDBOXES}\n{STEPS}\nexec sleep 600"
SEEN_WITHIN_S = 60.0


@dataclass
class Scene:
    """Runs of one user in different states."""

    user: OrdinaryUser
    checkout: Path
    base: Path
    runs: dict[str, Run] = field(default_factory=dict)

    def begin(self, name: str, *settings: str) -> None:
        self.runs[name] = launch(self.user, self.checkout, self.base, *SMALL, *settings)

    @property
    def environment(self) -> dict[str, str]:
        return {"SKYRL_JOBS_BASE": str(self.base)}

    def call(
        self, *words: str, user: OrdinaryUser | None = None, timeout: float = 60, **more: str
    ) -> subprocess.CompletedProcess[str]:
        argv = [str(self.checkout / "slurm" / "launch.py"), *words]
        return (user or self.user).run(argv, env={**self.environment, **more}, timeout=timeout)

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = [str(self.checkout / "slurm" / "launch.py"), *words]
        return self.user.popen(argv, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def status(self, *words: str) -> dict[str, dict[str, Any]]:
        """What ``status --json`` says, by the names of this scene."""
        done = self.call("status", "--json", *words)
        assert done.returncode == 0, done.stderr
        names = {str(run.directory): name for name, run in self.runs.items()}
        return {names[run["directory"]]: run for run in json.loads(done.stdout)["runs"]}

    def is_in(self, name: str, state: str) -> bool:
        return bool(self.status(str(self.runs[name].directory))[name]["state"] == state)

    def directory(self, name: str) -> str:
        return str(self.runs[name].directory)


@pytest.fixture(scope="module")
def scene(user: OrdinaryUser, checkout: Path) -> Iterator[Scene]:
    """Six runs: pending, waiting for GPUs, running with a next attempt, completed, failed, withdrawn."""
    with leaving_nothing(user):
        made = Scene(user, checkout, fresh_folder(user, "status"))
        made.begin("pending", f"CPU_SBATCH_ARGS={LATER}", f"TRAINING_COMMAND={STEPS}")
        made.begin("waiting", f"GPU_SBATCH_ARGS={LATER}", f"TRAINING_COMMAND={STEPS}")
        made.begin("running", "PAIRING=het", "RESTARTS=1", f"TRAINING_COMMAND={GOES_ON.partition('=')[2]}")
        made.begin("completed", ENDS)
        made.begin("failed", FAILS)
        made.begin("withdrawn", f"CPU_SBATCH_ARGS={LATER}", ENDS)
        assert made.call("cancel", made.directory("withdrawn")).returncode == 0
        for name in ("completed", "failed"):
            made.runs[name].wait_over(seconds=90)
        until("sandboxes", lambda: made.runs["running"].text("sandboxes.json"), 90)
        made.runs["running"].wait_for_text("training", "Step 3/5", 30)
        until("a runtime that waits", lambda: made.is_in("waiting", "waiting"), SEEN_WITHIN_S)
        yield made
        left = [made.directory(name) for name in ("pending", "waiting", "running")]
        cancelled(lambda: made.call("cancel", *left))


def job(run: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return dict(next(found for found in run["jobs"] if found["kind"] == kind))


def test_every_run_in_its_state(scene: Scene) -> None:
    runs = scene.status(*(scene.directory(name) for name in scene.runs))
    states = {name: run["state"] for name, run in runs.items()}
    assert states == {
        "pending": "pending",
        "waiting": "waiting",
        "running": "running",
        "completed": "completed",
        "failed": "failed",
        "withdrawn": "cancelled",
    }
    assert runs["completed"]["exit_code"] == 0
    assert (runs["failed"]["exit_code"], runs["failed"]["reason"]) == (7, "the trainer failed with exit code 7")
    assert runs["failed"]["phase"] == {"words": "ended", "step": 3, "steps": 5}
    assert job(runs["failed"], "training")["last_error"] == "ValueError: the model is too large"
    assert "cancelled before it began" in runs["withdrawn"]["reason"]
    assert not any(run["problems"] for run in runs.values())


def test_a_run_that_goes_on(scene: Scene) -> None:
    counted = {"living": 2, "used": 2, "slots": 2, "waiting": 0}
    seen: list[dict[str, Any]] = []

    def all_is_told() -> bool:  # within 2 s, which a busy machine may not keep
        seen.append(scene.status(scene.directory("running"))["running"])
        return bool(seen[-1]["sandboxes"] == counted)

    until("its sandboxes", all_is_told, SEEN_WITHIN_S)
    run = seen[-1]
    assert run["phase"] == {"words": "training", "step": 3, "steps": 5}
    assert (run["attempt"], run["attempts"], run["pairing"]) == (1, 2, "het")
    assert run["next_attempt"]["attempt"] == 2
    assert {one["slurm_reason"] for one in run["next_attempt"]["jobs"]} == {"Dependency"}
    training = job(run, "training")
    assert (training["stage"], training["limit_s"]) == ("running", 1200)
    assert training["node"] in test_cluster.NODES
    assert 0 <= training["elapsed_s"] < 600


def test_runs_that_wait(scene: Scene) -> None:
    runs = scene.status()
    assert set(runs) == {"pending", "waiting", "running"}, "without a name: those that live"
    assert runs["waiting"]["phase"]["words"] == "waiting for GPUs"
    assert runs["waiting"]["sandboxes"].get("used", 0) == 0
    assert job(runs["waiting"], "runtime")["stage"] == "running"
    assert job(runs["pending"], "runtime")["slurm_reason"] == "BeginTime"
    text = scene.call("status", scene.directory("pending")).stdout
    assert re.search(r"runtime +job \d+: PENDING \(BeginTime\), starts about (\w+ \d+ \w+ )?\d\d:\d\d\n", text), text
    assert re.search(r"training +job \d+: PENDING \(Dependency\): waits for the job before it\n", text), text


def test_the_words_for_people(scene: Scene) -> None:
    text = scene.call("status", scene.directory("running"), scene.directory("failed")).stdout
    running, failed = text.split("\n\n")
    assert re.search(r"^\S+  running  attempt 1 of 2  dev\n", running), running
    assert re.search(r"\n  phase +step 3 of 5\n", running)
    assert re.search(r"\n  training +job \d+: RUNNING on [cg]pu-[ab], \d+:\d\d of 20:00\n", running), running
    assert re.search(r"\n  next +attempt 2, jobs \d+, \d+: PENDING \(Dependency\)", running), running
    assert re.search(r"\n  sandboxes +(2 living, 2 of 2 slots used|unknown: its API server .*)\n", running), running
    assert "ended with exit code 7: the trainer failed with exit code 7" in failed
    assert re.search(r"\n  training says ValueError: the model is too large\n", failed), failed
    assert "\x1b" not in text


def test_what_the_gpus_do(scene: Scene) -> None:
    """The node has no GPU: a stand-in on PATH says what nvidia-smi says of an H100, and of one in MIG slices."""
    directory = scene.directory("running")
    told = scene.status("--gpu", directory)["running"]["gpus"]
    assert "nvidia-smi" in told["unknown"]
    folder = scene.base / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    lines = "0, NVIDIA H100 80GB HBM3, 97, 61440, 81559\n1, NVIDIA H100 80GB HBM3, [N/A], 20480, 81559\n"
    program.write_text(f"#!/bin/sh\ncase \"$*\" in *utilization.gpu*) printf '{lines}';; esac\n")
    program.chmod(0o755)
    try:
        done = scene.call("status", "--gpu", directory, PATH=f"{folder}:/usr/bin:/bin")
    finally:
        shutil.rmtree(folder)
    node = scene.runs["running"].node("training")
    assert re.search(rf"\n  gpus +{node}: 0 97 % 60 of 80 GiB, 1 busy \? 20 of 80 GiB\n", done.stdout), done.stdout
    steps = ["squeue", "-h", "--steps", "-j", scene.runs["running"].jobs["training"], "-o", "%j"]
    until("the end of its step", lambda: "skyrl-look" not in scene.user.run(steps).stdout, 30)


def test_the_list(scene: Scene) -> None:
    lines = scene.call("list").stdout.splitlines()
    assert lines[0].split() == ["RUN", "STATE", "EXIT", "PHASE", "ELAPSED", "ATTEMPT", "JOBS", "CONFIG"]
    assert len(lines) == 1 + len(scene.runs)
    (failed,) = [line for line in lines if line.startswith(scene.runs["failed"].directory.name)]
    assert re.search(r"  failed +7 +step 3 of 5 .* dev$", failed), failed
    (running,) = [line for line in lines if line.startswith(scene.runs["running"].directory.name)]
    assert re.search(r"  running +step 3 of 5 +\d+:\d\d +1 of 2 +\d+,\d+ +dev$", running), running
    told = json.loads(scene.call("list", "--json").stdout)
    assert (told["schema"], told["slurm_answers"], len(told["runs"])) == (1, True, 6)
    names = [run["run"] for run in told["runs"]]
    assert names == sorted(names, key=lambda name: (name[:15], len(name), name), reverse=True)


def test_a_run_is_known_by_each_of_its_names(scene: Scene) -> None:
    run = scene.runs["running"]
    for name in (*run.jobs.values(), run.directory.name, str(run.directory)):
        assert list(scene.status(name)) == ["running"], name
    prefix, count = Counter(path.name[:9] for path in scene.base.iterdir()).most_common(1)[0]
    done = scene.call("status", prefix)
    assert done.returncode == 2
    assert f"'{prefix}' is the beginning of {count} runs' names" in done.stderr
    unknown = scene.call("status", "nonesuch", "99999")
    assert unknown.returncode == 2
    assert unknown.stderr.count("there is no run") == 2
    assert "Traceback" not in unknown.stderr


def test_another_users_runs(scene: Scene, other_user: OrdinaryUser) -> None:
    for verb in ("status", "wait"):
        done = scene.call(verb, scene.directory("running"), user=other_user)
        assert done.returncode == 2, done.stderr
        assert f"cannot be read: it is {scene.user.name}'s" in done.stderr
        assert done.stderr.count("\n") == 1
    assert scene.call("list", user=other_user).stdout == f"no runs below SKYRL_JOBS_BASE={scene.base}\n"
    everything = scene.call("list", "--all", user=other_user)
    assert everything.returncode == 0
    assert everything.stdout.count("its directory cannot be read") == len(scene.runs)


def test_from_another_host(scene: Scene) -> None:
    """A node may stand for a second login node: it has Slurm's commands and the shared home."""
    words = " ".join(["exec", str(scene.checkout / "slurm" / "launch.py"), "status", "--json"])
    shell = f"export SKYRL_JOBS_BASE={scene.base} SLURM_CONF={test_cluster.CONF}; {words}"
    told = json.loads(test_cluster.on_node("cpu-b", "runuser", "-u", scene.user.name, "--", "bash", "-c", shell))
    assert {run["state"] for run in told["runs"]} == {"pending", "waiting", "running"}


def test_half_of_a_run_directory(scene: Scene) -> None:
    whole = scene.runs["failed"].directory
    half = scene.base / "20260101_000000_987654"
    subprocess.run(["cp", "-a", str(whole), str(half)], check=True)
    try:
        (half / "run.json").write_text('{"jobs": {"runtime"')
        (half / "training_complete.flag").unlink()
        done = scene.call("status", half.name)
        assert done.returncode == 0
        assert re.search(r"\n  not known +run.json holds no JSON\n", done.stdout), done.stdout
        assert "Slurm says FAILED" in done.stdout  # the logs name the jobs
        (half / "run.json").unlink()
        gone = scene.call("status", half.name)
        assert gone.returncode == 2
        assert "no run.json is there" in gone.stderr
        assert gone.stderr.count("\n") == 1
        assert half.name in scene.call("list").stdout
    finally:
        shutil.rmtree(half)


def test_a_silent_controller_ends_no_run(scene: Scene) -> None:
    with test_cluster.silent_controller():
        done = scene.call("status", "--json", scene.directory("running"), scene.directory("failed"), timeout=90)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert not told["slurm_answers"]
    assert [run["state"] for run in told["runs"]] == ["unknown", "failed"]
    assert told["runs"][0]["phase"] == {"unknown": "Slurm does not answer"}
    assert told["runs"][0]["sandboxes"], "the API server is asked all the same"
    assert "Slurm does not answer" in done.stderr


# --- wait and watch ---------------------------------------------------------------------------------------------------


def test_waiting_for_what_has_ended(scene: Scene) -> None:
    for name, code in (("completed", 0), ("failed", 7), ("withdrawn", 143)):
        done = scene.call("wait", scene.directory(name))
        assert done.returncode == code, done.stderr
        assert done.stdout.startswith(scene.runs[name].directory.name)
    told = json.loads(scene.call("wait", "--json", scene.directory("failed")).stdout)
    assert (told["state"], told["exit_code"]) == ("failed", 7)


def test_a_wait_has_a_deadline_and_an_end_by_a_signal(scene: Scene) -> None:
    done = scene.call("wait", "--timeout", "1", scene.directory("running"))
    assert done.returncode == 75
    assert "has not ended within 1 s: it is running" in done.stderr
    wait = scene.start("wait", scene.directory("running"))
    assert wait.stderr
    assert ": running" in wait.stderr.readline()
    wait.send_signal(signal.SIGINT)
    assert wait.wait(30) == 130
    wait.communicate()
    assert scene.is_in("running", "running")


def test_a_wait_and_a_watch_see_a_run_to_its_end(scene: Scene) -> None:
    """A run whose two jobs are two."""
    run = launch(scene.user, scene.checkout, scene.base, *SMALL, f"TRAINING_COMMAND={STEPS}; {ON_GO}; exit 5")
    wait, watch = (
        scene.start(*words, str(run.directory)) for words in (["wait"], ["status", "--watch", "--every", "5"])
    )
    try:
        run.wait_for_text("training", "Step 3/5", 60)
        told = json.loads(scene.call("status", "--gpu", "--json", str(run.directory)).stdout)["runs"][0]
        assert re.search(r"nvidia-smi: (command )?not found", told["gpus"]["unknown"]), told["gpus"]
        (run.directory / "go").touch()
        run.wait_over("training", seconds=90)
        ended = time.monotonic()
        out, err = wait.communicate(timeout=60)
        assert wait.returncode == 5, err
        assert time.monotonic() - ended < SEEN_WITHIN_S
        assert out == f"{run.directory.name} failed: the trainer failed with exit code 5\n"
        lines, _ = watch.communicate(timeout=60)
    finally:
        for process in (wait, watch):
            process.kill()
    assert watch.returncode == 0
    assert (
        " failed: step 3 of 5 (ended with exit code 5: the trainer failed with exit code 5)" in lines.splitlines()[-1]
    )
    assert all(re.match(r"\d\d:\d\d:\d\d 2\d+_\d+_\d+ ", line) for line in lines.splitlines()), lines
    assert run.exit_code("training") == "5"


def test_a_wait_goes_through_a_restart(scene: Scene) -> None:
    trainer = """TRAINING_COMMAND=[ ! -e "$CHECKPOINT_DIR/saved" ] || { echo "Step 5/5"; exit 4; }
echo saved > "$CHECKPOINT_DIR/saved"; echo "Step 2/5"; sleep 600"""
    run = launch(scene.user, scene.checkout, scene.base, *SMALL, "RESTARTS=1", trainer)
    scene.runs["restarted"] = run
    run.wait_for_text("training", "Step 2/5", 60)
    run.queued_attempt()
    wait = scene.start("wait", str(run.directory))
    try:
        scene.user.run(["kill", "-9", str(body_pid(run, "runtime"))])
        out, err = wait.communicate(timeout=120)
    finally:
        wait.kill()
    assert wait.returncode == 4, err
    assert out == f"{run.directory.name} failed: the trainer failed with exit code 4\n"
    told = scene.status(str(run.directory))["restarted"]
    assert (told["attempt"], told["attempts"], told["phase"]["step"]) == (2, 2, 5)
    assert told["next_attempt"] is None
    del scene.runs["restarted"]


def test_a_run_that_was_killed_ends_with_slurms_word(scene: Scene) -> None:
    """Its body could say nothing; the code is what Slurm saw."""
    run = launch(scene.user, scene.checkout, scene.base, *SMALL, "PAIRING=het", f"TRAINING_COMMAND={STEPS}; sleep 600")
    run.wait_for_text("training", "Step 3/5", 60)
    scene.user.run(["kill", "-9", str(body_pid(run, "training"))])
    done = scene.call("wait", str(run.directory), "--timeout", "90", timeout=100)
    assert done.returncode == 137, done.stderr
    run.wait_over(seconds=60)


def test_a_local_run(scene: Scene) -> None:
    argv = [str(scene.checkout / "slurm" / "launch.py"), "--config", "local"]
    argv += ["--set", f"SKYRL_JOBS_BASE={scene.base}", "--set", f"TRAINING_COMMAND={STEPS}; sleep 600"]
    with scene.user.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
        assert launcher.stdout
        directory = Path(launcher.stdout.readline().rpartition(": ")[2].strip())
        try:
            run = Run(scene.user, directory, {})
            until(
                "its step", lambda: any("Step 3/5" in path.read_text() for path in directory.glob("training_*.out")), 60
            )
            told = json.loads(scene.call("status", "--json", run.directory.name).stdout)["runs"][0]
            assert (told["state"], told["backend"], told["phase"]["step"]) == ("running", "local", 3)
            elsewhere = test_cluster.on_node(
                "cpu-a",
                *("runuser", "-u", scene.user.name, "--", "bash", "-c"),
                f"exec {scene.checkout}/slurm/launch.py status --json {directory}",
            )
            (seen,) = json.loads(elsewhere)["runs"]
            assert seen["state"] == "unknown"
            assert "its processes are known only there" in seen["phase"]["unknown"]
            cancelled(lambda: scene.call("cancel", directory.name))
        finally:
            launcher.terminate()
    assert scene.call("wait", directory.name).returncode == 143
