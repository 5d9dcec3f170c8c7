"""A server that is killed, and the next one on its socket with --adopt: what clients see of their sandboxes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from slurm.lib.observe.sandbox_statistics import SandboxStatistics, read_statistics
from slurm_runtime.agent.tree import AgentTree
from slurm_runtime.ownership import process_mark
from slurm_runtime.podman import EngineFacts
from slurm_runtime.remains import monitors
from slurm_runtime.warden.proc import members, namespace_of
from tests.runtime import podman_service
from tests.runtime.agent_tree import COMMAND
from tests.runtime.commands import IMAGE, SERVE
from tests.runtime.test_contract import command, eventually
from tests.runtime.test_server_process import CHECKOUT, DEADLINE_S, KEY, Server, environment_for, frozen

pytestmark = pytest.mark.podman


class Lineage:
    """Servers one after the other on the same listening socket, as a runtime job keeps it."""

    def __init__(self, folder: Path, podman: podman_service.Service, flags: tuple[str, ...]) -> None:
        self.folder = folder
        self.podman = podman
        self.flags = flags
        self.identity = identity_of(podman)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None
        self.lives = 0

    def begin(self, *more: str) -> Server:
        """The next server; returns once it answers."""
        self.lives += 1
        log = self.folder / f"log-{self.lives}"
        argv = [sys.executable, "-m", "slurm_runtime.api_server", "--fd", str(self.listening.fileno())]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [*argv, "--public-host", "127.0.0.1", "--stop-timeout", "15", *self.flags, *more],
                cwd=CHECKOUT,
                env={**environment_for(self.podman.socket, KEY), "HOME": str(self.podman.home)},
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                **self.identity,
                pass_fds=[self.listening.fileno()],
                text=True,
            )
        made = Server(self.process, self.port, log, KEY)
        assert made.request("GET", "/health", timeout=DEADLINE_S).status_code == 200
        return made

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_S)
            finally:
                self.process.kill()
                self.process.wait()
        self.listening.close()


def identity_of(podman: podman_service.Service) -> dict[str, Any]:
    """Servers run as Podman's user, as in a job, where that one may read this checkout and its Python."""
    identity = podman.identity()
    with contextlib.suppress(PermissionError):
        argv = [sys.executable, "-c", "import slurm_runtime.manager"]
        if subprocess.run(argv, cwd=CHECKOUT, **identity, capture_output=True, check=False).returncode == 0:
            return identity
    return {}


MakeLineage = Callable[..., Lineage]


@contextlib.contextmanager
def lineages(folder: Path, podman: podman_service.Service) -> Iterator[MakeLineage]:
    """Make a socket for servers with these flags; nothing is left of them afterwards."""
    with contextlib.ExitStack() as stack:

        def make(*flags: str) -> Lineage:
            made = Lineage(folder, podman, ("--cpus", "40", *flags))
            stack.callback(made.close)
            return made

        yield make
    assert podman.containers() == []


@pytest.fixture
def lineage(tmp_path: Path, rootless_podman: podman_service.Service) -> Iterator[MakeLineage]:
    """On Podman of an ordinary user."""
    with lineages(tmp_path, rootless_podman) as make:
        yield make


def get(server: Server, path: str) -> dict[str, Any]:
    found: dict[str, Any] = server.request("GET", path).json()
    return found


def ready(server: Server, **fields: Any) -> dict[str, Any]:
    """A sandbox that is ready."""
    answer = server.start(**fields)
    assert answer.status_code == 201, answer.text
    runtime_id = answer.json()["runtime_id"]
    state = eventually(
        lambda: (found := get(server, f"/runtime/{runtime_id}"))["pod_status"] != "pending" and found, 120
    )
    assert state["pod_status"] == "ready", state
    return dict(state)


def figure(server: Server, name: str) -> float:
    text = server.request("GET", "/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


IDENTITY = ("runtime_id", "session_id", "url", "session_api_key", "image", "status", "pod_status")


def identity(sandbox: dict[str, Any]) -> dict[str, Any]:
    return {name: sandbox[name] for name in IDENTITY}


def holder_of(podman: podman_service.Service, sandbox: dict[str, Any]) -> int:
    return int(podman.podman("inspect", "--format", "{{.State.Pid}}", f"sandbox-{sandbox['runtime_id']}"))


def test_running_sandboxes_are_taken_over_with_all_that_they_had(lineage: MakeLineage) -> None:
    servers = lineage()
    first = servers.begin()
    with ThreadPoolExecutor(4) as pool:
        before = list(pool.map(lambda n: ready(first, session_id=f"s{n}", resource_factor=1 + n % 2), range(4)))
    servers.kill()
    second = servers.begin("--adopt")
    began = time.monotonic()
    listed = get(second, "/list")
    took_s = time.monotonic() - began
    assert took_s < 5
    assert listed["total"] == 4
    # One that answers late, as where the machine is busy, is found as not ready yet.
    eventually(lambda: {get(second, f"/sessions/s{n}")["pod_status"] for n in range(4)} == {"ready"}, 30)
    after = [get(second, f"/sessions/s{n}") for n in range(4)]
    assert [identity(one) for one in after] == [identity(one) for one in before]
    assert {httpx.get(f"{one['url']}/health", trust_env=False).status_code for one in after} == {200}
    assert figure(second, "skyrl_slots_used") == 6
    assert figure(second, 'skyrl_sandboxes{state="ready"}') == 4
    # A living session is found, not started again; a new one gets other slots and another port.
    assert ready(second, session_id="s0")["runtime_id"] == before[0]["runtime_id"]
    new = ready(second, session_id="new")
    assert new["url"] not in {one["url"] for one in before}
    assert figure(second, "skyrl_slots_used") == 7
    # The kernel tells of their ends, and a stop frees what they held.
    os.kill(holder_of(servers.podman, before[1]), signal.SIGKILL)
    eventually(lambda: get(second, "/sessions/s1")["pod_status"] == "failed")
    assert second.request("POST", "/stop", {"runtime_id": before[0]["runtime_id"]}).status_code == 200
    eventually(lambda: figure(second, "skyrl_slots_used") == 4)


@pytest.mark.parametrize("podman", ["rootless", "root"])  # stopped one by one, frozen by a cgroup
def test_what_was_paused_stays_paused_and_can_be_resumed(
    podman: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with lineages(tmp_path, request.getfixturevalue(f"{podman}_podman")) as make:
        stays_paused(make())


def stays_paused(servers: Lineage) -> None:
    first = servers.begin()
    sandbox = ready(first, session_id="sleeper")
    assert first.request("POST", "/pause", {"runtime_id": sandbox["runtime_id"]}).json()["status"] == "paused"
    servers.kill()
    second = servers.begin("--adopt")
    found = get(second, "/sessions/sleeper")
    assert (found["status"], found["runtime_id"], found["url"]) == ("paused", sandbox["runtime_id"], sandbox["url"])
    with pytest.raises(httpx.TimeoutException):
        httpx.get(f"{sandbox['url']}/health", timeout=0.3, trust_env=False)
    assert second.request("POST", "/resume", {"runtime_id": sandbox["runtime_id"]}).json()["status"] == "running"
    eventually(lambda: get(second, "/sessions/sleeper")["pod_status"] == "ready")
    assert httpx.get(f"{sandbox['url']}/health", trust_env=False).status_code == 200


def test_one_that_died_in_between_has_failed_with_its_exit_code_and_one_half_made_can_be_started_again(
    lineage: MakeLineage,
) -> None:
    servers = lineage()
    first = servers.begin()
    sandbox = ready(first, session_id="victim")
    labels = servers.podman.podman("inspect", "--format", "{{json .Config.Labels}}", f"sandbox-{sandbox['runtime_id']}")
    servers.kill()
    flags = [word for name, value in json.loads(labels).items() for word in ("--label", f"{name}={value}")]
    flags += ["--label", "skyrl.session=half", "--env", "SESSION_API_KEY=a-key"]
    servers.podman.podman("create", "--quiet", "--name", "sandbox-half", *flags, IMAGE, "sleep", "9")
    os.kill(holder_of(servers.podman, sandbox), signal.SIGKILL)
    second = servers.begin("--adopt")
    dead = get(second, "/sessions/victim")
    assert (dead["runtime_id"], dead["pod_status"]) == (sandbox["runtime_id"], "failed")
    assert "137 (SIGKILL), while no API server was there" in dead["pod_logs"]
    half = get(second, "/sessions/half")
    assert half["pod_status"] == "failed"
    assert "cut off when the API server was killed" in half["pod_logs"]
    assert get(second, "/list")["total"] == 0
    eventually(lambda: servers.podman.containers() == [])
    assert figure(second, "skyrl_slots_used") == 0
    assert ready(second, session_id="half")["runtime_id"] != "half"


def test_a_start_in_flight_is_asked_for_again_and_is_one_sandbox(lineage: MakeLineage) -> None:
    """Killed at moments spread over a start: the client's second try gets a sandbox, and nothing else is left."""
    servers = lineage()
    server = servers.begin()
    for number, delay_s in enumerate((0.05, 0.2, 0.4)):
        with ThreadPoolExecutor(1) as pool:
            wish = {"image": IMAGE, "command": SERVE, "session_id": f"s{number}"}
            # One that the killed server had not accepted yet would wait in the socket's queue for the next one.
            cut_off = pool.submit(server.request, "POST", "/start", wish, timeout=2)
            time.sleep(delay_s)
            servers.kill()
            with contextlib.suppress(httpx.TransportError):
                cut_off.result()
        server = servers.begin("--adopt")
        sandbox = ready(server, session_id=f"s{number}")
        assert httpx.get(f"{sandbox['url']}/health", trust_env=False).status_code == 200
        living = {f"sandbox-{entry['runtime_id']}" for entry in get(server, "/list")["runtimes"]}
        assert len(living) == number + 1
        # What Podman was still asked for by the killed server appears later, and is swept then.
        eventually(lambda living=living: set(servers.podman.containers()) == living)  # type: ignore[misc]


def test_one_that_had_failed_before_is_known_with_its_reason(
    lineage: MakeLineage, rootless_podman: podman_service.Service
) -> None:
    """Its session had no other one since; of a session that had, the next server knows that other one, or none."""
    failures = rootless_podman.home / "failures"
    servers = lineage("--failures-file", str(failures))
    first = servers.begin()
    victims = [ready(first, session_id=f"s{number}") for number in range(3)]
    for victim in victims:
        os.kill(holder_of(servers.podman, victim), signal.SIGKILL)
    paths = [f"/runtime/{victim['runtime_id']}" for victim in victims]
    eventually(lambda: all(get(first, path)["pod_status"] == "failed" for path in paths))
    before = get(first, "/sessions/s0")
    again, other = ready(first, session_id="s1"), ready(first, session_id="s2")
    assert first.request("POST", "/stop", {"runtime_id": other["runtime_id"]}).status_code == 200
    servers.kill()
    second = servers.begin("--adopt")
    found = get(second, "/sessions/s0")
    assert "137 (SIGKILL)" in found["pod_logs"]
    assert {**found, "session_api_key": before["session_api_key"]} == before
    assert get(second, "/sessions/s1")["runtime_id"] == again["runtime_id"]
    assert second.request("GET", "/sessions/s2").status_code == 404
    assert get(second, paths[2])["pod_status"] == "failed"
    assert get(second, "/list")["total"] == 1
    assert failures.stat().st_mode & 0o777 == 0o600
    assert ready(second, session_id="s0")["runtime_id"] != before["runtime_id"]


def test_the_next_server_goes_on_counting(lineage: MakeLineage, rootless_podman: podman_service.Service) -> None:
    path = rootless_podman.home / "statistics.json"

    def counted() -> SandboxStatistics | None:
        return read_statistics(path.read_text()) if path.exists() else None

    def ended(reasons: dict[str, int]) -> bool:
        found = counted()
        return found is not None and found.ended == reasons and found.starts.succeeded == 2

    servers = lineage("--statistics-file", str(path))
    first = servers.begin()
    ready(first, session_id="s0")
    other = ready(first, session_id="s1")
    assert first.request("POST", "/stop", {"runtime_id": other["runtime_id"]}).status_code == 200
    eventually(lambda: ended({"stopped on request": 1}), 30)
    servers.kill()
    second = servers.begin("--adopt")
    ready(second, session_id="s2")
    servers.close()
    found = counted()
    assert found is not None
    assert (found.starts.asked, found.starts.succeeded, found.start_seconds.count) == (3, 3, 3)
    assert found.ended == {"stopped on request": 1, "the API server stopped": 2}
    assert (found.peak_living, found.slots, found.steps["create"].count) == (2, 40, 3)
    assert path.stat().st_mode & 0o777 == 0o600


def cut_off(servers: Lineage, server: Server, facts: EngineFacts) -> Server:
    """Kill Podman's service and the server at once while a container of session "cut" starts; the next server."""
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(server.start, session_id="cut")
        while not monitors(facts):
            assert not starting.done() or monitors(facts)
        servers.podman.kill()
        servers.kill()
        with contextlib.suppress(httpx.TransportError):
            starting.result()
    servers.podman.begin()
    return servers.begin("--adopt")


def test_what_a_start_leaves_that_both_deaths_cut_off_is_ended(lineage: MakeLineage) -> None:
    """The next server removes the container, and ends what Podman does not know of it."""
    servers = lineage()
    server = servers.begin()
    facts = servers.podman.facts()
    for _ in range(10):  # on a busy machine the container may run by the time that its monitor is seen
        server = cut_off(servers, server, facts)
        found = get(server, "/sessions/cut")
        if found["pod_status"] == "failed":
            break
        server.request("POST", "/stop", {"runtime_id": found["runtime_id"]})
        eventually(lambda: monitors(facts) == [])
    assert "cut off when the API server was killed" in found["pod_logs"]
    eventually(lambda: servers.podman.containers() == [] and monitors(facts) == [])


def test_a_container_that_appears_after_the_first_look_is_removed_too(lineage: MakeLineage) -> None:
    servers = lineage()
    servers.begin()
    assert servers.process is not None
    mark = process_mark(servers.process.pid)
    servers.kill()
    second = servers.begin("--adopt")
    assert get(second, "/list")["total"] == 0
    servers.podman.podman("create", "--quiet", "--name", "late", "--label", f"skyrl.server={mark}", IMAGE, "true")
    eventually(lambda: servers.podman.containers() == [], 45)


def test_forked_agent_servers_live_on_and_their_end_is_noticed(lineage: MakeLineage, agent_tree: AgentTree) -> None:
    servers = lineage("--agent-dir", str(agent_tree.root), "--agent-start", "fork")
    first = servers.begin()
    eventually(lambda: "fork server: ready" in first.log(), 60)
    sandboxes = [ready(first, session_id=name, command=COMMAND) for name in ("a", "b", "c")]
    holders = [holder_of(servers.podman, sandbox) for sandbox in sandboxes]
    forked = [agent_server_in(holder) for holder in holders]
    assert first.request("POST", "/pause", {"runtime_id": sandboxes[2]["runtime_id"]}).json()["status"] == "paused"
    servers.kill()
    second = servers.begin("--adopt")
    eventually(lambda: {get(second, f"/sessions/{name}")["pod_status"] for name in ("a", "b")} == {"ready"}, 30)
    after = [get(second, f"/sessions/{name}") for name in ("a", "b", "c")]
    assert [one["pod_status"] for one in after[:2]] == ["ready", "ready"]
    assert after[2]["status"] == "paused"
    assert [agent_server_in(holder) for holder in holders] == forked
    assert command(after[0], "echo on")["stdout"] == "on\n"
    resumed = second.request("POST", "/resume", {"runtime_id": sandboxes[2]["runtime_id"]}, timeout=60)
    assert resumed.json()["status"] == "running"
    # The container of a forked server idles on without it: the end of the server itself is watched.
    os.kill(forked[1], signal.SIGKILL)
    dead = eventually(lambda: (found := get(second, "/sessions/b"))["pod_status"] == "failed" and found)
    assert "its agent server ended" in dead["pod_logs"]
    # The same once more, with one whose server is gone before the next API server comes.
    servers.kill()
    os.kill(forked[0], signal.SIGKILL)
    third = servers.begin("--adopt")
    assert "its agent server was gone" in get(third, "/sessions/a")["pod_logs"]
    eventually(lambda: get(third, "/sessions/c")["pod_status"] == "ready")
    assert agent_server_in(holders[2]) == forked[2]


def agent_server_in(holder: int) -> int:
    """The forked agent server of a container."""
    found = [
        pid
        for pid in members(namespace_of(holder))
        if pid != holder and Path(f"/proc/{pid}/comm").read_text().strip() == "agent-server"
    ]
    assert len(found) == 1
    return found[0]


def test_thirty_two_sandboxes_are_taken_over_in_seconds(lineage: MakeLineage) -> None:
    servers = lineage("--starters", "8")
    first = servers.begin()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: ready(first, session_id=f"s{n}"), range(32)))
    servers.kill()
    second = servers.begin("--adopt")
    assert get(second, "/list")["total"] == 32
    said = re.search(r"32 sandboxes .* are taken over, 0 of them paused, in ([\d.]+) s", second.log())
    assert said
    assert float(said[1]) < 3


def test_without_the_flag_they_are_removed(lineage: MakeLineage) -> None:
    servers = lineage()
    ready(servers.begin(), session_id="s")
    servers.kill()
    second = servers.begin()
    eventually(lambda: servers.podman.containers() == [])
    assert second.request("GET", "/sessions/s").status_code == 404


def test_no_request_is_answered_before_all_sandboxes_are_known(lineage: MakeLineage) -> None:
    servers = lineage()
    sandbox = ready(servers.begin(), session_id="s")
    servers.kill()
    with frozen(servers.podman):
        second = servers.begin("--adopt")  # /health is answered: it is not about sandboxes
        with ThreadPoolExecutor(4) as pool:
            paths = ("/sessions/s", f"/runtime/{sandbox['runtime_id']}", "/list", "/metrics")
            waiting = [pool.submit(second.request, "GET", path) for path in paths]
            assert second.request("POST", "/heartbeat/trainer").status_code == 200
            time.sleep(0.5)
            assert not any(future.done() for future in waiting)
            os.kill(servers.podman.server_pid(), signal.SIGCONT)
            answers = [future.result() for future in waiting]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert answers[2].json()["total"] == 1


def test_a_server_that_stops_before_it_has_taken_over_removes_what_it_should_have(lineage: MakeLineage) -> None:
    servers = lineage()
    ready(servers.begin(), session_id="s")
    servers.kill()
    with frozen(servers.podman):
        second = servers.begin("--adopt", "--stop-timeout", "10")
        second.process.terminate()
        time.sleep(0.3)
        os.kill(servers.podman.server_pid(), signal.SIGCONT)
        assert second.wait() == 0
    assert servers.podman.containers() == []
