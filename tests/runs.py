"""Runs on the real test cluster, as a user starts and watches them."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Protocol

from tests import cluster

ANSWERED_S = 45.0  # within which Slurm is to answer, said again where it fails: one call may take 18 s
FAULTY = Path(__file__).with_name("faulty_fs.py")


class User(Protocol):
    """An ordinary user of the test cluster (tests/conftest.py)."""

    @property
    def home(self) -> Path: ...

    def run(
        self, argv: list[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 60
    ) -> CompletedProcess[str]: ...


def until(what: str, condition: Callable[[], object], seconds: float, every_s: float = 0.1) -> float:
    """Wait for a condition; returns how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what}: not within {seconds} s"
        time.sleep(every_s)
    return time.monotonic() - start


def _answer(user: User, argv: list[str], env: Mapping[str, str] | None = None) -> str:
    """What a question to Slurm prints: nothing of a job that Slurm has forgotten, and for no other reason.

    A controller that is asked by many at once may refuse one of them, which is not to be taken for an empty queue.
    """
    end = time.monotonic() + ANSWERED_S
    while (answer := user.run(argv, env)).returncode and "Invalid job id" not in answer.stderr:
        assert time.monotonic() < end, f"{argv[0]} does not answer: {answer.stderr.strip()}"
        time.sleep(0.2)
    return answer.stdout


def squeue(user: User, *options: str) -> str:
    """What it prints, without a header."""
    return _answer(user, ["squeue", "-h", *options])


def scontrol_job(user: User, job_id: str) -> str:
    """What ``scontrol`` shows of a job, with times in seconds since 1970."""
    return _answer(user, ["scontrol", "show", "job", job_id], {"SLURM_TIME_FORMAT": "%s"})


@contextlib.contextmanager
def killed_after(process: subprocess.Popen[str], seconds: float = 120) -> Iterator[None]:
    """The process is killed where the block takes longer: then a read of what it prints comes to its end."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    except BaseException:
        process.kill()  # else whoever owns it waits for its end without a limit
        raise
    finally:
        timer.cancel()
        timer.join()


@contextlib.contextmanager
def faulty(node: str, folder: Path, source: Path | None = None, **said: object) -> Iterator[Callable[..., None]]:
    """``folder`` as ``node`` sees it through ``faulty_fs``; call what is yielded to change the conditions.

    With a ``source`` what lies there. ``node`` may be the empty string: the login host.
    """
    with tempfile.TemporaryDirectory() as place:
        control = Path(place) / "control.json"

        def change(**now: object) -> None:
            beside = control.with_suffix(".new")
            beside.write_text(json.dumps(now))
            beside.rename(control)

        change(**said)
        on_it = ["nsenter", f"--target={cluster.slurmd_pid(node)}", "--mount"] if node else []
        words = [str(folder), str(control), *([str(source)] if source else [])]
        with subprocess.Popen([*on_it, "/usr/bin/python3", str(FAULTY), *words]) as server:
            try:
                until(f"{folder} on {node}", lambda: _is_faulty(on_it, folder), 20)
                yield change
            finally:
                change()
                subprocess.run([*on_it, "umount", "--lazy", str(folder)], check=False)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(5)  # which it does by itself once nothing there is open any more
                server.terminate()


def _is_faulty(on_it: list[str], folder: Path) -> bool:
    return subprocess.run([*on_it, "mountpoint", "-q", str(folder)], check=False).returncode == 0


@dataclass(frozen=True)
class Run:
    """A launched run: its directory and the ids of its jobs."""

    user: User
    directory: Path
    jobs: dict[str, str]

    def text(self, name: str) -> str:
        """A file of the run's directory, empty where there is none."""
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    def log(self, kind: str, suffix: str = "out") -> str:
        return self.text(f"{kind}_{self.jobs[kind]}.{suffix}")

    def shown(self, kind: str, what: str) -> str:
        """A field of squeue's for a job; of a heterogeneous job it may show the other component too."""
        answer = squeue(self.user, "-t", "all", "-j", self.jobs[kind], "-o", f"%A|{what}")
        return dict(line.split("|", 1) for line in answer.splitlines()).get(self.jobs[kind], "")

    def state(self, kind: str) -> str:
        return self.shown(kind, "%T") or "GONE"

    def node(self, kind: str) -> str:
        return self.shown(kind, "%N")

    def is_over(self, kind: str) -> bool:
        return self.state(kind) not in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}

    def wait_over(self, *kinds: str, seconds: float) -> float:
        return until(
            f"end of {kinds or 'all'} in {self.directory}",
            lambda: all(self.is_over(kind) for kind in kinds or self.jobs),
            seconds,
        )

    def wait_for_text(self, kind: str, text: str, seconds: float = 30) -> float:
        return until(f"{text!r} in the log of {kind}", lambda: text in self.log(kind), seconds)

    @property
    def completion(self) -> dict[str, Any]:
        return dict(json.loads(self.text("training_complete.flag") or "{}"))

    def next_attempt(self, number: int = 1) -> Run:
        """The jobs that wait for the end of an attempt, as far as they are written down."""
        record = json.loads(self.text(f"attempt_{number}.json"))
        return replace(self, jobs=dict(record["successor"]))

    def queued_attempt(self, number: int = 1) -> Run:
        """The same once there are some: Slurm may take longer to queue them than the trainer is held up for it."""
        until(f"the jobs after attempt {number}", lambda: self.next_attempt(number).jobs, 60)
        return self.next_attempt(number)

    def start_now(self, kind: str) -> None:
        """For a job that is to begin later (``--begin``)."""
        done = self.user.run(["scontrol", "update", f"JobId={self.jobs[kind]}", "StartTime=now"])
        assert done.returncode == 0, done.stderr

    def exit_code(self, kind: str) -> str:
        shown = scontrol_job(self.user, self.jobs[kind])
        found = re.search(r"ExitCode=(\d+):(\d+)", shown)
        assert found, shown
        return found.group(1)


def parse_report(user: User, stdout: str) -> Run:
    """The run that launch.py's report on stdout names."""
    directory = re.search(r"^coordination directory: (.+)$", stdout, re.MULTILINE)
    assert directory, stdout
    jobs = dict(re.findall(r"^(runtime|training) job: (\d+)$", stdout, re.MULTILINE))
    return Run(user, Path(directory.group(1)), jobs)


def cancelled(cancel: Callable[[], CompletedProcess[str]], seconds: float = 60) -> CompletedProcess[str]:
    """``launch.py cancel``, said again where its 15 s were too few: how soon runs end, the fault matrix asserts."""
    end = time.monotonic() + seconds
    while (done := cancel()).returncode == 75 and time.monotonic() < end:
        pass
    assert done.returncode == 0, done.stderr
    return done


def body_pid(run: Run, kind: str) -> int:
    """The pid of a job's body: the process whose environment has the job's id and whose parent is slurmstepd."""
    of_runtime = f"SKYRL_JOB_ID={run.jobs.get('runtime')}".encode()  # in a heterogeneous job, which is one for Slurm
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1] if environment else "0"
            own = f"SLURM_JOB_ID={run.jobs[kind]}".encode() in environment
            if own and not (kind == "training" and of_runtime in environment):
                name = Path(f"/proc/{parent}/comm").read_text()
                if name.startswith("slurmstepd"):
                    return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no body of the {kind} job")


# Sizes that fit two runs side by side on the test cluster's nodes, and start without a model.
SMALL = (
    "CPUS_FOR_RUNTIME=8",
    "RUNTIME_MEMORY=4G",
    "TRAINING_CPUS=2",
    "TRAINING_MEMORY=4G",
    "GPUS_PER_NODE=1",
    "CPUS_PER_WORKER=1",
    "MEMORY_PER_WORKER=512M",
    "TIME_LIMIT=00:20:00",
    "CHECKPOINT_DIR=",
    "ROLLOUT_DIR=",
    "CONTAINER_IMAGE=localhost/skyrl-busybox:latest",
)


def launch_argv(checkout: Path, *settings: str, options: tuple[str, ...] = ()) -> list[str]:
    words = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    return [str(checkout / "slurm" / "launch.py"), "--config", "dev", *words, *options]


def launch(
    user: User, checkout: Path, jobs_base: Path, *settings: str, options: tuple[str, ...] = (), **more: Any
) -> Run:
    """Launch a small run and return it; fails with launch.py's words if it was not taken."""
    argv = launch_argv(checkout, f"SKYRL_JOBS_BASE={jobs_base}", *settings, options=options)
    done = user.run(argv, timeout=60, **more)
    assert done.returncode == 0, done.stderr
    return parse_report(user, done.stdout)


def own_environment(folder: Path) -> Path:
    """An environment with the packages of this one, made in a folder of a user's; returns its interpreter."""
    ours = Path(sys.prefix)
    packages = next((ours / "lib").glob("python3*/site-packages"))
    target = folder / "lib" / packages.parent.name / "site-packages"
    target.mkdir(parents=True)
    for entry in packages.iterdir():
        (target / entry.name).symlink_to(entry)
    (folder / "bin").mkdir()
    shutil.copy(ours / "pyvenv.cfg", folder)
    python = folder / "bin" / "python"
    python.symlink_to((ours / "bin" / "python").resolve())
    return python


# A trainer that starts two sandboxes and writes what it knows of them.
STARTS_SANDBOXES = """TRAINING_COMMAND="$SKYRL_PYTHON" - <<'END'
import json, os, time, urllib.request
url, key = os.environ["SANDBOX_REMOTE_RUNTIME_API_URL"], os.environ["ALLHANDS_API_KEY"]
def start(number):
    body = {"image": os.environ["CONTAINER_IMAGE"], "session_id": f"s{number}", "working_dir": "/",
            "command": ["/bin/sh", "-c", "mkdir -p /w; echo ok > /w/health; exec httpd -f -p 60000 -h /w"]}
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    request = urllib.request.Request(url + "/start", json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request, timeout=60))
with open("sandboxes.part", "w") as file:
    json.dump([start(number) for number in range(2)], file)
os.rename("sandboxes.part", "sandboxes.json")
END"""
WITH_SANDBOXES = f"{STARTS_SANDBOXES}\nexec sleep 600"  # it goes on


def with_sandboxes(user: User, checkout: Path, jobs_base: Path, *settings: str) -> tuple[Run, list[str]]:
    """A run whose trainer has started two sandboxes and goes on, and their URLs."""
    run = launch(user, checkout, jobs_base, WITH_SANDBOXES, *settings)
    until("its sandboxes", lambda: run.text("sandboxes.json"), 120)
    return run, [sandbox["url"] for sandbox in json.loads(run.text("sandboxes.json"))]


def answers(url: str, timeout_s: float = 5) -> bool:
    """Whether a sandbox answers /health."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout_s) as answer:
            return bool(answer.read() == b"ok\n")
    except (OSError, http.client.HTTPException):  # one that is being ended may stop within its answer
        return False


def storage_of(run: Run, uid: int) -> Path:
    """Where the runtime job of a run of the user with this id keeps its containers, on its node."""
    return Path(f"/tmp/skyrl-{uid}-{run.jobs['runtime']}")


def monitored(storage: Path) -> dict[int, str]:
    """The processes that watch a container of this storage (conmon): pid → the container's id."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        words = line.decode(errors="replace").split("\0")
        if words[0].endswith("/conmon") and f"{storage}/" in " ".join(words):
            found[int(entry.name)] = words[words.index("-c") + 1]
    return found


def podman_ps(path: Path, every: bool = False) -> set[str]:
    """The ids of the running containers of a Podman service: what ``podman ps`` asks it, without a store of its own.

    ``every``: as ``podman ps --all``.
    """
    query = b"GET /v4.0.0/libpod/containers/json?all=%s HTTP/1.0\r\nHost: podman\r\n\r\n" % str(every).lower().encode()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(query)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError:
        return set()
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        listed = json.loads(body) if b" 200 " in head.partition(b"\r\n")[0] else []
    except ValueError:  # it was killed within its answer
        listed = []
    return {str(container["Id"]) for container in listed}
