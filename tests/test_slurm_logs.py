"""``launch.py logs`` on a real Slurm: of runs that fail, go on, wait, restart, are local or given to sbatch."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser, fresh_folder, leaving_nothing
from tests.runs import Run, body_pid, killed_after, until
from tests.test_slurm_status import LATER, SMALL, Scene

pytestmark = [pytest.mark.slurm, pytest.mark.podman]

SEEN_WITHIN_S = 60.0
STEP = 'echo "Step 3/5: mean reward 0.1"'
FAILS = f"{STEP}; printf 'Traceback:\\n  here\\nValueError: the model is too large\\n' >&2; sleep 2; exit 7"
RESTARTED = """[ ! -e "$CHECKPOINT_DIR/saved" ] || { echo "Step 5/5"; exit 4; }
echo saved > "$CHECKPOINT_DIR/saved"; echo "Step 2/5"; sleep 600"""
LINE = re.compile(r"(runtime|training)( \d+)? *[|!](?: (.*))?")


@pytest.fixture
def scene(user: OrdinaryUser, checkout: Path) -> Iterator[Scene]:
    with leaving_nothing(user):
        made = Scene(user, checkout, fresh_folder(user, "logs"))
        try:
            yield made
        finally:
            made.call("cancel", *(str(run.directory) for run in made.runs.values()))


def begin(scene: Scene, trainer: str, *settings: str) -> Run:
    scene.begin("it", *SMALL, *settings, f"TRAINING_COMMAND={trainer}")
    return scene.runs["it"]


def shown(text: str, kind: str = "", attempt: str = "") -> list[str]:
    """The lines of a kind of job, of an attempt, without what stands before them."""
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [m[3] or "" for m in found if m and kind in {"", m[1]} and attempt in {"", (m[2] or "").strip()}]


def test_a_run_that_failed(scene: Scene, other_user: OrdinaryUser) -> None:
    run = begin(scene, FAILS)
    run.wait_over(seconds=90)
    done = scene.call("logs", str(run.directory))
    assert (done.returncode, done.stderr) == (0, "")
    for kind in ("runtime", "training"):
        lines = shown(done.stdout, kind)
        assert [line for line in lines if line in run.log(kind).splitlines()] == run.log(kind).splitlines(), (
            f"the .out of the {kind}"
        )
        assert set(run.log(kind, "err").splitlines()) <= set(lines)
    lines = done.stdout.splitlines()
    step, cause = (
        lines.index(f"training {line}")
        for line in ("| Step 3/5: mean reward 0.1", "! ValueError: the model is too large")
    )
    (end,) = [at for at, line in enumerate(lines) if "ends with exit code 7: the trainer failed" in line]
    assert lines[end].startswith("training ! "), "it is in the .err"
    assert step < end
    assert cause < end
    assert lines[cause - 2 : cause] == ["training ! Traceback:", "training !   here"]
    told = [
        json.loads(line) for line in scene.call("logs", "--json", "--training", run.jobs["runtime"]).stdout.splitlines()
    ]
    assert [line["text"] for line in told] == shown(done.stdout, "training")
    assert {(line["kind"], line["job"], line["attempt"]) for line in told} == {("training", run.jobs["training"], 1)}
    refused = scene.call("logs", str(run.directory), user=other_user)
    assert refused.returncode == 2
    assert f"cannot be read: it is {scene.user.name}'s" in refused.stderr


def test_a_run_is_followed_to_its_end(scene: Scene) -> None:
    run = begin(scene, f"{STEP}; while [ ! -e go ]; do sleep 0.2; done; echo gone; echo lost >&2; exit 5")
    follower = scene.start("logs", "-f", str(run.directory))
    try:
        assert follower.stdout
        seen = ""
        with killed_after(follower):
            while "Step 3/5" not in seen:
                line = follower.stdout.readline()
                assert line, "it has ended too early"
                seen += line
        assert follower.poll() is None
        assert scene.user.run(["touch", str(run.directory / "go")]).returncode == 0
        out, err = follower.communicate(timeout=120)
    finally:
        follower.kill()
    assert follower.returncode == 5, err
    lines = shown(seen + out)
    assert {"gone", "lost"} <= set(lines)
    whole = shown(scene.call("logs", str(run.directory)).stdout)
    assert not Counter(lines) - Counter(whole), "each line once"
    assert any("ends with exit code 5" in line for line in lines)
    assert ": failed" in err
    assert scene.call("logs", "--follow", "-n", "1", "--training", str(run.directory)).returncode == 5


def test_a_following_ends_by_ctrl_c_and_the_run_goes_on(scene: Scene) -> None:
    run = begin(scene, f"{STEP}; exec sleep 600")
    run.wait_for_text("training", "Step 3/5", 60)
    follower = scene.start("logs", "--follow", "--grep", "Step", str(run.directory))
    try:
        assert follower.stdout
        with killed_after(follower):
            assert "Step 3/5" in follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        out, err = follower.communicate(timeout=60)
    finally:
        follower.kill()
    assert (follower.returncode, out) == (130, ""), err
    assert run.state("training") == "RUNNING"
    assert shown(scene.call("logs", "--since", "1h", "-n", "1", "--grep", "Step", str(run.directory)).stdout)


def test_two_attempts(scene: Scene) -> None:
    run = begin(scene, RESTARTED, "RESTARTS=1")
    follower = scene.start("logs", "-f", str(run.directory))
    try:
        run.wait_for_text("training", "Step 2/5", 60)
        run.queued_attempt()
        scene.user.run(["kill", "-9", str(body_pid(run, "runtime"))])
        out, err = follower.communicate(timeout=180)
    finally:
        follower.kill()
    assert follower.returncode == 4, err
    assert "Step 2/5" in shown(out, "training", "1")
    assert "Step 5/5" in shown(out, "training", "2")
    whole = shown(scene.call("logs", str(run.directory)).stdout)
    assert not Counter(shown(out)) - Counter(whole), "each line once"
    assert any("ends with exit code 4" in line for line in shown(out, "training", "2"))
    assert whole.index("Step 2/5") < whole.index("Step 5/5")
    second = run.next_attempt().jobs["runtime"]
    assert any(f"runtime job {second} on " in line for line in shown(out, "runtime", "2"))


def test_a_run_in_the_queue(scene: Scene) -> None:
    run = begin(scene, STEP, f"CPU_SBATCH_ARGS={LATER}")
    why = (
        r"has no log yet: it is pending; training job \d+: PENDING \(Dependency\): .*; runtime job \d+: PENDING \(Begin"
    )

    def is_explained() -> bool:  # Slurm says why a moment after it took the jobs
        done = scene.call("logs", str(run.directory))
        assert (done.returncode, done.stdout) == (0, "")
        return bool(re.search(why, done.stderr))

    until("Slurm's reasons", is_explained, SEEN_WITHIN_S)
    follower = scene.start("logs", "-f", str(run.directory))
    try:
        assert follower.stderr
        with killed_after(follower):
            assert "has no log yet" in follower.stderr.readline()
            assert "pending" in follower.stderr.readline()
        assert scene.call("cancel", str(run.directory)).returncode == 0
        out, err = follower.communicate(timeout=SEEN_WITHIN_S)
    finally:
        follower.kill()
    assert (follower.returncode, out) == (143, ""), err
    assert "cancelled" in err


def test_jobs_given_to_sbatch(scene: Scene) -> None:
    """Their logs lie in their submitter's folder, one file for both streams, and have links in the run's directory."""
    jobs, said = scene.checkout / "slurm" / "jobs", ["--set", f"SKYRL_JOBS_BASE={scene.base}"]
    image = ["--set", "CONTAINER_IMAGE=localhost/skyrl-busybox:latest"]

    def submit(*argv: str) -> str:
        done = scene.user.run(["sbatch", "--parsable", *argv], cwd=scene.base)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    runtime = submit("--begin=now+3600", str(jobs / "runtime_server.py"), *said, *image)
    pending = scene.call("logs", runtime)
    assert (pending.returncode, pending.stdout) == (0, "")
    assert f"{runtime} has no log yet: it is pending; runtime job {runtime}: PENDING" in pending.stderr
    follower = scene.start("logs", "-f", runtime)
    try:
        scene.user.run(["scontrol", "update", f"JobId={runtime}", "StartTime=now"])
        until("its directory", lambda: list(scene.base.glob(f"*_{runtime}/runtime_ready.flag")), 90)
        (directory,) = scene.base.glob(f"*_{runtime}")
        words = ["--coord-dir", str(directory), "--set", "TRAINING_COMMAND=echo hello; echo from stderr >&2"]
        trained = submit("-p", "gpu_test", str(jobs / "verl_training.py"), *words)
        out, err = follower.communicate(timeout=120)
    finally:
        follower.kill()
    assert follower.returncode == 0, err
    assert (directory / f"training_{trained}.out").is_symlink()
    whole = shown(scene.call("logs", trained, "--training").stdout)
    file = (scene.base / f"slurm-{trained}.out").read_text().splitlines()
    assert {"hello", "from stderr"} <= set(file)
    for lines in (whole, shown(out, "training")):
        assert [line for line in lines if line in file] == file, "the file for both streams is shown once"
    assert any("API server ready at" in line for line in shown(out, "runtime"))


def test_a_local_run(scene: Scene) -> None:
    argv = [str(scene.checkout / "slurm" / "launch.py"), "--config", "local", "--set", f"SKYRL_JOBS_BASE={scene.base}"]
    argv += ["--set", f"TRAINING_COMMAND={STEP}; sleep 3; exit 3"]
    with scene.user.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
        assert launcher.stdout
        with killed_after(launcher):
            directory = Path(launcher.stdout.readline().rpartition(": ")[2].strip())
        done = scene.call("logs", "-f", directory.name, timeout=120)
        assert launcher.wait(60) == 3
    assert done.returncode == 3, done.stderr
    assert "Step 3/5: mean reward 0.1" in shown(done.stdout, "training")
    assert shown(done.stdout, "runtime")
    assert sorted(shown(scene.call("logs", "latest").stdout)) == sorted(shown(done.stdout))
