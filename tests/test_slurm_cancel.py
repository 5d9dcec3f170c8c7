"""``launch.py cancel --all`` and ``--after-checkpoint`` on a real Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests.conftest import NothingLeft, OrdinaryUser, fresh_folder
from tests.local_runs import Place
from tests.runs import SMALL, WITH_SANDBOXES, Run, killed_after, launch, squeue, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

NO_GPU = ("GPUS_PER_NODE=0", "CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G")
LATER = "CPU_SBATCH_ARGS=--begin=now+3600"
TRAIN_LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 600"
# A trainer that saves as VERL does, the tracker last, when the test says so; and one that ends when it says so.
SAVES = """TRAINING_COMMAND=d="$CHECKPOINT_DIR/exp"; mkdir -p "$d"; echo trainer started; echo "Step 3/99"
until [ -e "$SKYRL_COORD_DIR/begin" ]; do sleep 0.2; done
mkdir -p "$d/global_step_5"; echo weights > "$d/global_step_5/model.pt"; echo half of a checkpoint
until [ -e "$SKYRL_COORD_DIR/save" ]; do sleep 0.2; done
echo 5 > "$d/.new"; mv "$d/.new" "$d/latest_checkpointed_iteration.txt"; exec sleep 600"""
ENDS = """TRAINING_COMMAND=echo trainer started
until [ -e "$SKYRL_COORD_DIR/end" ]; do sleep 0.2; done; exit 3"""
AS_VERL = ("TRAINING_COMMAND_IS_VERL=true", "WANDB_EXPERIMENT=exp", "SAVE_FREQ=5")
STARTED_S, SEEN_S, ENDED_S = 90.0, 60.0, 60.0


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


@dataclass
class Desk:
    """A person with a checkout and a jobs base."""

    user: OrdinaryUser
    checkout: Path
    base: Path

    def _argv(self, words: tuple[object, ...]) -> list[str]:
        return [str(self.checkout / "slurm" / "launch.py"), "cancel", *map(str, words)]

    def cancel(self, *words: object, timeout: float = 90) -> CompletedProcess[str]:
        return self.user.run(self._argv(words), {"SKYRL_JOBS_BASE": str(self.base)}, timeout=timeout)

    @contextlib.contextmanager
    def started(self, *words: object) -> Iterator[subprocess.Popen[str]]:
        """The same, going on; ended with the block."""
        environment = {"SKYRL_JOBS_BASE": str(self.base)}
        process = self.user.popen(
            self._argv(words), environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def launch(self, *settings: str, base: Path | None = None, options: tuple[str, ...] = ()) -> Run:
        return launch(self.user, self.checkout, base or self.base, *NO_GPU, *settings, options=options)

    def say(self, run: Run, word: str) -> None:
        """A file that the run's trainer waits for."""
        (run.directory / word).touch()
        os.chown(run.directory / word, self.user.uid, self.user.gid)


@pytest.fixture
def desk(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> Desk:
    return Desk(user, checkout, jobs_base)


def told(stdout: str) -> dict[str, dict[str, Any]]:
    """What ``cancel --json`` says of each run, by its directory, or its job where it has none."""
    return {str(run["directory"] or run["run"]): run for run in json.loads(stdout)["runs"]}


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Its log up to the line with these words."""
    assert process.stderr
    lines = []
    with killed_after(process):
        for line in process.stderr:
            lines.append(line)
            if words in line:
                return "".join(lines)
    raise AssertionError(f"no {words!r} in {lines}")


def test_all_that_live_and_nothing_else(desk: Desk, user: OrdinaryUser, other_user: OrdinaryUser) -> None:
    """Running, pending, of another jobs base, given to sbatch, local; not what has ended, is none of ours, or another
    user's."""
    assert desk.cancel("--all", "--yes").returncode == 0, "nothing lives"
    over = desk.launch("TRAINING_COMMAND=exit 0")
    running = desk.launch(TRAIN_LONG)
    pending = desk.launch(TRAIN_LONG, LATER)
    elsewhere = desk.launch(TRAIN_LONG, LATER, base=fresh_folder(user, "cancel_all_elsewhere"))
    words = [word for setting in SMALL for word in ("--set", setting)]
    script = str(desk.checkout / "slurm" / "jobs" / "runtime_server.py")
    submit = ["sbatch", "--parsable", "--begin=now+3600"]
    direct = user.run([*submit, "-J", "skyrl-runtime", script, *words], cwd=desk.base).stdout.strip()
    own_other = user.run([*submit, "-J", "bert", "--wrap=true"], cwd=desk.base).stdout.strip()
    named_alike = other_user.run([*submit, "-J", "skyrl-train", "--output=/dev/null", "--wrap=true"]).stdout.strip()
    assert direct.isdigit() and own_other.isdigit() and named_alike.isdigit()
    over.wait_over(seconds=STARTED_S)
    running.wait_for_text("training", "trainer started", STARTED_S)
    base = fresh_folder(user, "cancel_all_local")
    try:
        with Place(desk.checkout, base, user, user.environment).lent() as here:
            local = here.start(TRAIN_LONG)
            local.wait_for("training | trainer started", STARTED_S)
            link = desk.base / local.directory.name  # its base is another one
            link.symlink_to(local.directory)
            os.chown(link, user.uid, user.gid, follow_symlinks=False)

            refused = desk.cancel("--all")
            assert refused.returncode == 2
            assert "5 of your runs live" in refused.stderr
            assert "no terminal to ask at: add --yes" in refused.stderr
            assert "nothing was cancelled" in refused.stderr
            assert running.state("training") == "RUNNING"

            done = desk.cancel("--all", "--yes", "--json")
            assert done.returncode == 0, done.stderr
            runs = told(done.stdout)
            directories = {str(run.directory) for run in (running, pending, elsewhere)}
            assert runs.keys() == {*directories, str(link), direct}, runs.keys()
            jobs = [job for run in runs.values() for job in run["jobs"]]
            assert all(job["ended"] and job["done"] for job in jobs), jobs
            assert local.wait(60) == 143
        for run in (running, pending, elsewhere):
            assert run.completion["ended"] == "cancelled"
        for job_id in (own_other, named_alike):
            assert "PENDING" in squeue(user, "-a", "-j", job_id, "-o", "%T")
        again = desk.cancel("--all", "--yes")
        assert (again.returncode, again.stdout) == (0, "")
        assert "no run of yours lives" in again.stderr
    finally:
        user.run(["scancel", own_other])
        other_user.run(["scancel", named_alike])


def test_a_silent_controller_lets_nothing_be_cancelled_by_all(desk: Desk) -> None:
    run = desk.launch(TRAIN_LONG, LATER)
    with test_cluster.silent_controller():
        done = desk.cancel("--all", "--yes")
    assert done.returncode == 75
    assert "which runs live is not known" in done.stderr
    assert run.state("runtime") == "PENDING"
    assert desk.cancel(run.directory).returncode == 0


def test_each_run_after_its_next_checkpoint(desk: Desk) -> None:
    """One that goes on and saves, one that ends by itself meanwhile, one that is pending."""
    saving = desk.launch(SAVES, *AS_VERL)
    ending = desk.launch(f"{ENDS} # may save in CHECKPOINT_DIR")
    pending = desk.launch(SAVES, *AS_VERL, LATER)
    for run in (saving, ending):
        run.wait_for_text("training", "trainer started", STARTED_S)
    directories = [run.directory for run in (saving, ending, pending)]
    with desk.started("--after-checkpoint", "--json", *directories) as process:
        pending.wait_over(seconds=SEEN_S)
        log = read_until(process, f"{saving.directory.name}: step 3 of 99, last checkpoint: none (SAVE_FREQ=5)")
        assert "Traceback" not in log
        desk.say(saving, "begin")
        saving.wait_for_text("training", "half of a checkpoint", SEEN_S)
        desk.say(ending, "end")
        ending.wait_over("training", seconds=SEEN_S)
        assert saving.state("training") == "RUNNING", "half a checkpoint is none"
        assert process.poll() is None
        desk.say(saving, "save")
        saving.wait_over(seconds=SEEN_S)
        out, _ = process.communicate(timeout=ENDED_S)
    assert process.returncode == 0
    runs = told(out)
    why = {name: run["after_checkpoint"] for name, run in runs.items()}
    assert [why[str(path)]["cause"] for path in directories] == ["checkpoint", "ended", "pending"]
    assert why[str(saving.directory)]["checkpoint"] == "step 5"
    assert runs[str(ending.directory)]["jobs"] == []
    assert all(job["ended"] for run in runs.values() for job in run["jobs"])
    assert (saving.directory / "checkpoints" / "exp" / "global_step_5" / "model.pt").is_file()
    assert saving.completion["ended"] == "cancelled"
    assert ending.completion["exit_code"] == 3
    ending.wait_over(seconds=ENDED_S)


def test_a_wait_for_a_checkpoint_that_does_not_come(desk: Desk) -> None:
    """Patience, Ctrl-C, and what can be known to save nothing: nothing is cancelled."""
    saving = desk.launch(SAVES, *AS_VERL)
    saving.wait_for_text("training", "trainer started", STARTED_S)
    late = desk.cancel("--after-checkpoint", "--patience", "2", saving.directory)
    assert late.returncode == 75, late.stderr
    assert "no new checkpoint within 2 s in " in late.stderr
    assert "it goes on, nothing of it was cancelled" in late.stderr
    with desk.started("--after-checkpoint", saving.directory) as process:
        read_until(process, "waiting for the next one")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"not cancelled, so it goes on: {saving.directory.name}" in err
    serving = desk.launch(TRAIN_LONG, options=("--runtime-only",))
    never = desk.launch(TRAIN_LONG, "TRAINING_COMMAND_IS_VERL=true", "SAVE_FREQ=-1")
    unknown = desk.launch(TRAIN_LONG)
    for run in (never, unknown):
        run.wait_for_text("training", "trainer started", STARTED_S)
    refused = desk.cancel("--after-checkpoint", *(run.directory for run in (never, unknown, saving, serving)))
    assert refused.returncode == 2, refused.stderr
    assert f"{never.directory.name} cannot be waited for: it never saves: SAVE_FREQ=-1" in refused.stderr
    assert f"{unknown.directory.name} cannot be waited for: its TRAINING_COMMAND has saved nothing" in refused.stderr
    assert f"{serving.directory.name} cannot be waited for: it is a runtime without a training" in refused.stderr
    assert "nothing was cancelled" in refused.stderr
    runs = (saving, never, unknown)
    assert [run.state("training") for run in runs] == ["RUNNING"] * 3
    assert serving.state("runtime") in {"PENDING", "RUNNING"}
    assert desk.cancel("--all", "--yes").returncode == 0
    assert all(run.is_over(kind) for run in (*runs, serving) for kind in run.jobs)


def test_the_rl_loop_is_cancelled_after_its_checkpoint(desk: Desk, user: OrdinaryUser) -> None:
    """As --config local runs it: its checkpoint is one file, and its metrics are none."""
    base = fresh_folder(user, "cancel_loop")
    loop = 'TRAINING_COMMAND="$SKYRL_PYTHON" -m shell_rl.train --steps 100000'
    with Place(desk.checkout, base, user, user.environment).lent() as here:
        run = here.start(loop)
        run.wait_for("Step 1/", 120)
        begin = time.monotonic()
        done = desk.cancel("--after-checkpoint", run.directory, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "  has saved after " in done.stdout
        assert run.wait(60) == 143
        step = json.loads((run.directory / "checkpoints" / "checkpoint.json").read_text())["step"]
        assert step > 0
        assert time.monotonic() - begin < 300


# --- a runtime on several nodes ---------------------------------------------------------------------------------------

# Two nodes of a runtime on each of the cluster's two hosts, two slots on each; the fifth waits. None of them is needed.
FIVE_NODES = ("RUNTIME_NODES=5", "RUNTIME_MIN_SLOTS=2", "CPUS_FOR_RUNTIME=60", "CPUS_PER_WORKER=30")


def test_workers_are_seen_and_end_with_their_run(desk: Desk, user: OrdinaryUser) -> None:
    """Those that run, one that was lost, and one that waits; ``--all`` means them too."""
    run = desk.launch(*FIVE_NODES, "RUNTIME_DRAIN_LEAD=100", WITH_SANDBOXES)
    array = json.loads(run.text("run.json"))["jobs"]["more_workers"]["id"]

    def verb(*words: str) -> CompletedProcess[str]:
        argv = [str(desk.checkout / "slurm" / "launch.py"), *words]
        return user.run(argv, {"SKYRL_JOBS_BASE": str(desk.base)}, timeout=60)

    def status() -> dict[str, Any]:
        return dict(json.loads(verb("status", "--json", f"{array}_1").stdout)["runs"][0])

    def joined() -> bool:
        return [node["state"] for node in (status()["nodes"] or {}).get("nodes", [])].count("ready") == 4

    until("its sandboxes", lambda: run.text("sandboxes.json"), STARTED_S)
    until("three workers", joined, STARTED_S, every_s=1)
    told = status()
    assert told["state"] == "running"
    stages = {worker["id"]: worker["stage"] for worker in told["workers"]}
    assert sorted(stages) == [f"{array}_{task}" for task in range(1, 5)]
    assert sorted(stages.values()) == ["pending", "running", "running", "running"]
    assert f"workers    {array}_[1-4], beyond what is needed: 3 of 4 run, 1 PENDING" in verb("status", array).stdout
    first, lost, *_ = sorted(job_id for job_id, stage in stages.items() if stage == "running")
    number = first.partition("_")[2]
    ids = {
        shown.partition(" ")[0] for shown in verb("logs", str(run.directory), "--worker", number).stdout.splitlines()
    }
    assert ids == {f"worker-{number}"}
    inside = verb("shell", str(run.directory), "--worker", number, "--", "printenv", "SLURMD_NODENAME")
    assert inside.returncode == 0, inside.stderr
    nodes = {node["job"]: node["name"] for node in told["nodes"]["nodes"]}
    assert nodes[first] == f"{inside.stdout.strip()}.{first}"
    assert verb("shell", str(run.directory), "s0", "--", "cat", "/w/health").stdout == "ok\n", "on whichever node"

    user.run(["scancel", lost])
    until("its end", lambda: stage_of(status(), lost) == "ended", SEEN_S, every_s=1)
    assert status()["state"] == "running", "a lost worker is no failed run"
    done = desk.cancel("--all", "--yes", "--json")
    assert done.returncode == 0, "all within 15 s, by its own clock: " + done.stderr
    (cancelled,) = json.loads(done.stdout)["runs"]
    assert {job["id"] for job in cancelled["jobs"]} == {*run.jobs.values(), *stages}
    assert all(job["ended"] for job in cancelled["jobs"])
    assert squeue(user, f"--user={user.name}") == "", "none is left, of those that waited either"
    report = verb("report", str(run.directory)).stdout
    assert re.search(r"\n  all nodes +\d+ +0 ", report), report


def stage_of(run: dict[str, Any], job_id: str) -> str:
    return str(next(worker["stage"] for worker in run["workers"] if worker["id"] == job_id))
