"""The head as a process, and its nodes as processes that join it by themselves: flags, kill -9, loss, how all ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.runtime import local_registry, podman_service
from tests.runtime.test_contract import eventually
from tests.runtime.test_server_process import CHECKOUT, DEADLINE_S, KEY, Server, environment_for

MakeNode = Callable[..., Server]
LOST_S = 40.0  # 15 s of silence, on a busy machine


@dataclass
class HeadProcess:
    """A head that serves on a socket of its own, which outlives its process."""

    listening: socket.socket
    log: Path
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def start(self, *flags: str) -> None:
        argv = [sys.executable, "-m", "slurm_runtime.head", "--fd", str(self.listening.fileno()), *flags]
        with self.log.open("a") as output:
            self.server.process = subprocess.Popen(
                argv,
                cwd=CHECKOUT,
                env=environment_for(None, KEY),
                stdin=subprocess.PIPE,
                stderr=output,
                pass_fds=[self.listening.fileno()],
                text=True,
            )

    def kill(self) -> None:
        with self.server.process as process:
            process.kill()

    def states(self) -> dict[str, str]:
        return {node["name"]: node["state"] for node in self.server.request("GET", "/nodes").json()["nodes"]}


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as held:
        yield held


@pytest.fixture
def head(stack: contextlib.ExitStack, tmp_path: Path) -> HeadProcess:
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    log = tmp_path / "head.log"
    made = HeadProcess(listening, log, Server(None, listening.getsockname()[1], log, KEY))  # type: ignore[arg-type]
    made.start("--stop-with-stdin")
    stack.callback(made.kill)
    eventually(made.server.answers, DEADLINE_S)
    return made


@pytest.fixture
def make_node(stack: contextlib.ExitStack, tmp_path: Path, head: HeadProcess) -> MakeNode:
    """A server as a process, on the Podman in memory or a real one, that joins the head."""

    def make(name: str, *flags: str, podman: Path | None = None, **variables: str) -> Server:
        port = stack.enter_context(local_registry.held_port())
        module = "tests.runtime.fake_server" if podman is None else "slurm_runtime.api_server"
        argv = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), "--cpus", "2"]
        log = tmp_path / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*argv, "--head", head.url, "--node-name", name, *flags],
                cwd=CHECKOUT,
                env={**environment_for(podman or tmp_path / "none.sock", KEY), **variables},
                stdin=subprocess.DEVNULL,
                stderr=output,
                text=True,
            )
        stack.enter_context(process)
        stack.callback(process.kill)
        eventually(lambda: head.states().get(name) in {"ready", "draining"} or process.poll() is not None, DEADLINE_S)
        return Server(process, port, log, KEY)

    return make


def test_a_head_that_was_killed_goes_on_with_all_its_nodes(head: HeadProcess, make_node: MakeNode) -> None:
    make_node("cpu-a"), make_node("cpu-b")
    sandboxes = [head.server.start(session_id=f"s{number}").json() for number in range(3)]
    head.kill()
    assert all(httpx.get(f"{one['url']}/health", trust_env=False).status_code == 200 for one in sandboxes)
    with ThreadPoolExecutor(4) as pool:  # asked while no head is there: the socket keeps them
        asked = [pool.submit(head.server.request, "GET", f"/sessions/s{number}") for number in range(3)]
        again = pool.submit(head.server.start, session_id="s0")
        head.start("--stop-with-stdin")
        assert [one.result().json()["url"] for one in asked] == [one["url"] for one in sandboxes]
        assert again.result().json()["runtime_id"] == sandboxes[0]["runtime_id"]
    assert head.server.request("GET", "/list").json()["total"] == 3
    assert head.states() == {"cpu-a": "ready", "cpu-b": "ready"}


def test_a_node_that_is_killed_is_lost_with_its_own_sandboxes_alone(head: HeadProcess, make_node: MakeNode) -> None:
    array = {"SLURM_JOB_ID": "130", "SLURM_ARRAY_JOB_ID": "123", "SLURM_ARRAY_TASK_ID": "4"}
    make_node("cpu-a"), make_node("cpu-c")
    victim = make_node("cpu-b", **array)
    for number in range(3):
        assert head.server.start(session_id=f"s{number}").status_code == 201
    eventually(lambda: [node["used"] for node in head.server.request("GET", "/nodes").json()["nodes"]] == [1, 1, 1])
    victim.process.kill()
    eventually(lambda: head.states()["cpu-b"] == "lost", LOST_S)
    pods = {number: head.server.request("GET", f"/sessions/s{number}").json() for number in range(3)}
    assert sorted(pod["pod_status"] for pod in pods.values()) == ["failed", "ready", "ready"]
    [failed] = [pod for pod in pods.values() if pod["pod_status"] == "failed"]
    assert failed["pod_logs"].startswith("node cpu-b (job 123_4) was lost")


def test_a_node_that_ends_in_order_leaves_at_once(head: HeadProcess, make_node: MakeNode) -> None:
    node = make_node("cpu-b")
    assert head.server.start(session_id="theirs").status_code == 201
    node.process.terminate()
    assert node.wait() == 0
    assert head.states() == {"cpu-b": "left"}
    found = head.server.request("GET", "/sessions/theirs").json()
    assert found["status"] == "stopped"
    # It says goodbye while it removes its sandboxes: the head hears of the one or the other first.
    assert found["events"] in (["node cpu-b left: its API server was told to stop"], ["the server is stopping"])


def test_a_node_drains_before_its_end(head: HeadProcess, make_node: MakeNode) -> None:
    make_node("cpu-a", "--until", str(time.time() + 3600), "--drain-lead", "3700")
    eventually(lambda: head.states()["cpu-a"] == "draining")
    [told] = head.server.request("GET", "/nodes").json()["nodes"]
    assert "time limit" in told["reason"]
    assert told["until"] > time.time()


# Flags and ends.


def test_the_end_of_its_standard_input_ends_it_and_signals_do_not(head: HeadProcess) -> None:
    head.server.process.send_signal(signal.SIGTERM)
    assert head.server.answers()
    assert head.server.process.stdin is not None
    head.server.process.stdin.close()
    assert head.server.wait() == 0
    assert "the nodes go on by themselves" in head.log.read_text()


def test_a_start_in_the_line_hears_that_the_head_stops(head: HeadProcess) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(head.server.start, session_id="waits")
        eventually(lambda: head.server.request("GET", "/nodes").json()["waiting"] == 1, DEADLINE_S)
        assert head.server.process.stdin is not None
        head.server.process.stdin.close()
        answer = asked.result()
    assert (answer.status_code, answer.json()["detail"]) == (503, "the head is stopping and starts no more sandboxes")
    assert head.server.wait() == 0


def run(*flags: str, key: str | None = KEY, **variables: str) -> subprocess.CompletedProcess[str]:
    """A head that ends by itself."""
    argv = [sys.executable, "-m", "slurm_runtime.head", *flags]
    environment = {**environment_for(None, key), **variables}
    return subprocess.run(
        argv, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_a_wrong_command_line_is_2_and_says_what_is_wrong() -> None:
    assert "--stop-with-stdin" in run("--help").stdout
    for flags, words in (
        (("--port", "x"), "not a port"),
        (("--fd", "77"), "--fd 77 is not a socket"),
        (("--disable-auth",), "unrecognized arguments"),
        (("--api-key-file", "/nonesuch"), "/nonesuch cannot be read"),
    ):
        done = run(*flags)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert words in done.stderr


def test_a_port_that_is_taken_is_98() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("--host", "127.0.0.1", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 98
    assert "choose another --port" in done.stderr


# On real Podman.


@pytest.mark.podman
def test_two_servers_on_real_podman_behind_one_head(
    head: HeadProcess, make_node: MakeNode, rootless_podman: podman_service.Service
) -> None:
    nodes = [make_node(name, podman=rootless_podman.socket) for name in ("cpu-a", "cpu-b")]
    with ThreadPoolExecutor(4) as pool:
        starts = list(pool.map(lambda number: head.server.start(session_id=f"s{number}"), range(4)))
    sandboxes = [answer.json() for answer in starts]
    assert [answer.status_code for answer in starts] == [201] * 4
    eventually(lambda: _pods(head) == ["ready"] * 4, DEADLINE_S)
    assert [node.request("GET", "/node").json()["used"] for node in nodes] == [2, 2]
    assert [httpx.get(f"{one['url']}/ready", trust_env=False).status_code for one in sandboxes] == [200] * 4
    head.kill()
    head.start("--stop-with-stdin")
    assert _pods(head) == ["ready"] * 4
    for sandbox in sandboxes:
        assert head.server.request("POST", "/stop", {"runtime_id": sandbox["runtime_id"]}).status_code == 200
    assert rootless_podman.podman("ps", "--all", "--quiet") == ""
    for node in nodes:
        node.process.terminate()
    assert [node.wait() for node in nodes] == [0, 0]
    assert head.states() == {"cpu-a": "left", "cpu-b": "left"}


def _pods(head: HeadProcess) -> list[str]:
    return [head.server.request("GET", f"/sessions/s{number}").json()["pod_status"] for number in range(4)]
