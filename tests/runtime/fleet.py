"""A head in this process over API servers in this process, asked over HTTP as one server is."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from slurm_runtime.api_server import build_parser, http_server, listening_socket
from slurm_runtime.head.app import Head, create_app
from slurm_runtime.head.config import HeadConfig
from tests.runtime.conftest import API_KEY, Api
from tests.runtime.fake_podman import FakePodman

HEAD_CONFIG = HeadConfig(API_KEY, string_patience_s=20.0, list_patience_s=20.0, gather_s=0.0)


@dataclass
class FleetEngine:
    """The engines of several servers as one; ``shares`` says that they are of one Podman."""

    nodes: Sequence[Api]
    shares: bool

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        async def on_the_right_one(name: str, *more: Any) -> Any:
            node = next((node for node in self.nodes if not self.shares and name in _containers(node)), self.nodes[0])
            return await _there(node, verb, name, *more)

        return on_the_right_one

    async def list(self, label: str) -> list[Any]:
        nodes = self.nodes[:1] if self.shares else self.nodes
        return [found for node in nodes for found in await _there(node, "list", label)]


def _containers(node: Api) -> Any:
    assert isinstance(node.engine, FakePodman)
    return node.engine.containers


async def _there(node: Api, verb: str, *arguments: Any) -> Any:
    """A verb of a node's engine in the loop of that node."""
    work = getattr(node.engine, verb)(*arguments)
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, node.loop))


@dataclass
class FleetSlots:
    """As ``manager.admission.slots`` and ``manager.launcher.ports`` of one server, of several."""

    nodes: Sequence[Api]

    @property
    def admission(self) -> FleetSlots:
        return self

    @property
    def slots(self) -> FleetSlots:
        return self

    @property
    def launcher(self) -> FleetSlots:
        return self

    @property
    def ports(self) -> FleetSlots:
        return self

    @property
    def used(self) -> int:
        return sum(node.manager.admission.slots.used for node in self.nodes)

    @property
    def total(self) -> int:
        return sum(node.manager.admission.slots.total for node in self.nodes)

    @property
    def taken(self) -> set[int]:
        return {port for node in self.nodes for port in node.manager.launcher.ports.taken}


@dataclass
class HeadApi(Api):
    """A head; its ``engine`` and ``manager`` stand for those of all nodes."""

    head: Head = field(kw_only=True)
    nodes: list[Api] = field(default_factory=list, kw_only=True)

    def join(self, node: Api, **more: Any) -> httpx.Response:
        """Register a node, as it does by itself again and again."""
        wish = {"name": node.manager.node.name, "url": url_of(node), "boot": node.manager.node.boot, **more}
        return self.client.post("/nodes", json=wish)

    def states(self) -> dict[str, str]:
        return {node["name"]: node["state"] for node in self.client.get("/nodes").json()["nodes"]}

    def call(self, work: Callable[[], Any]) -> Any:
        """Do something in the head's loop."""

        async def there() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(there(), self.loop).result(10)


def url_of(api: Api) -> str:
    return str(api.client.base_url).rstrip("/")


@contextlib.contextmanager
def head_over(nodes: Sequence[Api], config: HeadConfig = HEAD_CONFIG, shares: bool = False) -> Iterator[HeadApi]:
    """A head on a free port, in a thread, which all ``nodes`` have joined and that has heard them out."""
    listening = listening_socket(build_parser().parse_args(["--host", "127.0.0.1", "--port", "0"]))
    port = listening.getsockname()[1]
    started = threading.Event()
    box: dict[str, Any] = {}

    async def live() -> None:
        head = Head.of(config)
        server = http_server(create_app(head, config))
        box.update(head=head, loop=asyncio.get_running_loop(), stop=asyncio.Event())
        tasks = [asyncio.create_task(server.serve(sockets=[listening])), asyncio.create_task(head.run())]
        started.set()
        await box["stop"].wait()
        tasks[1].cancel()
        head.starts.close()
        server.should_exit = True
        await asyncio.wait(tasks, timeout=5)
        await head.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    started.wait(10)
    address = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=address, headers={"X-API-Key": API_KEY}, timeout=60, trust_env=False) as client:
        try:
            joined = [*nodes]
            engine: Any = FleetEngine(joined, shares)
            manager: Any = FleetSlots(joined)
            api = HeadApi(
                client,
                engine,
                manager,
                box["loop"],
                any(node.agent for node in nodes),
                head=box["head"],
                nodes=joined,
            )
            for node in nodes:
                assert api.join(node).status_code == 200
            _await_ready(api, len(nodes))
            yield api
        finally:
            box["loop"].call_soon_threadsafe(box["stop"].set)
            thread.join(30)
    assert not thread.is_alive()


def _await_ready(api: HeadApi, count: int) -> None:
    deadline = time.monotonic() + 10
    while list(api.states().values()).count("ready") < count:
        assert time.monotonic() < deadline, api.client.get("/nodes").text
        time.sleep(0.02)
