"""Runs of ``--config local``, with real Podman: as an ordinary user and as root, to every kind of end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.lib.observe.sandbox_statistics import read_statistics
from slurm.lib.observe.usage import efficiency, read_usage
from tests import faults
from tests.conftest import CHECKOUT, OrdinaryUser
from tests.faults import within
from tests.local_runs import Local, Place
from tests.runs import killed_after, until

pytestmark = pytest.mark.podman


@pytest.fixture(params=["ordinary user", "root"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An ordinary user's checkout, or ours as whoever runs the tests."""
    if request.param == "root":
        environment = {name: os.environ[name] for name in ("PATH", "HOME")}
        made = Place(CHECKOUT, tmp_path, None, environment)
    else:
        user: OrdinaryUser = request.getfixturevalue("user")
        base: Path = request.getfixturevalue("jobs_base")
        environment = {name: value for name, value in user.environment.items() if not name.startswith("SLURM")}
        made = Place(request.getfixturevalue("checkout"), base, user, environment)
    with made.lent():
        yield made


one_user = pytest.mark.parametrize("place", ["ordinary user"], indirect=True)
LONG = "TRAINING_COMMAND=echo trainer has started; exec sleep 300"


def running(place: Place) -> Local:
    """A run whose trainer has started and goes on."""
    run = place.start(LONG)
    run.wait_for("training | trainer has started")
    left = place.leftovers()  # the check for what is left sees what there is now
    for kind in ("sleep 300", "podman system service", "slurm_runtime.api_server", "/tmp/", "podman.sock"):
        assert any(kind in found for found in left), (kind, left)
    return run


def test_the_rl_loop_in_real_sandboxes(place: Place) -> None:
    loop = '"$SKYRL_PYTHON" -m shell_rl.train --steps 2 --rollouts 4 --sandboxes 2'
    run = place.start(f"TRAINING_COMMAND={loop}; code=$?; [ $code = 3 ] && exit 0; exit $code")
    assert run.wait(120) == 0, run.stderr  # 3: two steps are too few to learn, which is not asked here
    summary = json.loads((run.directory / "checkpoints" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["commands_run"] > 400
    assert summary["untrained_reward"] > 0
    metrics = (run.directory / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 2
    assert (run.directory / "checkpoints" / "reward.png").read_bytes().startswith(b"\x89PNG")
    for kind in ("training", "runtime"):
        (path,) = run.directory.glob(f"usage_{kind}_local*.jsonl")
        used = efficiency(read_usage(path.read_text()))
        assert used.cpu_share and used.memory_peak_bytes, path.read_text()
    (path,) = run.directory.glob("sandbox_statistics_local*.json")
    counted = read_statistics(path.read_text())
    assert counted and counted.starts.succeeded >= 2 and counted.peak_living >= 1


def test_streams_files_and_the_trainers_exit_code(place: Place) -> None:
    run = place.start("TRAINING_COMMAND=echo to stdout; echo to stderr >&2; exit 7")
    assert run.wait() == 7, run.stderr
    directory = run.directory
    stamp, _, job_id = directory.name.rpartition("_")
    assert re.fullmatch(r"\d{8}_\d{6}", stamp)
    assert job_id == f"local{run.process.pid}.0"
    training = f"local{run.process.pid}.1"
    lines = run.stderr.splitlines()
    assert "training | to stdout" in lines
    assert "training | to stderr" in lines
    assert all(line.startswith((" runtime | ", "training | ")) for line in lines), run.stderr
    assert "\x1b" not in run.stderr
    jobs = (f"runtime_{job_id}", f"training_{training}")
    logs = {f"{job}.{suffix}" for job in jobs for suffix in ("out", "err")}
    names = {path.name for path in directory.iterdir()}
    expected = {"runtime_url.txt", "runtime_api_key.txt", "runtime_ready.flag", "training_complete.flag", "run.json"}
    assert names >= logs | expected | {"local.conf", "code", "training.env"}
    assert "to stderr" in (directory / f"training_{training}.err").read_text()
    assert "to stdout" not in (directory / f"training_{training}.err").read_text()
    assert run.completion()["exit_code"] == 7
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for name in ("runtime_api_key.txt", "training.env"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600
    record = json.loads((directory / "run.json").read_text())
    assert {kind: job["id"] for kind, job in record["jobs"].items()} == {"runtime": job_id, "training": training}


def test_the_trainer_has_a_folder_of_its_own_on_the_node(place: Place) -> None:
    """Used by the trainer, named in the log with its reason, and gone with the job."""
    run = place.start('TRAINING_COMMAND=mkdir "$RAY_TMPDIR/ray" && echo "folder=$RAY_TMPDIR $no_proxy $FI_PROVIDER."')
    assert run.wait() == 0, run.stderr
    found = re.search(r"folder=(/\S*/skyray-\d+-[\w.]+t) \S+ \.$", run.stderr, re.MULTILINE)
    assert found, run.stderr
    assert f"RAY_TMPDIR={found[1]}  # Ray's folder: " in run.stderr
    assert not Path(found[1]).exists()
    place.assert_nothing_left()


def test_ctrl_c_stops_both(place: Place) -> None:
    run = running(place)
    run.process.send_signal(signal.SIGINT)
    assert run.wait(20) == 143
    assert "stopping the training job; press Ctrl-C again to force" in run.stderr
    assert "ended by SIGTERM" in str(run.completion()["reason"])
    assert "Traceback" not in run.stderr


@one_user
def test_ctrl_c_on_a_terminal(place: Place) -> None:
    """The terminal signals the launcher's whole process group; the jobs are in sessions of their own."""
    main, terminal = pty.openpty()
    run = place.start(LONG, terminal=terminal)
    os.close(terminal)
    with contextlib.closing(os.fdopen(main, "r+b", buffering=0)) as screen:
        seen = read_until(screen.fileno(), b"trainer has started")
        screen.write(b"\x03")
        seen += read_until(screen.fileno(), b"runtime job local")
        assert run.wait(20) == 143
    assert b"\x1b[35mtraining | \x1b[0m" in seen


def read_until(descriptor: int, text: bytes, seconds: float = 30) -> bytes:
    """What a terminal shows until ``text`` does."""
    seen = b""
    end = time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, seen
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            seen += os.read(descriptor, 65536)
    return seen


@pytest.mark.faults
@one_user
def test_a_terminal_that_is_closed(place: Place) -> None:
    """SIGHUP, and nobody to read what is written from now on."""
    main, terminal = pty.openpty()
    run = place.start(LONG, terminal=terminal)
    os.close(terminal)
    read_until(main, b"trainer has started")
    os.close(main)
    begin = time.monotonic()
    assert run.wait(20) == 143
    place.assert_nothing_left()
    within(faults.TERMINAL_CLOSED, time.monotonic() - begin)
    flags = [json.loads(path.read_text()) for path in place.base.glob("2*/training_complete.flag")]
    assert [flag["exit_code"] for flag in flags] == [143]


@one_user
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_both(place: Place, number: signal.Signals) -> None:
    run = running(place)
    run.process.send_signal(number)
    assert run.wait(20) == 143
    assert run.completion()["exit_code"] == 143


@pytest.mark.faults
def test_a_killed_launcher_leaves_nothing(place: Place) -> None:
    run = running(place)
    directory = run.directory
    run.process.kill()
    run.process.wait()
    within(faults.LAUNCHER_KILLED, place.assert_nothing_left())
    assert (directory / "training_complete.flag").exists()


@pytest.mark.faults
@one_user
def test_a_launcher_killed_while_the_runtime_starts_leaves_nothing(place: Place) -> None:
    run = place.start(LONG)
    run.wait_for(" runtime | ")
    run.process.kill()
    run.process.wait()
    within(faults.LAUNCHER_KILLED_EARLY, place.assert_nothing_left())


@one_user
def test_a_second_ctrl_c_forces(place: Place) -> None:
    run = place.start(
        "TRAINING_COMMAND=trap '' TERM; echo trainer has started; for i in $(seq 3000); do sleep 0.1; done"
    )
    run.wait_for("training | trainer has started")
    run.process.send_signal(signal.SIGINT)
    run.wait_for("press Ctrl-C again to force")
    run.process.send_signal(signal.SIGINT)
    assert run.wait(10) != 0
    assert "Traceback" not in run.stderr


@one_user
def test_two_at_once(place: Place) -> None:
    runs = [place.start("TRAINING_COMMAND=echo mine $ALLHANDS_API_KEY; sleep 3; exit 5") for _ in range(2)]
    assert [run.wait() for run in runs] == [5, 5]
    assert len({run.directory for run in runs}) == 2
    for name in ("runtime_url.txt", "runtime_api_key.txt"):
        assert len({(run.directory / name).read_text() for run in runs}) == 2
    for run in runs:
        key = (run.directory / "runtime_api_key.txt").read_text().strip()
        assert f"training | mine {key}" in run.stderr


@one_user
def test_a_runtime_that_cannot_start(place: Place) -> None:
    run = place.start("IMAGE_ARCHIVE=/nowhere/image.tar", LONG, options=("--no-check=images",))
    assert run.wait(30) == 69
    assert "IMAGE_ARCHIVE=/nowhere/image.tar is not a file" in run.stderr
    assert "Traceback" not in run.stderr


@one_user
def test_a_runtime_that_dies(place: Place) -> None:
    run = running(place)
    line = (run.directory / "local_jobs.txt").read_text().splitlines()[0]
    os.kill(int(line.split()[1]), signal.SIGKILL)
    assert run.wait(30) == 69
    assert f"the runtime job local{run.process.pid}.0 is gone" in run.stderr


@one_user
def test_the_runtime_alone(place: Place) -> None:
    """--runtime-only here: it serves until it is stopped."""
    argv = [str(place.checkout / "slurm" / "launch.py"), "--config", "local", "--runtime-only"]
    assert place.user
    with (
        place.user.popen(
            argv, {"SKYRL_JOBS_BASE": str(place.base)}, place.base, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
        killed_after(process),
    ):
        until("ready", lambda: list(place.base.glob("2*/runtime_ready.flag")), 30)
        flag = next(place.base.glob("2*/runtime_ready.flag")).with_name("training_complete.flag")
        place.user.run(["touch", str(flag)])
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "set by hand" in err


def test_without_podman_it_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("bash", "nproc"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "SKYRL_PYTHON": sys.executable}
    argv = [sys.executable, str(CHECKOUT / "slurm/launch.py"), "--config", "local"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 71
    assert "not on PATH: podman" in done.stderr
    assert str(CHECKOUT / "scripts" / "setup") in done.stderr
    assert not (tmp_path / ".skyrl_jobs").exists()
