"""A server that is killed, and the next one on its socket with --adopt: what clients see of their sandboxes."""

from __future__ import annotations

import contextlib
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

from tests.runtime import podman_service
from tests.runtime.test_contract import eventually
from tests.runtime.test_server_process import CHECKOUT, DEADLINE_S, KEY, Server, environment_for

pytestmark = pytest.mark.podman


class Lineage:
    """Servers one after the other on the same listening socket, as a runtime job keeps it."""

    def __init__(self, folder: Path, podman: podman_service.Service, flags: tuple[str, ...]) -> None:
        self.folder = folder
        self.podman = podman
        self.flags = flags
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
                [*argv, "--public-host", "127.0.0.1", *self.flags, *more],
                cwd=CHECKOUT,
                env=environment_for(self.podman.socket, KEY),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
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


MakeLineage = Callable[..., Lineage]


@pytest.fixture
def lineage(tmp_path: Path, rootless_podman: podman_service.Service) -> Iterator[MakeLineage]:
    """Make a socket for servers with these flags; nothing is left of them afterwards."""
    with contextlib.ExitStack() as stack:

        def make(*flags: str) -> Lineage:
            made = Lineage(tmp_path, rootless_podman, ("--cpus", "40", *flags))
            stack.callback(made.close)
            return made

        yield make
    assert rootless_podman.containers() == []


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
    began = time.monotonic()
    second = servers.begin("--adopt")
    listed = get(second, "/list")
    took_s = time.monotonic() - began
    assert took_s < 5
    assert listed["total"] == 4
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
