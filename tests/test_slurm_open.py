"""``launch.py open`` on real runs: one on Slurm, whose nodes this host reaches, and a local one of another host.

There the way is a real SSH, to a server that the test's user runs on the login host.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cluster as test_cluster
from tests.conftest import OrdinaryUser, fresh_folder, leaving_nothing
from tests.local_runs import Local, Place
from tests.runs import STARTS_SANDBOXES, cancelled, killed_after, launch, until, with_sandboxes

pytestmark = [pytest.mark.slurm, pytest.mark.podman, pytest.mark.verbs]

SMALL = ("CPUS_FOR_RUNTIME=2", "RUNTIME_MEMORY=2G", "GPUS_PER_NODE=0")
NODE = "cpu-b"  # stands for another login node
SSHD = Path("/usr/sbin/sshd")
SSH_PORT, PORT = 2222, 18000
SHOWN_S = 60.0


def open_argv(checkout: Path, *words: str) -> list[str]:
    return [str(checkout / "slurm" / "launch.py"), "open", *words]


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()


def test_a_run_on_slurm(user: OrdinaryUser, checkout: Path, jobs_base: Path, other_user: OrdinaryUser) -> None:
    with leaving_nothing(user):
        run, _urls = with_sandboxes(user, checkout, jobs_base, *SMALL)
        directory = str(run.directory)
        key = run.text("runtime_api_key.txt").strip()
        url = run.text("runtime_url.txt").strip()

        def is_reached() -> bool:  # the product asks once
            return bool(json.loads(user.run(open_argv(checkout, directory, "--json")).stdout)["reachable"])

        until("an answer in time", is_reached, 60)
        done = user.run(open_argv(checkout, directory))
        assert done.returncode == 0, done.stderr
        assert f"from this host  {url}/\n" in done.stdout
        there = url.removeprefix("http://")
        port = there.rpartition(":")[2]
        full = socket.getfqdn()
        me = f"{user.name}@{socket.gethostname() if full.startswith('localhost') else full}"
        assert f"on your laptop  ssh -N -L {port}:{there} {me}\n" in done.stdout
        assert f"and there       http://localhost:{port}/\n" in done.stdout
        assert f"password        the key in {directory}/runtime_api_key.txt\n" in done.stdout
        assert key not in done.stdout + done.stderr
        wanted = json.loads(user.run(open_argv(checkout, directory, "--port", "8123", "--json")).stdout)
        assert wanted["laptop_command"] == ["ssh", "-N", "-L", f"8123:{there}", me]
        assert (wanted["reachable"], wanted["url"], wanted["laptop_url"]) == (True, f"{url}/", "http://localhost:8123/")
        shown = Path(wanted["key_file"]).read_text().strip()
        request = urllib.request.Request(wanted["url"], headers={"Authorization": basic(shown)})
        with urllib.request.urlopen(request, timeout=30) as answer:
            page = answer.read().decode()
        assert "<h1>Sandboxes</h1>" in page
        assert ">s0<" in page
        foreign = user.run(open_argv(checkout, directory), cwd=Path("/"))
        assert foreign.returncode == 0
        closed = other_user.run(open_argv(checkout, directory))
        assert closed.returncode == 2
        assert f"cannot be read: it is {user.name}'s" in closed.stderr
        cancelled(lambda: user.run([str(checkout / "slurm" / "launch.py"), "cancel", directory]))
        over = user.run(open_argv(checkout, directory))
        assert over.returncode == 69
        assert "(cancelled) has no page: runtime job" in over.stderr
        assert over.stderr.count("\n") == 1


def test_a_run_that_has_no_page_yet(user: OrdinaryUser, checkout: Path, jobs_base: Path) -> None:
    with leaving_nothing(user):
        run = launch(user, checkout, jobs_base, *SMALL, "CPU_SBATCH_ARGS=--begin=now+3600", "TRAINING_COMMAND=true")
        done = user.run(open_argv(checkout, str(run.directory)))
        assert done.returncode == 69
        assert "(pending) has no page: runtime job" in done.stderr
        user.run([str(checkout / "slurm" / "launch.py"), "cancel", str(run.directory)])


# --- through SSH ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ssh_server(user: OrdinaryUser) -> Iterator[None]:
    """The user's ``ssh HOST`` gets from any node to the login host, without a word."""
    if not SSHD.exists():
        pytest.skip(f"there is no {SSHD}; {test_cluster.MISSING_HINT}")
    folder = user.home / ".ssh"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("host", "id"):
        argv = ["sh", "-c", f"mkdir -p -m 700 {folder}; ssh-keygen -q -t ed25519 -N '' -f {folder}/{name}"]
        assert user.run(argv).returncode == 0
    names = f"{socket.gethostname()} {socket.getfqdn()}"
    host_key = (folder / "host.pub").read_text()
    files = {
        "authorized_keys": (folder / "id.pub").read_text(),
        "known_hosts": f"[{test_cluster.LOGIN}]:{SSH_PORT} {host_key}",
        "config": f"Host {names}\n  HostName {test_cluster.LOGIN}\n  Port {SSH_PORT}\n  IdentityFile {folder}/id\n",
        "sshd": f"ListenAddress {test_cluster.LOGIN}:{SSH_PORT}\nHostKey {folder}/host\nPidFile none\nUsePAM no\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
        os.chown(folder / name, user.uid, user.gid)
    server = user.popen([str(SSHD), "-D", "-e", "-f", f"{folder}/sshd"], stderr=subprocess.DEVNULL)
    try:
        until("sshd", lambda: _listens(test_cluster.LOGIN, SSH_PORT), 30)
        yield
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@dataclass
class Elsewhere:
    """The user on another host, which has the run's directory and cannot reach its server."""

    user: OrdinaryUser
    checkout: Path
    run: Local

    def argv(self, *words: str) -> list[str]:
        on_it = ["nsenter", f"--target={test_cluster.slurmd_pid(NODE)}", "--mount", "--net", "--uts"]
        return [*on_it, "setpriv", f"--reuid={self.user.uid}", f"--regid={self.user.gid}", "--clear-groups", *words]

    def open(self, *words: str) -> subprocess.Popen[str]:
        argv = self.argv(*open_argv(self.checkout, str(self.run.directory), *words))
        return subprocess.Popen(
            argv, env=self.user.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def page(self) -> str:
        """What a browser there shows, given the key."""
        key = (self.run.directory / "runtime_api_key.txt").read_text().strip()
        script = "import sys, urllib.request as u; r = u.Request(sys.argv[1], headers={'Authorization': input()});"
        script += "print(u.urlopen(r, timeout=30).read().decode())"
        argv = self.argv("/usr/bin/python3", "-c", script, f"http://127.0.0.1:{PORT}/")
        done = subprocess.run(argv, input=basic(key), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def has_ssh(self) -> bool:
        return any(words.startswith("ssh -N") for words in self.user.processes().values())


@pytest.fixture(scope="module")
def elsewhere(user: OrdinaryUser, checkout: Path) -> Iterator[Elsewhere]:
    """A local run with two sandboxes."""
    base = fresh_folder(user, "local_page")
    environment = {name: value for name, value in user.environment.items() if not name.startswith("SLURM")}
    with Place(checkout, base, user, environment).lent() as place, ssh_server(user):
        run = place.start(f"{STARTS_SANDBOXES}\nexec sleep 600")
        until("its sandboxes", lambda: list(run.directory.glob("sandboxes.json")), 90)
        yield Elsewhere(user, checkout, run)
        run.process.terminate()
        run.process.wait(60)


def told(process: subprocess.Popen[str]) -> str:
    """What it tells, up to the line about the key."""
    assert process.stdout and process.stderr
    lines: list[str] = []
    with killed_after(process):
        while not lines or "password" not in lines[-1]:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line)
    return "".join(lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_tunnel_and_how_it_ends(elsewhere: Elsewhere, number: int) -> None:
    with elsewhere.open("--port", str(PORT)) as process:
        shown = told(process)
        assert f"from this host  http://127.0.0.1:{PORT}/\n" in shown
        assert re.search(rf"on your laptop  ssh -N -L {PORT}:127\.0\.0\.1:{PORT} {elsewhere.user.name}@\S+\n", shown)
        assert ">s1<" in elsewhere.page()
        key = (elsewhere.run.directory / "runtime_api_key.txt").read_text().strip()
        assert elsewhere.has_ssh()
        assert not [words for words in elsewhere.user.processes().values() if key in words]
        process.send_signal(number)
        rest, err = process.communicate(timeout=SHOWN_S)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
    assert key not in shown + rest + err
    until("the end of its ssh", lambda: not elsewhere.has_ssh(), 20)


def test_only_told(elsewhere: Elsewhere) -> None:
    with elsewhere.open("--print") as process:
        out, err = process.communicate(timeout=SHOWN_S)
    assert process.returncode == 0, err
    assert "from this host  does not answer" in out
    port = (elsewhere.run.directory / "runtime_url.txt").read_text().strip().rpartition(":")[2]
    host = socket.gethostname()
    assert re.search(rf"ssh -N -L {port}:127\.0\.0\.1:{port} -J \S+ {elsewhere.user.name}@{host}\n", out), out
    assert not elsewhere.has_ssh()


def test_a_port_that_is_taken_and_a_host_that_refuses(elsewhere: Elsewhere) -> None:
    listener = "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print(1, flush=True); "
    words = ("/usr/bin/python3", "-c", f"{listener}sys.stdin.read()", str(PORT + 1))
    with subprocess.Popen(elsewhere.argv(*words), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as taken:
        assert taken.stdout
        taken.stdout.readline()
        with elsewhere.open("--port", str(PORT + 1)) as process:
            _, err = process.communicate(timeout=SHOWN_S)
        taken.communicate()
    assert process.returncode == 71
    assert f"port {PORT + 1} of this host: Address already in use; choose another with --port" in err
    known = elsewhere.user.home / ".ssh" / "authorized_keys"
    said = known.read_text()
    known.write_text("")
    try:
        with elsewhere.open() as process:
            _, err = process.communicate(timeout=SHOWN_S)
    finally:
        known.write_text(said)
    assert process.returncode == 71
    assert "the SSH tunnel to " in err
    assert "Permission denied" in err
    assert "Traceback" not in err


def test_a_shell_in_a_local_run(elsewhere: Elsewhere) -> None:
    """On its host; from elsewhere it is refused."""
    argv = [str(elsewhere.checkout / "slurm" / "launch.py"), "shell", str(elsewhere.run.directory)]
    done = elsewhere.user.run([*argv, "s1", "--", "sh", "-c", "echo $SESSION_API_KEY; exit 7"])
    keys = [one["session_api_key"] for one in json.loads((elsewhere.run.directory / "sandboxes.json").read_text())]
    assert (done.returncode, done.stdout, done.stderr) == (7, f"{keys[1]}\n", "")
    beside = elsewhere.user.run([*argv, "--runtime", "--", "podman", "ps", "-q"])
    assert len(beside.stdout.split()) == 2, beside.stderr
    wrong = elsewhere.user.run([*argv, "nonesuch"])
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    there = elsewhere.argv(*argv, "s1")
    refused = subprocess.run(there, env=elsewhere.user.environment, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 71
    assert f"is a local run on {socket.gethostname()}: go there for a shell" in refused.stderr


def test_a_tunnel_ends_with_the_run(elsewhere: Elsewhere) -> None:
    """Last in this file: it ends the run."""
    with elsewhere.open("--port", str(PORT)) as process:
        told(process)
        elsewhere.run.process.terminate()
        elsewhere.run.process.wait(60)
        _, err = process.communicate(timeout=SHOWN_S)
    assert process.returncode == 0, err
    assert "the tunnel is closed" in err
    assert not elsewhere.has_ssh()
