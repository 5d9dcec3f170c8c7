#!/usr/bin/env python3
"""All simulated nodes of a benchmark in one process: they listen, register with the head, leave and die when told to.

    python benchmarks/simulator/process.py --head URL --key-file FILE [--slots 64] [--images 20]

Prints the URL of its control port. POST /add?count=N starts nodes, /leave, /kill and /mute end N of the oldest in
order, at once, or by silence; each answers with their names and the sessions that lived there. GET /times tells when
the nodes got and answered each start since the last such question, by the monotonic clock that clients read too. It
ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import itertools
import json
import random
import resource
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.simulator.delays import read
from benchmarks.simulator.http import BadAnswer, Call, Connection, Served, address_of
from benchmarks.simulator.node import Node
from slurm_runtime.node_models import BEAT_S

CONTROL_BACKLOG = 16
BACKLOG = 512


def image_names(count: int) -> list[str]:
    """As long as those of a dataset's images."""
    return [
        f"docker.io/dataset/sweb.eval.x86_64.project_{number:03}.commit-{number:012x}:latest" for number in range(count)
    ]


@dataclass
class Life:
    """A node with what it listens and beats by."""

    node: Node
    server: asyncio.Server
    connections: set[Served]
    head: Connection | None
    beating: asyncio.Task[None] | None = None


@dataclass
class Simulator:
    """The nodes that live, by name, in the order of their birth."""

    arguments: argparse.Namespace
    key: str
    chance: random.Random
    lives: dict[str, Life] = field(default_factory=dict)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    muted: list[Life] = field(default_factory=list)
    doing: asyncio.Task[None] | None = None
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def add(self, count: int) -> list[str]:
        return [await self._born() for _ in range(count)]

    async def _born(self) -> str:
        loop, name = asyncio.get_running_loop(), f"cpu-{next(self.numbers):04}"
        connections: set[Served] = set()
        # The node needs its URL and its server the node: the port is known only now.
        handlers: list[Node] = []
        server = await loop.create_server(
            lambda: Served(lambda call: handlers[0].handle(call), connections), "127.0.0.1", 0, backlog=BACKLOG
        )
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        images, slots = image_names(self.arguments.images), self.arguments.slots
        node = Node(name, url, slots, images, read(), loop.call_later, self.key, self.times, self.chance)
        handlers.append(node)
        life = Life(node, server, connections, None)
        if self.arguments.head != "none":
            life.head = Connection(*address_of(self.arguments.head), self.key)
            life.beating = asyncio.create_task(self._beat(life, life.head))
        self.lives[name] = life
        return name

    async def _beat(self, life: Life, head: Connection) -> None:
        """Register every ``BEAT_S`` seconds, whatever the head answers; a head that is away is asked again."""
        job = f"100_{int(life.node.name.rpartition('-')[2])}"
        wish = {"name": life.node.name, "url": life.node.url, "boot": life.node.boot, "job": job}
        body = json.dumps(wish).encode()
        while True:
            with contextlib.suppress(OSError, BadAnswer):
                status, answer = await head.request("POST", "/nodes", body)
                if status >= 300:
                    print(f"the head answered {status} to {life.node.name}: {answer[:300]!r}", file=sys.stderr)
            await asyncio.sleep(BEAT_S * self.chance.uniform(0.95, 1.05))

    def taken(self, count: int) -> list[Life]:
        return [self.lives.pop(name) for name in list(self.lives)[:count]]

    async def leave(self, lives: Sequence[Life]) -> None:
        """As a worker whose job ends: it says so, and is gone."""
        for life in lives:
            self._stop_beating(life)
            connection = Connection(*address_of(self.arguments.head), self.key)
            with contextlib.suppress(OSError, BadAnswer):
                await connection.request("DELETE", f"/nodes/{life.node.name}?reason=its+job+ended")
            connection.close()
            self._vanish(life)

    def kill(self, lives: Sequence[Life]) -> None:
        """As a process that is killed: its connections are closed, nothing answers."""
        for life in lives:
            self._stop_beating(life)
            self._vanish(life)

    def mute(self, lives: Sequence[Life]) -> None:
        """As a machine that has lost its network: connections stand, and nothing answers."""
        for life in lives:
            self._stop_beating(life)
            life.node.is_mute = True
            self.muted.append(life)

    def _stop_beating(self, life: Life) -> None:
        if life.beating:
            life.beating.cancel()
            life.beating = None
        if life.head:
            life.head.close()

    def _vanish(self, life: Life) -> None:
        life.node.is_mute = True
        life.server.close()
        for connection in list(life.connections):
            connection.transport.abort()

    # The control port.

    def handle(self, call: Call) -> None:
        parts = urlsplit(call.target)
        count = int(parse_qs(parts.query).get("count", ["0"])[0])
        if parts.path == "/times":
            times = {session: pair for session, pair in self.times.items() if pair[1]}
            for session in times:
                del self.times[session]
            call.answer_json(200, times)
        elif parts.path == "/nodes":
            found = {life.node.name: {"url": life.node.url, "used": life.node.used} for life in self.lives.values()}
            call.answer_json(200, found)
        else:
            self.doing = asyncio.get_running_loop().create_task(self._surely(call, parts.path, count))

    async def _surely(self, call: Call, path: str, count: int) -> None:
        try:
            await self._do(call, path, count)
        except Exception as problem:  # else the benchmark would wait for its answer
            call.answer_json(500, {"detail": repr(problem)})

    async def _do(self, call: Call, path: str, count: int) -> None:
        if path == "/add":
            call.answer_json(200, {"nodes": await self.add(count)})
            return
        lives = self.taken(count)
        found = {life.node.name: life.node.living for life in lives}
        if path == "/leave":
            await self.leave(lives)
        elif path in {"/kill", "/mute"}:
            (self.kill if path == "/kill" else self.mute)(lives)
        else:
            call.answer_json(404, {"detail": "Not Found"})
        call.answer_json(200, {"nodes": found})


async def until_stdin_ends() -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def read_on() -> None:
        while sys.stdin.buffer.read(1024):
            pass
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=read_on, daemon=True).start()
    await ended.wait()


async def serve(arguments: argparse.Namespace) -> None:
    simulator = Simulator(arguments, arguments.key_file.read_text().strip(), random.Random(arguments.seed))
    served = functools.partial(Served, simulator.handle, set())
    control = await asyncio.get_running_loop().create_server(served, "127.0.0.1", 0, backlog=CONTROL_BACKLOG)
    print(f"http://127.0.0.1:{control.sockets[0].getsockname()[1]}", flush=True)
    gc.freeze()
    await until_stdin_ends()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", default="none", help="URL of the head; none: the nodes register nowhere")
    parser.add_argument("--key-file", type=Path, required=True, help="file with the API key")
    parser.add_argument("--slots", type=int, default=64, help="slots of a node")
    parser.add_argument("--images", type=int, default=20, help="images in the store of a node")
    parser.add_argument("--seed", type=int, default=7, help="of the drawn delays")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(serve(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
