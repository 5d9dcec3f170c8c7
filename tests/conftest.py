"""Fixtures that lend the real things: a Slurm cluster, an ordinary user on it, a checkout of that user's own."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm.lib.errors import EnvironmentProblem
from tests import cluster as test_cluster
from tests.cluster import accounting as cluster_accounting
from tests.users import OTHER_NAME, made_user, ordinary_user, subordinate_uids

CHECKOUT = Path(__file__).resolve().parent.parent
END_DEADLINE_S = 60.0
VERL_CACHE = Path("/var/tmp/skyrl-tests/verl-0.5.0")
SCRATCH = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))  # what is local to a node, and what jobs may write


@dataclass(frozen=True)
class OrdinaryUser:
    """A user without privileges, with a clean environment and the test cluster's Slurm."""

    name: str
    uid: int
    gid: int
    home: Path
    subuids: range
    slurm: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            **self.slurm,
        }

    def popen(
        self,
        argv: list[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **options: int,
    ) -> subprocess.Popen[str]:
        """Start a command as this user; stdout and stderr as for ``subprocess.Popen``."""
        process: subprocess.Popen[str] = subprocess.Popen(
            argv,
            env={**self.environment, **(env or {})},
            cwd=cwd or self.home,
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            umask=0o022,
            errors="surrogateescape",  # a path may hold any byte
            text=True,
            stdin=subprocess.DEVNULL,
            **options,  # type: ignore[call-overload]  # stdout and stderr, forwarded
        )
        return process

    def run(
        self, argv: list[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as this user to its end, its output captured."""
        with self.popen(argv, env, cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def owns(self, path: Path) -> bool:
        """Whether a file is this user's or of its subordinate ids; a file that just went is nobody's."""
        try:
            owner = path.lstat().st_uid
        except FileNotFoundError:
            return False
        return self.is_id(owner)

    def is_id(self, uid: int) -> bool:
        """Whether a user id is this user's or one of its subordinate ids."""
        return uid == self.uid or uid in self.subuids

    def processes(self) -> dict[int, str]:
        """The living processes of this user and of its subordinate ids: pid → command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                status = (entry / "status").read_text() if entry.name.isdigit() else ""
                uid = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
                owned = uid is not None and self.is_id(int(uid[1]))
                if owned and "\nState:\tZ" not in status:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    found[int(entry.name)] = b" ".join(words).decode(errors="replace")
            except OSError:
                continue
        return found


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """The real test cluster, up."""
    lacks = test_cluster.missing()
    if lacks:
        pytest.skip(f"the test cluster needs {', '.join(lacks)}; {test_cluster.MISSING_HINT}")
    with test_cluster.running():
        yield


@pytest.fixture(scope="session")
def user(cluster: None) -> OrdinaryUser:
    """An ordinary user of the cluster, made where it is missing.

    So is the other one, now: a new user gives /etc/subuid a new file, from which a mount of another session goes.
    """
    made_user(OTHER_NAME)
    return _lent(ordinary_user())


@pytest.fixture(scope="session")
def other_user(cluster: None) -> OrdinaryUser:
    """A second ordinary user of the cluster, with no rights on what the first one has."""
    return _lent(made_user(OTHER_NAME))


@pytest.fixture(scope="module")
def accounting(user: OrdinaryUser) -> Iterator[None]:
    """The cluster keeps accounts while a module's tests run, and ``user`` has an association."""
    lacks = cluster_accounting.missing()
    if lacks:
        pytest.skip(f"accounting needs {', '.join(lacks)}; {test_cluster.MISSING_HINT}")
    with cluster_accounting.accounting(user.name):
        yield


def _lent(entry: pwd.struct_passwd) -> OrdinaryUser:
    Path(entry.pw_dir).chmod(0o755)
    return OrdinaryUser(
        entry.pw_name,
        entry.pw_uid,
        entry.pw_gid,
        Path(entry.pw_dir),
        subordinate_uids(entry.pw_name),
        test_cluster.environment(),
    )


def environment_folder(user: OrdinaryUser, copy: Path) -> Path:
    """An environment with our packages that the user can start; made for its copy where ours is out of its reach."""
    own = Path(sys.prefix)
    # By env(1): what the user may not even look up is then an exit code.
    if user.run(["env", str(own / "bin" / "python"), "-c", "import fastapi, tenacity"]).returncode == 0:
        return own
    folder = Path("/opt/skyrl-test-venv")
    print(f"{user.name} cannot start {own}/bin/python; making {folder} for it", file=sys.stderr)
    environment = {**os.environ, "SKYRL_VENV": str(folder)}
    subprocess.run([str(copy / "scripts" / "setup")], check=True, env=environment, stdout=sys.stderr)
    return folder


def copy_checkout(target: Path) -> None:
    """Copy the files of this checkout that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (CHECKOUT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, target / name)


@pytest.fixture(scope="session")
def checkout(user: OrdinaryUser) -> Path:
    """The user's own copy of this checkout, with an environment: PROJECT_ROOT/SkyRL below its home."""
    target = user.home / "project" / "SkyRL"
    shutil.rmtree(target, ignore_errors=True)
    copy_checkout(target)
    (target / ".venv").symlink_to(environment_folder(user, target))
    subprocess.run(["chown", "-Rh", f"{user.uid}:{user.gid}", str(user.home / "project")], check=True)
    return target


@pytest.fixture(scope="session")
def verl_python() -> Path:
    """The interpreter of VERL's environment, made where it is missing (one to three minutes)."""
    shell = {**os.environ, "SKYRL_VERL_CACHE": str(VERL_CACHE)}
    argv = [sys.executable, "-m", "local_verl.environment"]
    done = subprocess.run(argv, cwd=CHECKOUT, env=shell, capture_output=True, text=True, timeout=1200)
    if done.returncode == EnvironmentProblem.exit_code:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture
def jobs_base(user: OrdinaryUser, request: pytest.FixtureRequest) -> Path:
    """A fresh folder for the runs of one test."""
    return fresh_folder(user, re.sub(r"\W+", "_", request.node.name)[:60])


def fresh_folder(user: OrdinaryUser, name: str) -> Path:
    """An empty folder of the user's, for runs."""
    folder = user.home / "jobs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (folder.parent, folder):
        os.chown(path, user.uid, user.gid)
    return folder


@dataclass(frozen=True)
class Belongings:
    """What a user has on the nodes: its processes, its files outside its home, and the ports it listens on."""

    processes: Mapping[int, str]
    paths: frozenset[Path]
    ports: frozenset[tuple[str, int]]


def belongings(user: OrdinaryUser) -> Belongings:
    """Sockets are files too; a home holds one thing that is a node's own, Podman's default store."""
    store = user.home / ".local" / "share" / "containers"
    paths = [path for folder in SCRATCH for path in folder.iterdir() if user.owns(path)]
    ports = {
        (node, port) for node in test_cluster.NODES for port, uid in test_cluster.listeners(node) if user.is_id(uid)
    }
    return Belongings(user.processes(), frozenset([*paths, store] if store.exists() else paths), frozenset(ports))


def _queue(user: OrdinaryUser) -> list[str]:
    """The user's jobs; asked again where Slurm refuses, unless there is no cluster."""
    for _ in range(3):
        done = user.run(["squeue", "-h", "-u", user.name, "-o", "job %i %j %T %r"])
        if done.returncode == 0 or "Unable to contact" in done.stderr:
            break
        time.sleep(0.5)
    return done.stdout.splitlines()


def leftovers(user: OrdinaryUser, before: Belongings) -> list[str]:
    """Jobs, processes, Podman storage, sockets and ports of the user that were not there before."""
    now = belongings(user)
    jobs = _queue(user)
    processes = [f"process {pid}: {words[:150]}" for pid, words in now.processes.items() if pid not in before.processes]
    paths = [f"left on a node: {path}" for path in sorted(now.paths - before.paths)]
    names = re.compile(rf"skyrl-{user.uid}-|/run/user/{user.uid}/")
    sockets = [line for node in test_cluster.NODES for line in test_cluster.sockets(node) if names.search(line)]
    ports = [f"port {port} on {node}" for node, port in sorted(now.ports - before.ports)]
    return jobs + processes + paths + [f"socket {line}" for line in sockets] + ports


def sweep(user: OrdinaryUser, before: Belongings) -> None:
    """End and remove what a test left, so that it spoils no other: first as Slurm does it, then by force."""
    user.run(["scancel", "-u", user.name])
    end = time.monotonic() + END_DEADLINE_S
    while user.run(["squeue", "-h", "-u", user.name]).stdout.strip() and time.monotonic() < end:
        time.sleep(0.2)
    while (left := user.processes().keys() - before.processes.keys()) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    for path in belongings(user).paths - before.paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class NothingLeft:
    """A check that a user left nothing on any node since ``before``."""

    user: OrdinaryUser
    before: Belongings

    def now(self) -> list[str]:
        """What is left at this moment."""
        return leftovers(self.user, self.before)

    def __call__(self) -> None:
        """Wait until nothing is left, and fail with what still is."""
        end = time.monotonic() + END_DEADLINE_S
        while left := self.now():
            if time.monotonic() > end:
                raise AssertionError("left behind: " + "; ".join(left))
            time.sleep(0.2)


@pytest.fixture
def nothing_left(user: OrdinaryUser) -> Iterator[NothingLeft]:
    """A check that the user left nothing on any node; made once more at the test's end."""
    with leaving_nothing(user) as check:
        yield check


@contextlib.contextmanager
def leaving_nothing(user: OrdinaryUser) -> Iterator[NothingLeft]:
    """A check that the user left nothing on any node since the block began; made once more at the block's end."""
    check = NothingLeft(user, belongings(user))
    try:
        yield check
        check()
    finally:
        sweep(user, check.before)
