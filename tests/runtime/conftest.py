"""An API server in this process, on a fake Podman or a real one, asked over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
import pytest

from slurm_runtime.agent.tree import AgentTree
from slurm_runtime.agent_support import AgentSupport
from slurm_runtime.api_server import http_server, listening_socket
from slurm_runtime.app import create_app
from slurm_runtime.config import ServerConfig
from slurm_runtime.heartbeats import Heartbeats
from slurm_runtime.manager import Manager
from slurm_runtime.podman import Podman
from slurm_runtime.readiness import Prober
from slurm_runtime.slots import Slots
from slurm_runtime.warden.client import Warden
from tests.runtime import podman_service
from tests.runtime.agent_tree import COMMAND, tests_tree
from tests.runtime.commands import SERVE
from tests.runtime.fake_podman import FakePodman
from tests.users import ordinary_user, subordinate_uids

T = TypeVar("T")

API_KEY = "the-key-of-these-tests"
CONFIG = ServerConfig(
    api_key=API_KEY,
    public_host="127.0.0.1",
    labels={"skyrl.job": "4711"},
    string_patience_s=20.0,
    list_patience_s=20.0,
    connect_timeout_s=5.0,
    watch_period_s=0.2,
)


class KillablePodman(Podman):
    """The real door with one verb more, for tests that do harm."""

    async def kill(self, name: str) -> None:
        await self._ask("POST", f"/containers/{name}/kill?signal=KILL", 10)


@dataclass
class Api:
    """A running server: a client with the key, its engine and manager, and a way into its event loop."""

    client: httpx.Client
    engine: FakePodman | KillablePodman
    manager: Manager
    loop: asyncio.AbstractEventLoop
    agent: bool = False

    @property
    def serve(self) -> str | list[str]:
        """The command of a sandbox that serves: busybox, or the mounted agent server."""
        return COMMAND if self.agent else SERVE

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def start(self, **fields: Any) -> httpx.Response:
        return self.client.post("/start", json=fields)

    def holder_of(self, sandbox: Mapping[str, Any]) -> int:
        """The first process of a sandbox's container."""
        return self.run(self.engine.inspect(f"sandbox-{sandbox['runtime_id']}")).pid

    def names(self) -> list[str]:
        """Names of the containers that this server's Podman holds."""
        return [state.name for state, _ in self.run(self.engine.list("skyrl.server"))]


@contextlib.contextmanager
def serving(
    engine: FakePodman | KillablePodman,
    config: ServerConfig = CONFIG,
    slots: int | Slots = 20,
    tree: AgentTree | None = None,
    warden: bool = False,
    has_agent: bool = False,
) -> Iterator[Api]:
    """A server on a free port, in a thread; its sandboxes are removed at the end.

    With a ``tree`` agent servers are mounted, started as ``config.agent_start`` says; once it returns they can be.
    """
    from slurm_runtime.api_server import build_parser

    listening = listening_socket(build_parser().parse_args(["--host", "127.0.0.1", "--port", "0"]))
    port = listening.getsockname()[1]
    started = threading.Event()
    box: dict[str, Any] = {}

    async def live() -> None:
        prober = Prober()
        agent = AgentSupport(wants_fork=tree is not None and config.agent_start == "fork")
        if not has_agent:
            agent.provide(tree)
        shares = Slots(slots, config.cpus_per_worker) if isinstance(slots, int) else slots
        manager = Manager(config, engine, prober, shares, agent, Warden if warden else None, prober.idle_s)
        server = http_server(create_app(manager, config, Heartbeats()))
        box.update(manager=manager, loop=asyncio.get_running_loop(), stop=asyncio.Event())
        tasks = [asyncio.create_task(server.serve(sockets=[listening])), asyncio.create_task(manager.run())]
        started.set()
        await box["stop"].wait()
        tasks[1].cancel()
        box["left"] = await manager.close(20)
        server.should_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)
        await prober.close()
        await engine.close()

    # A daemon: one that does not end fails its test, and must not keep pytest from ending after all others.
    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    started.wait(10)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": API_KEY}, timeout=60, trust_env=False
    ) as client:
        try:
            api = Api(client, engine, box["manager"], box["loop"], has_agent or tree is not None)
            if tree is not None and config.agent_start == "fork":
                _await_fork_server(api)
            yield api
        finally:
            box["loop"].call_soon_threadsafe(box["stop"].set)
            thread.join(90)  # a copy of an agent tree has 20,000 files to remove
    assert not thread.is_alive(), "\n".join(str(task) for task in asyncio.all_tasks(box["loop"]))
    assert box["left"] == []


def _await_fork_server(api: Api) -> None:
    deadline = time.monotonic() + 60
    while not api.manager.agent.fork_ready:
        assert time.monotonic() < deadline, api.manager.agent.why_exec
        time.sleep(0.05)


@pytest.fixture(scope="session")
def agent_tree() -> AgentTree:
    """The tests' agent tree."""
    return tests_tree()


@pytest.fixture
def fake() -> Iterator[Api]:
    """A server on the fake."""
    with serving(FakePodman()) as api:
        yield api


@pytest.fixture
def server_with() -> Iterator[Callable[..., Api]]:
    """Make a server on a given fake, with changes to the configuration."""
    with contextlib.ExitStack() as stack:

        def make(engine: FakePodman | None = None, slots: int = 20, **changes: Any) -> Api:
            return stack.enter_context(serving(engine or FakePodman(), replace(CONFIG, **changes), slots))

        yield make


def _lend(owner: pwd.struct_passwd | None, why_not: str) -> Iterator[podman_service.Service]:
    lacks = podman_service.missing()
    if lacks or owner is None:
        pytest.skip(f"real Podman: {why_not if owner is None else 'this machine lacks ' + lacks}")
    with podman_service.running(owner) as service:
        yield service


@pytest.fixture(scope="session")
def rootless_podman() -> Iterator[podman_service.Service]:
    """Podman of an ordinary user."""
    owner = ordinary_user()
    has_ids = bool(subordinate_uids(owner.pw_name))
    yield from _lend(owner if has_ids else None, f"{owner.pw_name} has no range in /etc/subuid")


@pytest.fixture(scope="session")
def root_podman() -> Iterator[podman_service.Service]:
    """Podman of root."""
    yield from _lend(pwd.getpwuid(0) if os.geteuid() == 0 else None, "only root can run root's Podman")


SERVERS = ("fake", *(pytest.param(kind, marks=pytest.mark.podman) for kind in ("rootless", "root", "fork", "exec")))
# For a test that looks into one server, or asks for what it does by itself; and for one in which head and Podman meet.
ONE_SERVER = pytest.mark.parametrize("api", SERVERS, indirect=True)
REAL_HEAD_TOO = pytest.mark.parametrize(
    "api", [*SERVERS, "head", pytest.param("rootless-head", marks=pytest.mark.podman)], indirect=True
)


@pytest.fixture(params=[*SERVERS, "head"])
def api(request: pytest.FixtureRequest) -> Iterator[Api]:
    """The server of the contract: on the fake, on real Podman as an ordinary user and as root, and as an ordinary
    user with the real agent server, forked and as a plain program. With ``head``, a head over two such servers."""
    if "head" in request.param:
        from tests.runtime.fleet import head_over

        with contextlib.ExitStack() as stack:
            yield stack.enter_context(head_over(*two_nodes(request, stack)))
    elif request.param == "fake":
        with serving(FakePodman()) as server:
            yield server
    elif request.param in {"fork", "exec"}:
        service = request.getfixturevalue("rootless_podman")
        tree = request.getfixturevalue("agent_tree")
        config = replace(CONFIG, agent_start=request.param, string_patience_s=120.0, ready_grace_s=15.0)
        with serving(KillablePodman(service.socket), config, tree=tree, warden=True) as server:
            yield server
    else:
        service = request.getfixturevalue(f"{request.param}_podman")
        with serving(KillablePodman(service.socket), warden=True) as server:
            yield server


def two_nodes(request: pytest.FixtureRequest, stack: contextlib.ExitStack) -> tuple[list[Api], Any, bool]:
    """Two servers on fakes, or both on the real Podman of an ordinary user; the head's configuration, and which."""
    from tests.runtime.fleet import HEAD_CONFIG

    is_fake = request.param == "head"
    service = None if is_fake else request.getfixturevalue("rootless_podman")
    nodes = [
        stack.enter_context(
            serving(
                FakePodman() if service is None else KillablePodman(service.socket),
                replace(CONFIG, node_name=name),
                slots=10,
                warden=not is_fake,
            )
        )
        for name in ("cpu-a", "cpu-b")
    ]
    return nodes, HEAD_CONFIG, not is_fake
