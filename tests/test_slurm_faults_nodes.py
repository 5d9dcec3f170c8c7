"""Faults of nodes and between users: what is missing on a node, what a dead job left there, who else works on it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import cluster as test_cluster
from tests import faults, lying_image
from tests.conftest import NothingLeft, OrdinaryUser, leaving_nothing
from tests.faults import Case, released, runtime_processes, within
from tests.runs import (
    Run,
    answers,
    body_pid,
    faulty,
    launch,
    launch_argv,
    own_environment,
    parse_report,
    until,
    with_sandboxes,
)

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.faults]

ON_A, ON_B = "CPU_SBATCH_ARGS=--nodelist=cpu-a", "CPU_SBATCH_ARGS=--nodelist=cpu-b"
NO_GPU = "GPUS_PER_NODE=0"
TRAIN_LONG = "TRAINING_COMMAND=echo trainer started; exec sleep 300"
PODMAN = Path("/usr/bin/podman")
PORT = 23460


@pytest.fixture(autouse=True)
def clean(nothing_left: NothingLeft) -> None:
    """Every test here ends with nothing left on any node."""


# --- 3: the runtime job cannot start ----------------------------------------------------------------------------------


@contextlib.contextmanager
def taken_port() -> Iterator[None]:
    """Somebody else listens on PORT of cpu-a."""
    pid = test_cluster.slurmd_pid("cpu-a")
    argv = ["nsenter", f"--target={pid}", "--net", "busybox", "httpd", "-f", "-p", str(PORT), "-h", "/usr/share"]
    with subprocess.Popen(argv) as process:
        try:
            until("the port", lambda: (PORT, 0) in test_cluster.listeners("cpu-a"), 10)
            yield
        finally:
            process.kill()


def full_disk() -> contextlib.AbstractContextManager[None]:
    tmpfs = ("-t", "tmpfs", "-o", "size=200m,mode=1777", "tmpfs")
    return test_cluster.mounted("cpu-a", test_cluster.LOCAL_DISK, *tmpfs)


LARGE_IMAGE, ARCHIVE = "localhost/large:latest", test_cluster.SHARE / "large.tar"


@contextlib.contextmanager
def disk_for_less_than_the_image() -> Iterator[None]:
    """The disk has what is asked for at the start; the image, once unpacked, is larger."""
    lying_image.write_large(ARCHIVE, LARGE_IMAGE, 280)
    try:
        tmpfs = ("-t", "tmpfs", "-o", "size=270m,mode=1777", "tmpfs")
        with test_cluster.mounted("cpu-a", test_cluster.LOCAL_DISK, *tmpfs):
            yield
    finally:
        ARCHIVE.unlink()


CANNOT_START: dict[Case, tuple[Callable[[], contextlib.AbstractContextManager[None]], tuple[str, ...]]] = {
    faults.NO_PODMAN: (lambda: test_cluster.hide("cpu-a", PODMAN), ()),
    faults.NO_SUBUIDS: (lambda: test_cluster.hide("cpu-a", Path("/etc/subuid")), ()),
    faults.FULL_DISK: (full_disk, (f"LOCAL_SCRATCH={test_cluster.LOCAL_DISK}",)),
    faults.NO_PORT: (taken_port, (f"RUNTIME_PORT_RANGE={PORT}-{PORT}",)),
    faults.NO_SANDBOX_PORT: (taken_port, (f"SANDBOX_PORT_RANGE={PORT}-{PORT}",)),
    faults.DISK_FILLS: (
        disk_for_less_than_the_image,
        (f"LOCAL_SCRATCH={test_cluster.LOCAL_DISK}", f"CONTAINER_IMAGE={LARGE_IMAGE}", f"IMAGE_ARCHIVE={ARCHIVE}"),
    ),
    faults.NO_IMAGE: (contextlib.nullcontext, ("CONTAINER_IMAGE=localhost/nonesuch",)),
}


@pytest.mark.parametrize("case", CANNOT_START, ids=lambda case: case.fault)
def test_a_runtime_that_cannot_start_ends_the_training_with_its_reason(
    user: OrdinaryUser, checkout: Path, jobs_base: Path, nothing_left: NothingLeft, case: Case
) -> None:
    fault, settings = CANNOT_START[case]
    with fault():
        run = launch(user, checkout, jobs_base, TRAIN_LONG, ON_A, NO_GPU, *settings, options=("--no-check",))
        until("the runtime's end", lambda: run.is_over("runtime"), 60)
        released(run, nothing_left, case)
    assert "trainer started" not in run.log("training")
    assert run.exit_code("runtime") == "71"


# --- 19: what a dead job left -----------------------------------------------------------------------------------------


def engine(user: OrdinaryUser, run: Run) -> list[int]:
    """The guardian, the Podman service, the API server and the body of a runtime job, in this order."""
    words = ("slurm.lib.guardian", "podman system service", "slurm_runtime.api_server")
    return [*(pid for word in words for pid in runtime_processes(user, run, word)), body_pid(run, "runtime")]


def test_sandboxes_of_a_dead_job_are_removed_and_a_living_ones_answer(
    user: OrdinaryUser, checkout: Path, jobs_base: Path
) -> None:
    dead, its_sandboxes = with_sandboxes(user, checkout, jobs_base / "dead", ON_A, NO_GPU)
    living, other_sandboxes = with_sandboxes(user, checkout, jobs_base / "living", ON_A, NO_GPU)
    for pid in engine(user, dead):
        os.kill(pid, signal.SIGKILL)
    dead.wait_over(seconds=40)
    storage = Path(f"/tmp/skyrl-{user.uid}-{dead.jobs['runtime']}")
    assert storage.is_dir(), "nobody was left to remove it"
    assert all(map(answers, [*its_sandboxes, *other_sandboxes])), "nobody was left to stop them"
    following = launch(user, checkout, jobs_base / "next", "TRAINING_COMMAND=true", ON_A, NO_GPU)
    begin = time.monotonic()
    while storage.exists() or any(map(answers, its_sandboxes)):
        assert time.monotonic() - begin < faults.DEAD_JOB.bound_s
        assert all(map(answers, other_sandboxes))
        time.sleep(0.1)
    within(faults.DEAD_JOB, time.monotonic() - begin)
    following.wait_over(seconds=60)
    assert following.completion["exit_code"] == 0
    assert f"{faults.DEAD_JOB.reads}: {storage}" in following.log("runtime")
    assert all(map(answers, other_sandboxes))
    assert not living.is_over("runtime")
    user.run(["scancel", *living.jobs.values()])
    living.wait_over(seconds=20)


# --- 13: many runs, and another user ----------------------------------------------------------------------------------

LAUNCHES = 20
# What somebody on the node of a run tries: argument → "done", or what refused it.
INTRUSION = """
import json, socket, sys, urllib.error, urllib.request
from pathlib import Path
goals = json.loads(sys.argv[1])
def tried(act, *arguments):
    try:
        act(*arguments)
        return "done"
    except urllib.error.HTTPError as refusal:
        return str(refusal.code)
    except OSError as problem:
        return problem.strerror or str(problem)
def call(path, data=None):
    headers = {"X-API-Key": goals["key"], "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(goals["url"] + path, data, headers), timeout=10).read()
def connect(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
said = {"list " + path: tried(lambda: list(Path(path).iterdir())) for path in goals["folders"]}
said.update({"read " + path: tried(Path(path).read_bytes) for path in goals["files"]})
said["connect"] = tried(connect, goals["socket"])
for path in ("/list", "/sessions/s0", "/metrics"):
    said["GET " + path] = tried(call, path)
stop = json.dumps({"runtime_id": goals["runtime_id"]}).encode()
said["POST /stop"] = tried(call, "/stop", stop)
print(json.dumps(said))
"""


def test_many_launches_at_once(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    argv = launch_argv(
        checkout, f"SKYRL_JOBS_BASE={jobs_base}", NO_GPU, "TRAINING_COMMAND=echo ${ALLHANDS_API_KEY:0:8}"
    )
    launcher = " ".join(f"'{word}'" for word in argv)
    begin = time.monotonic()
    script = f"for n in $(seq {LAUNCHES}); do {launcher} > report.$n & done; wait"
    done = user.run(["bash", "-c", script], cwd=jobs_base, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = [parse_report(user, path.read_text()) for path in jobs_base.glob("report.*")]
    for run in runs:
        run.wait_over(seconds=120)
    within(faults.MANY_LAUNCHES, time.monotonic() - begin)
    for run in runs:
        assert run.completion["exit_code"] == 0, run.completion
        assert run.completion["job_id"] == run.jobs["training"]
        assert run.text("runtime_api_key.txt")[:8] in run.log("training")
    assert len({job for run in runs for job in run.jobs.values()}) == 2 * LAUNCHES
    assert len({run.text("runtime_api_key.txt") for run in runs}) == LAUNCHES


def test_another_user_on_the_node_gets_at_nothing(
    user: OrdinaryUser, other_user: OrdinaryUser, checkout: Path, jobs_base: Path
) -> None:
    """Each of two users tries the other's run, whose sandboxes then still answer, and its own."""
    theirs = other_user.home / "jobs"
    shutil.rmtree(theirs, ignore_errors=True)
    with leaving_nothing(other_user):
        run, sandboxes = with_sandboxes(user, checkout, jobs_base, ON_A, NO_GPU)
        other, other_sandboxes = with_sandboxes(other_user, checkout, theirs, ON_A, NO_GPU)
        mine, its = goals_in(user, run), goals_in(other_user, other)
        for intruder, own, goals, folder in ((other_user, its, mine, theirs), (user, mine, its, jobs_base)):
            refused = attempt(intruder, {**goals, "key": own["key"]}, folder)
            by_http = {word for word in refused if word.startswith(("GET ", "POST "))}
            assert refused == {word: "401" if word in by_http else "Permission denied" for word in refused}
            assert len(refused) == tries(goals)
        assert all(map(answers, [*sandboxes, *other_sandboxes]))
        for owner, goals, folder in ((user, mine, jobs_base), (other_user, its, theirs)):
            allowed = attempt(owner, goals, folder)
            assert set(allowed.values()) == {"done"}, allowed
            assert len(allowed) == tries(goals)
        within(faults.OTHER_USER, 0.0)
        for whose, its_run in ((user, run), (other_user, other)):
            whose.run(["scancel", *its_run.jobs.values()])
            its_run.wait_over(seconds=30)


def tries(goals: Mapping[str, Any]) -> int:
    """How many things are tried: each folder and file, the socket, and the API in four ways."""
    return len(goals["folders"]) + len(goals["files"]) + 1 + 4


def goals_in(user: OrdinaryUser, run: Run) -> dict[str, Any]:
    """What there is of a run that somebody else might want."""
    storage = Path(f"/tmp/skyrl-{user.uid}-{run.jobs['runtime']}")
    environments = [f"/proc/{pid}/environ" for pid in engine(user, run)]
    return {
        "folders": [str(run.directory), str(run.directory / "code"), str(storage), str(storage / "data")],
        "files": [str(run.directory / "runtime_api_key.txt"), str(storage / "api_key"), *environments],
        "socket": str(storage / "podman.sock"),
        "url": run.text("runtime_url.txt").strip(),
        "key": run.text("runtime_api_key.txt").strip(),
        "runtime_id": json.loads(run.text("sandboxes.json"))[0]["runtime_id"],
    }


def attempt(user: OrdinaryUser, goals: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Try everything in a job of a user on cpu-a."""
    script, out = folder / "try.py", folder / "try.out"
    user.run(["bash", "-c", f"mkdir -p '{folder}' && cat > '{script}' <<'END'\n{INTRUSION}\nEND"])
    words = f"python3 '{script}' {shlex.quote(json.dumps(goals))}"
    done = user.run(
        ["sbatch", "-W", "--mem=100M", "--nodelist=cpu-a", f"--output={out}", f"--wrap={words}"], cwd=folder
    )
    assert done.returncode == 0, out.read_text()
    return dict(json.loads(out.read_text()))


# --- 15: the home -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_home(user: OrdinaryUser) -> Iterator[None]:
    """The user's home is a disk without a free byte, the same on the login host and on every node."""
    disk = test_cluster.SHARE / "home"
    disk.mkdir()
    with contextlib.ExitStack() as undo:
        undo.callback(disk.rmdir)
        tmpfs = ("-t", "tmpfs", "-o", f"size=64k,uid={user.uid},mode=755", "tmpfs")
        undo.enter_context(test_cluster.mounted_here(disk, *tmpfs))
        (disk / ".bashrc").write_text("# of the user\n")
        with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        undo.enter_context(test_cluster.mounted_here(user.home, "--bind", str(disk)))
        for node in test_cluster.NODES:
            undo.enter_context(test_cluster.mounted(node, user.home, "--bind", str(disk)))
        refused = user.run(["bash", "-c", "echo x > probe; code=$?; rm -f probe; exit $code"])
        assert "No space left" in refused.stderr
        yield


@contextlib.contextmanager
def squashed_home(user: OrdinaryUser) -> Iterator[Path]:
    """The user's home is on a server to which root is nobody, on the login host and on every node; yields its disk.

    An imitation of NFS with root squash: our FUSE file system refuses root.
    """
    disk, home = test_cluster.SHARE / "exported", test_cluster.SHARE / "home"
    with contextlib.ExitStack() as undo:
        for folder in (disk, home):
            folder.mkdir(mode=0o700)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        os.chown(disk, user.uid, user.gid)
        (disk / ".bashrc").write_text("# of the user\n")
        undo.enter_context(faulty("", home, disk, root_squash=True))  # below SHARE: seen on every node
        undo.enter_context(test_cluster.mounted_here(user.home, "--bind", str(home)))
        for node in test_cluster.NODES:
            undo.enter_context(test_cluster.mounted(node, user.home, "--bind", str(home)))
            with pytest.raises(test_cluster.ClusterError, match="Permission denied"):
                test_cluster.on_node(node, "cat", str(user.home / ".bashrc"))
        assert user.run(["cat", str(user.home / ".bashrc")]).stdout == "# of the user\n"
        yield disk


def listed(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below a folder: its size, mode and time of change."""
    found = {str(path): path.lstat() for path in [folder, *folder.rglob("*")]}
    return {path: (status.st_size, status.st_mode, status.st_mtime_ns) for path, status in found.items()}


@pytest.fixture
def elsewhere(user: OrdinaryUser, checkout: Path) -> Iterator[Path]:
    """A folder of the user's outside of the home, shared by all nodes, with a copy of the checkout in it."""
    folder = test_cluster.SHARE / "work"
    folder.mkdir()
    try:
        subprocess.run(["cp", "-a", str(checkout), str(folder / "SkyRL")], check=True)
        os.chown(folder, user.uid, user.gid)
        yield folder
    finally:
        shutil.rmtree(folder)


TRAINS = 'TRAINING_COMMAND="$SKYRL_PYTHON" -m shell_rl.train --sandboxes 2 --steps 2 || test $? = 3'


def test_a_run_writes_nothing_to_a_full_home(user: OrdinaryUser, elsewhere: Path) -> None:
    with full_home(user):
        before = listed(user.home)
        run = launch(user, elsewhere / "SkyRL", elsewhere / "jobs", TRAINS, NO_GPU, cwd=elsewhere)
        run.wait_over(seconds=120)
        assert run.completion["exit_code"] == 0, run.log("training")
        assert list(run.directory.rglob("summary.json"))
        assert listed(user.home) == before
        within(faults.HOME_FULL, 0.0)


def launched_from(user: OrdinaryUser, folder: Path, *settings: str) -> Run:
    """Launch a run from the checkout in a folder that root, which starts the user's shell, may not enter."""
    argv = launch_argv(folder / "SkyRL", TRAINS, NO_GPU, *settings)
    done = user.run(["bash", "-c", 'cd "$0" && exec "$@"', str(folder / "SkyRL"), *argv], cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    return parse_report(user, done.stdout)


def furnished(user: OrdinaryUser, disk: Path, checkout: Path) -> None:
    """Put a checkout and its environment into a home, with the byte code that a first launch leaves."""
    copy = disk / "SkyRL"
    subprocess.run(["cp", "-a", str(checkout), str(copy)], check=True)
    (copy / ".venv").unlink()
    python = own_environment(copy / ".venv")
    done = user.run([str(python), "-m", "compileall", "-q", str(copy / "slurm"), str(copy / "slurm_runtime")])
    assert done.returncode == 0, done.stderr


def test_runs_with_a_home_that_root_cannot_read(user: OrdinaryUser, elsewhere: Path) -> None:
    with squashed_home(user) as disk:
        furnished(user, disk, elsewhere / "SkyRL")
        before = listed(disk)
        # SKYRL_JOBS_BASE of the first is the default, ~/.skyrl_jobs.
        inside = launched_from(user, user.home, ON_A)
        outside = launched_from(user, elsewhere, ON_B, f"SKYRL_JOBS_BASE={elsewhere}/jobs")
        assert inside.directory.parent == user.home / ".skyrl_jobs"
        on_disk = replace(inside, directory=disk / inside.directory.relative_to(user.home))
        for run in (on_disk, outside):
            run.wait_over(seconds=180)
            assert run.completion["exit_code"] == 0, run.log("training")
            assert list(run.directory.rglob("summary.json"))
        assert f"{user.home}/SkyRL/.venv" in on_disk.text("run.json")
        changed = {path for path, _ in before.items() ^ listed(disk).items()} - {str(disk)}
        assert {Path(path).relative_to(disk).parts[0] for path in changed} == {".skyrl_jobs"}
        within(faults.HOME_SQUASHED, 0.0)
