"""The server as a process: its flags, its key, how it ends, and what is left then."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.runtime import local_registry, podman_service
from tests.runtime.commands import IMAGE, SERVE
from tests.runtime.test_contract import eventually

CHECKOUT = Path(__file__).resolve().parents[2]
KEY = "a-planted-key-7391"
DEADLINE_S = 20.0
MakeServer = Callable[..., "Server"]


@dataclass
class Server:
    """A server process on a port of its own."""

    process: subprocess.Popen[str]
    port: int
    log_file: Path
    key: str | None

    def request(self, method: str, path: str, json: object = None, timeout: float = 30) -> httpx.Response:
        headers = {"X-API-Key": self.key} if self.key else {}
        url = f"http://127.0.0.1:{self.port}{path}"
        return httpx.request(method, url, json=json, headers=headers, timeout=timeout, trust_env=False)

    def start(self, **fields: object) -> httpx.Response:
        return self.request("POST", "/start", {"image": IMAGE, "command": SERVE, **fields})

    def answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.request("GET", "/health", timeout=2).status_code == 200
        return False

    def podman(self) -> str:
        word: str = self.request("GET", "/health").json()["podman"]
        return word

    def log(self) -> str:
        return self.log_file.read_text()

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MakeServer]:
    """Start a server on a free port; whatever happens it is gone afterwards."""
    with contextlib.ExitStack() as stack:

        def make(*flags: str, podman: Path = tmp_path / "none.sock", key: str | None = KEY) -> Server:
            port = stack.enter_context(local_registry.held_port())
            log = tmp_path / f"log-{port}"
            environment = environment_for(podman, key)
            argv = [sys.executable, "-m", "slurm_runtime.api_server", "--host", "127.0.0.1", "--port", str(port)]
            with log.open("w") as stderr:
                process = subprocess.Popen(
                    [*argv, "--cpus", "8", *flags],
                    cwd=CHECKOUT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
            stack.enter_context(process)
            stack.callback(process.kill)
            made = Server(process, port, log, key)
            eventually(lambda: made.answers() or process.poll() is not None, DEADLINE_S)
            return made

        yield make


def environment_for(podman: Path | None, key: str | None) -> dict[str, str]:
    """The test's environment with this Podman and key."""
    kept = {name: value for name, value in os.environ.items() if name not in {"DOCKER_HOST", "ALLHANDS_API_KEY"}}
    added = {"DOCKER_HOST": f"unix://{podman}" if podman else "", "ALLHANDS_API_KEY": key or ""}
    return {**kept, **added}


def run(*flags: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to end by itself."""
    argv = [sys.executable, "-m", "slurm_runtime.api_server", *flags]
    return subprocess.run(
        argv, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


@pytest.fixture(params=["rootless", "root"])
def podman(request: pytest.FixtureRequest) -> podman_service.Service:
    """A real Podman."""
    service: podman_service.Service = request.getfixturevalue(f"{request.param}_podman")
    return service


# Flags.


def test_help_and_version() -> None:
    assert "--stop-with-stdin" in run("--help").stdout
    assert re.match(r"slurm_runtime \d", run("--version").stdout)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "x"], "'x' is not a port"),
        (["--port", "70000"], "'70000' is not a port"),
        (["--memory-per-worker", "lots"], "16G"),
        (["--cpus-per-worker", "0"], "above 0"),
        (["--sandbox-port-range", "5"], "20000-20999"),
        (["--label", "x"], "KEY=VALUE"),
        (["--fd", "77"], "--fd 77"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--api-key-file", "/nonesuch/key"], "/nonesuch/key"),
        (["--disable-auth", "--api-key-file", "x"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_2_with_a_sentence(flags: list[str], said: str, tmp_path: Path) -> None:
    ended = run(*["--port", "0", *flags], environment=environment_for(tmp_path / "s", KEY))
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_docker_host_that_is_no_unix_socket_is_2(tmp_path: Path) -> None:
    environment = {**environment_for(None, KEY), "DOCKER_HOST": "tcp://somewhere:2375"}
    ended = run("--port", "0", environment=environment)
    assert ended.returncode == 2
    assert "tcp://somewhere:2375" in ended.stderr


def test_no_podman_socket_is_71_and_says_how_to_start_one(tmp_path: Path) -> None:
    if Path("/run/podman/podman.sock").exists():
        pytest.skip("root's own Podman service runs here")
    ended = run("--port", "0", environment={**environment_for(None, KEY), "XDG_RUNTIME_DIR": str(tmp_path)})
    assert ended.returncode == 71
    assert "podman system service --time=0" in ended.stderr


def test_a_taken_port_is_98_with_one_sentence(server: MakeServer, tmp_path: Path) -> None:
    first = server()
    ended = run("--host", "127.0.0.1", "--port", str(first.port), environment=environment_for(tmp_path / "s", KEY))
    assert ended.returncode == 98
    assert f"127.0.0.1:{first.port}" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_an_inherited_socket_is_served(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        argv = [sys.executable, "-m", "slurm_runtime.api_server", "--fd", str(listening.fileno())]
        environment = environment_for(tmp_path / "s", KEY)
        log = (tmp_path / "log").open("w")
        with (
            log,
            subprocess.Popen(argv, cwd=CHECKOUT, env=environment, pass_fds=[listening.fileno()], stderr=log) as process,
        ):
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/health"
            assert httpx.get(url, timeout=DEADLINE_S, trust_env=False).status_code == 200
            process.terminate()
            assert process.wait(DEADLINE_S) == 0


def test_a_socket_that_does_not_listen_is_refused(tmp_path: Path) -> None:
    with socket.socket() as silent:
        argv = [sys.executable, "-m", "slurm_runtime.api_server", "--fd", str(silent.fileno())]
        environment = environment_for(tmp_path / "s", KEY)
        ended = subprocess.run(
            argv, cwd=CHECKOUT, env=environment, pass_fds=[silent.fileno()], capture_output=True, text=True, check=False
        )
    assert ended.returncode == 2
    assert "does not listen" in ended.stderr


def test_a_key_of_the_environment_is_asked_for_and_never_logged(server: MakeServer) -> None:
    made = server("--verbose")
    assert made.request("GET", "/list").status_code == 200
    made.key = "wrong"
    assert made.request("GET", "/list").status_code == 401
    eventually(lambda: "method=GET path=/list status=401" in made.log())  # written after the answer
    assert KEY not in made.log()


def test_a_key_file_wins_over_the_environment_and_one_open_to_others_is_warned_about(
    server: MakeServer, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_text("from-the-file\n")
    path.chmod(0o644)
    made = server("--api-key-file", str(path))
    assert made.request("GET", "/list").status_code == 401
    made.key = "from-the-file"
    assert made.request("GET", "/list").status_code == 200
    assert f"chmod 600 {path}" in made.log()


def test_a_generated_key_is_in_a_private_file_that_is_removed(
    server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = server(key=None)
    assert made.request("GET", "/list").status_code == 401
    assert made.process.stdout is not None
    path = Path(made.process.stdout.readline().strip())
    assert path.stat().st_mode & 0o777 == 0o600
    made.key = path.read_text().strip()
    assert made.request("GET", "/list").status_code == 200
    made.process.terminate()
    assert made.wait() == 0
    assert not path.exists()
    assert made.key not in made.log()


def test_without_authentication_there_is_a_warning(server: MakeServer) -> None:
    made = server("--disable-auth")
    made.key = None
    assert made.request("GET", "/list").status_code == 200
    assert "[WARN] --disable-auth" in made.log()


# Ends, without Podman.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_stop_it(server: MakeServer, number: signal.Signals) -> None:
    made = server()
    assert made.podman() == "connecting"
    made.process.send_signal(number)
    assert made.wait() == 0
    assert f"{number.name}: stopping" in made.log()


def test_with_stdin_signals_are_ignored_and_its_end_stops_it(server: MakeServer) -> None:
    made = server("--stop-with-stdin")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        made.process.send_signal(number)
    assert made.answers()
    assert made.process.poll() is None
    assert made.process.stdin is not None
    made.process.stdin.write("words are not an end\n")
    made.process.stdin.flush()
    assert made.answers()
    made.process.stdin.close()
    assert made.wait() == 0
    assert "standard input is closed" in made.log()


def test_a_start_without_podman_is_an_error_that_says_what_to_do(server: MakeServer, tmp_path: Path) -> None:
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    made = server(podman=stale)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(made.start)
        eventually(lambda: made.request("GET", "/list").json()["total"] == 1)
        made.process.terminate()
        assert waiting.result().status_code == 503
    assert made.wait() == 0


# Ends, with Podman.


@pytest.mark.podman
def test_32_sigterm_removes_every_container(server: MakeServer, podman: podman_service.Service) -> None:
    made = server("--label", "team=red", podman=podman.socket)
    before = podman.volumes()
    with ThreadPoolExecutor(6) as pool:
        assert [answer.status_code for answer in pool.map(lambda _: made.start(), range(6))] == [201] * 6
    assert len(podman.containers()) == 6
    assert len(podman.podman("ps", "--filter", "label=team=red", "--quiet").split()) == 6
    made.process.terminate()
    assert made.wait() == 0
    assert podman.containers() == []
    assert podman.volumes() == before
    assert KEY not in made.log()


@pytest.mark.podman
def test_32_sigterm_in_the_middle_of_starts_leaves_nothing(server: MakeServer, podman: podman_service.Service) -> None:
    made = server(podman=podman.socket)
    eventually(lambda: made.podman() == "connected", DEADLINE_S)  # else none of them has begun
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(made.start) for _ in range(8)]
        eventually(lambda: made.request("GET", "/list").json()["total"] == 8)
        made.process.terminate()
        assert {answer.result().status_code for answer in answers} <= {201, 503}
    assert made.wait() == 0
    assert podman.containers() == []


@pytest.mark.podman
def test_the_end_of_stdin_removes_every_container(server: MakeServer, podman: podman_service.Service) -> None:
    made = server("--stop-with-stdin", podman=podman.socket)
    made.process.terminate()
    assert made.start().status_code == 201
    assert made.process.stdin is not None
    made.process.stdin.close()
    assert made.wait() == 0
    assert podman.containers() == []


OWNER = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
time.sleep(1000)
"""


@pytest.mark.podman
def test_an_owner_killed_with_sigkill_takes_everything_along(podman: podman_service.Service, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--stop-with-stdin"]
    argv = [sys.executable, "-c", OWNER, sys.executable, "-m", "slurm_runtime.api_server", *flags]
    with (tmp_path / "log").open("w") as log:
        owner = subprocess.Popen(argv, cwd=CHECKOUT, env=environment_for(podman.socket, KEY), stderr=log)
    with owner:
        made = Server(subprocess.Popen(["true"], text=True), port, tmp_path / "log", KEY)
        made.process.wait()
        eventually(made.answers, DEADLINE_S)
        assert made.start().status_code == 201
        owner.kill()
    eventually(lambda: not made.answers(), DEADLINE_S)
    eventually(lambda: "nothing is left" in made.log(), DEADLINE_S)
    assert podman.containers() == []


@pytest.mark.podman
def test_32_what_a_killed_server_left_is_removed_by_the_next(
    server: MakeServer, podman: podman_service.Service
) -> None:
    first = server(podman=podman.socket)
    assert first.start().status_code == 201
    first.process.kill()
    first.process.wait()
    assert len(podman.containers()) == 1
    second = server(podman=podman.socket)
    eventually(lambda: podman.containers() == [], DEADLINE_S)
    assert "of a server that was killed" in second.log()


@pytest.mark.podman
def test_podmans_socket_may_appear_later(server: MakeServer, podman: podman_service.Service, tmp_path: Path) -> None:
    later = tmp_path / "p.sock"
    made = server(podman=later)
    assert made.podman() == "connecting"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(made.start)
        eventually(lambda: made.request("GET", "/list").json()["total"] == 1)
        later.symlink_to(podman.socket)
        assert answer.result().status_code == 201
    assert made.podman() == "connected"


@contextlib.contextmanager
def frozen(podman: podman_service.Service) -> Iterator[None]:
    """The service, stopped for the length of the block."""
    pid = podman.server_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.podman
def test_a_podman_that_hangs_holds_up_neither_polls_nor_the_end(
    server: MakeServer, rootless_podman: podman_service.Service
) -> None:
    made = server("--stop-timeout", "1", podman=rootless_podman.socket)
    sandbox = made.start().json()
    there = f"/runtime/{sandbox['runtime_id']}"
    eventually(lambda: made.request("GET", there).json()["pod_status"] == "ready", DEADLINE_S)
    with frozen(rootless_podman):
        polls = [made.request("GET", f"/runtime/{sandbox['runtime_id']}", timeout=2) for _ in range(20)]
        assert {answer.json()["pod_status"] for answer in polls} == {"ready"}
        made.process.terminate()
        assert made.wait() == 75
    assert sandbox["runtime_id"] in made.log()
    rootless_podman.podman("rm", "--all", "--force", "--time=0")


@pytest.mark.podman
def test_a_second_signal_forces_the_end(server: MakeServer, rootless_podman: podman_service.Service) -> None:
    made = server("--stop-timeout", "600", podman=rootless_podman.socket)
    assert made.start().status_code == 201
    with frozen(rootless_podman):
        made.process.terminate()
        eventually(lambda: "SIGTERM: stopping" in made.log())
        time.sleep(0.2)
        assert made.process.poll() is None
        made.process.terminate()
        assert made.wait() == 128 + signal.SIGTERM
    rootless_podman.podman("rm", "--all", "--force", "--time=0")
