"""``launch.py clean`` on a real Slurm, among runs that live, have ended, and are another user's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests.conftest import NothingLeft, OrdinaryUser
from tests.runs import Run, cancelled, killed_after, launch, until

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

NO_GPU = ("GPUS_PER_NODE=0", "CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G")
LATER = "--begin=now+3600"
TRAIN_LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 600"
SAVES_AND_ENDS = (
    'TRAINING_COMMAND=mkdir -p "$CHECKPOINT_DIR/e/global_step_1"; echo w > "$CHECKPOINT_DIR/e/global_step_1/w"'
)
STARTED_S, ENDED_S = 90.0, 60.0


@pytest.fixture(autouse=True)
def clean_nodes(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


class Desk:
    """A person with a checkout and a jobs base."""

    def __init__(self, user: OrdinaryUser, checkout: Path, base: Path) -> None:
        self.user, self.checkout, self.base = user, checkout, base

    def launch(self, *settings: str, options: tuple[str, ...] = (), **environment: str) -> Run:
        return launch(self.user, self.checkout, self.base, *NO_GPU, *settings, options=options, env=environment)

    @contextlib.contextmanager
    def local(self, command: str) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
        """A local run in the same jobs base, its directory and its launcher, which ends with the block."""
        argv = [str(self.checkout / "slurm" / "launch.py"), "--config", "local"]
        argv += ["--set", f"SKYRL_JOBS_BASE={self.base}", "--set", command]
        with self.user.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
            try:
                assert launcher.stdout
                with killed_after(launcher):
                    line = launcher.stdout.readline()
                yield Path(line.rpartition(": ")[2].strip()), launcher
            finally:
                launcher.terminate()

    def call(self, *words: object, user: OrdinaryUser | None = None) -> CompletedProcess[str]:
        argv = [str(self.checkout / "slurm" / "launch.py"), *map(str, words)]
        return (user or self.user).run(argv, {"SKYRL_JOBS_BASE": str(self.base)}, timeout=90)

    def clean(self, *words: str, code: int = 0, age: str = "0s") -> dict[str, dict[str, Any]]:
        """What ``clean --json`` says of each directory."""
        done = self.call("clean", "--older-than", age, "--json", *words)
        assert done.returncode == code, done.stderr
        said = json.loads(done.stdout)
        return {one["directory"]: one for one in (*said["removed"], *said["kept"])}

    def is_settled(self, run: Run) -> bool:
        """Whether nothing of a run can live any more, as clean sees it."""
        return "kept_as" not in self.clean("--dry-run")[str(run.directory)]


def test_among_runs_that_live_and_runs_that_have_ended(
    user: OrdinaryUser, other_user: OrdinaryUser, checkout: Path, jobs_base: Path
) -> None:
    desk = Desk(user, checkout, jobs_base)
    over, saved = desk.launch("TRAINING_COMMAND=exit 7"), desk.launch(SAVES_AND_ENDS)
    pending = desk.launch(TRAIN_LONG, f"CPU_SBATCH_ARGS={LATER}")
    withdrawn = desk.launch(TRAIN_LONG, f"CPU_SBATCH_ARGS={LATER}")
    assert desk.call("cancel", withdrawn.directory).returncode == 0
    over.wait_over(seconds=STARTED_S)
    saved.wait_over(seconds=STARTED_S)
    running = desk.launch(TRAIN_LONG)
    running.wait_for_text("training", "trainer started", STARTED_S)
    of_another = jobs_base / "20260101_000000_987654"
    shutil.copytree(over.directory, of_another)
    os.chown(of_another, other_user.uid, other_user.gid)
    with desk.local("TRAINING_COMMAND=true") as (local_over, launcher):
        assert launcher.wait(STARTED_S) == 0
    with desk.local(TRAIN_LONG) as (local, launcher):
        until("its start", lambda: "trainer started" in _logs(local), STARTED_S)
        for run in (over, withdrawn):
            until(f"the end of {run.directory}", lambda run=run: desk.is_settled(run), ENDED_S)  # type: ignore[misc]

        young = desk.clean("--yes", age="7d")
        lives = {str(path) for path in (pending.directory, running.directory, local)}
        ended = {str(path) for path in (over.directory, saved.directory, withdrawn.directory, local_over)}
        assert {directory: one.get("kept_as") for directory, one in young.items()} == {
            **dict.fromkeys(lives, "lives"),
            **dict.fromkeys(ended, "young"),
        }
        dry = desk.clean("--dry-run")
        done = desk.clean("--yes")
        assert dry.keys() == done.keys()
        kept = {directory: one.get("kept_as") for directory, one in done.items()}
        assert kept == {
            **{str(path): None for path in (over.directory, withdrawn.directory, local_over)},
            **dict.fromkeys(lives, "lives"),
            str(saved.directory): "checkpoint",
        }
        there = {path for path in jobs_base.iterdir() if path.name.startswith("2")}
        assert there == {*map(Path, (name for name, why in kept.items() if why)), of_another}
        assert done[str(over.directory)]["bytes"] > 100_000, "the code's copy alone is more"
        assert (saved.directory / "checkpoints" / "e" / "global_step_1" / "w").read_text() == "w\n"
        assert not [path for path in jobs_base.iterdir() if path.name.startswith(".discarded")]

        assert running.state("training") == "RUNNING"
        cancelled(lambda: desk.call("cancel", local))
        assert launcher.wait(60) == 143
        cancelled(lambda: desk.call("cancel", running.directory, pending.directory))
    until("their end", lambda: all(desk.is_settled(run) for run in (running, pending)), ENDED_S)
    assert desk.call("clean", "--older-than", "0s", "--yes").returncode == 0
    assert {path for path in jobs_base.iterdir() if path.name.startswith("2")} == {saved.directory, of_another}


def _logs(directory: Path) -> str:
    return "".join(path.read_text() for path in directory.glob("training_*.out"))


def test_a_training_that_joins_keeps_the_directory(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    """Its runtime has ended; a training that joined after that is in the queue."""
    desk = Desk(user, checkout, jobs_base)
    serving = desk.launch(TRAIN_LONG, options=("--runtime-only",))
    serving.wait_for_text("runtime", "API server ready", STARTED_S)
    cancelled(lambda: desk.call("cancel", serving.directory))
    until("its end", lambda: desk.is_settled(serving), ENDED_S)
    joins = {"SKYRL_COORD_DIR": str(serving.directory)}
    joined = desk.launch(TRAIN_LONG, f"GPU_SBATCH_ARGS={LATER}", options=("--skip-runtime", "--no-check"), **joins)
    assert joined.directory == serving.directory
    assert joined.state("training") == "PENDING"
    kept = desk.clean("--yes")[str(serving.directory)]
    assert (kept["kept_as"], kept["why"]) == ("lives", f"its training job {joined.jobs['training']} is pending")
    assert (serving.directory / "run.json").is_file()
    user.run(["scancel", joined.jobs["training"]])
    joined.wait_over("training", seconds=ENDED_S)
    until("its end", lambda: desk.is_settled(joined), ENDED_S)
    desk.clean("--yes")
    assert not serving.directory.exists()


def test_a_silent_controller_and_a_base_that_cannot_be_written(
    user: OrdinaryUser, checkout: Path, jobs_base: Path
) -> None:
    desk = Desk(user, checkout, jobs_base)
    pending = desk.launch(TRAIN_LONG, f"CPU_SBATCH_ARGS={LATER}")
    over = desk.launch(TRAIN_LONG, f"CPU_SBATCH_ARGS={LATER}")
    assert desk.call("cancel", over.directory).returncode == 0
    with test_cluster.silent_controller():
        kept = desk.clean("--yes", code=75)
    assert {one["kept_as"] for one in kept.values()} == {"unknown"}
    until("its end", lambda: desk.is_settled(over), ENDED_S)
    jobs_base.chmod(0o555)
    try:
        kept = desk.clean("--yes", code=71)
        assert kept[str(over.directory)]["kept_as"] == "failed"
        assert f"{over.directory}: Permission denied" in kept[str(over.directory)]["why"]
    finally:
        jobs_base.chmod(0o755)
    assert (over.directory / "run.json").is_file()
    assert desk.call("cancel", pending.directory).returncode == 0
