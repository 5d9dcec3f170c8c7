#!/usr/bin/env python3
"""Clients of the head, as the SDK's are: look for the session, start it, look until it is ready, hold it, stop it.

One process. Starts are due at random moments with a given rate, whether the answers come or not ("open loop"), and a
start is counted from the moment at which it was due, so that a stall counts for every start that it delays. Reads a
``Plan`` as JSON from its standard input and writes a list of ``Start`` as JSON to its standard output.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.simulator.http import BadAnswer, Connection, address_of

LOOK_AGAIN_S = 2.0  # as the SDK's client, after a first look at once
COMMAND = "/usr/local/bin/openhands-agent-server --port 60000"
IMAGE = "docker.io/dataset/sweb.eval.x86_64.project_001.commit-000000000001:latest"


@dataclass(frozen=True)
class Plan:
    """What the clients of one process do.

    With ``rate`` starts a second for ``seconds``, each holding its sandbox for ``hold_s`` (half of it to one and a
    half). Where that is 0 they hold until a line comes on standard input, for which is asked by a line ``{"held": N}``
    once all starts should have ended, and stop spread over as many seconds. ``groups`` names the clients in turn.
    ``urls`` are asked in turn: the head's, or those of the nodes themselves. ``gives_up_s`` is the last one's time.
    """

    urls: tuple[str, ...]
    key: str
    rate: float
    seconds: float
    hold_s: float
    prefix: str
    groups: tuple[str, ...] = ("",)
    gives_up_s: float = 60.0
    seed: int = 1


@dataclass
class Start:
    """One start, by the monotonic clock: due, asked, answered, seen as ready, told stopped; 0 where it never was.

    ``status`` is that of /start, 0 for a connection that broke; ``detail`` says what went wrong, at any step.
    """

    session: str
    group: str
    due: float
    asked: float = 0.0
    answered: float = 0.0
    ready: float = 0.0
    stopped: float = 0.0
    status: int = 0
    looks_s: list[float] = field(default_factory=list)
    detail: str = ""


def due_times(rate: float, seconds: float, chance: random.Random) -> list[float]:
    """Random moments, ``rate`` of them a second in all, as those of clients who know nothing of each other."""
    return sorted(chance.uniform(0, seconds) for _ in range(round(rate * seconds)))


class Client:
    """One client with a connection of its own."""

    def __init__(self, plan: Plan, url: str, start: Start, chance: random.Random, released: asyncio.Event) -> None:
        self.plan, self.start, self.chance, self.released = plan, start, chance, released
        self.connection = Connection(*address_of(url), plan.key)

    async def live(self) -> None:
        await asyncio.sleep(self.start.due - time.monotonic())
        self.start.asked = time.monotonic()
        try:
            await self._use()
        except (OSError, BadAnswer) as problem:
            self.start.detail = f"{type(problem).__name__}: {problem}"
        finally:
            self.connection.close()

    async def _use(self) -> None:
        start = self.start
        await self._look()
        wish = {"image": IMAGE, "command": COMMAND, "working_dir": "/", "session_id": start.session}
        start.status, body = await self._ask("POST", "/start", {**wish, "environment": {"A": "1"}})
        start.answered = time.monotonic()
        if start.status != 201:
            start.detail = body[:300].decode("utf-8", "replace")
            return
        runtime_id = json.loads(body)["runtime_id"]
        while (found := await self._look()) == "pending":
            await asyncio.sleep(LOOK_AGAIN_S)
        if found != "ready":
            start.detail = f"the sandbox is {found}"
            return
        start.ready = time.monotonic()
        await self._hold()
        status, body = await self._ask("POST", "/stop", {"runtime_id": runtime_id})
        start.stopped = time.monotonic()
        if status != 200:
            start.detail = f"/stop: {status} {body[:300].decode('utf-8', 'replace')}"

    async def _hold(self) -> None:
        if self.plan.hold_s:
            await asyncio.sleep(self.plan.hold_s * self.chance.uniform(0.5, 1.5))
        else:
            await self.released.wait()
            await asyncio.sleep(self.plan.seconds * self.chance.random())

    async def _look(self) -> str:
        """The container's state; what is wrong where there is none."""
        began = time.monotonic()
        status, body = await self._ask("GET", f"/sessions/{self.start.session}")
        self.start.looks_s.append(time.monotonic() - began)
        return str(json.loads(body)["pod_status"]) if status == 200 else f"answered with {status}"

    async def _ask(self, method: str, path: str, wish: object = None) -> tuple[int, bytes]:
        return await self.connection.request(method, path, b"" if wish is None else json.dumps(wish).encode())


async def drive(plan: Plan) -> list[Start]:
    """All clients to their ends; who has none ``gives_up_s`` after the last start or the release is cut off."""
    chance, released = random.Random(plan.seed), asyncio.Event()
    began = time.monotonic() + 0.1
    starts, lives = [], []
    for number, moment in enumerate(due_times(plan.rate, plan.seconds, chance)):
        group, url = plan.groups[number % len(plan.groups)], plan.urls[number % len(plan.urls)]
        starts.append(Start(f"{plan.prefix}-{number}", group, began + moment))
        lives.append(asyncio.create_task(Client(plan, url, starts[-1], chance, released).live()))
    gc.freeze()
    if not plan.hold_s:
        await _until_held(starts, plan)
        print(json.dumps({"held": sum(start.ready > 0 for start in starts)}), flush=True)
        await _release(released)
    await asyncio.wait(lives, timeout=plan.seconds + plan.gives_up_s)
    _cut_off(starts, lives)
    await asyncio.gather(*lives, return_exceptions=True)
    return starts


async def _until_held(starts: Sequence[Start], plan: Plan) -> None:
    deadline = time.monotonic() + plan.seconds + plan.gives_up_s
    while time.monotonic() < deadline and not all(start.ready or start.detail for start in starts):
        await asyncio.sleep(0.1)


async def _release(released: asyncio.Event) -> None:
    await asyncio.to_thread(sys.stdin.buffer.readline)
    released.set()


def _cut_off(starts: Sequence[Start], lives: Sequence[asyncio.Task[None]]) -> None:
    for start, life in zip(starts, lives, strict=True):
        if not life.done():
            start.detail = "no end in time"
            life.cancel()


def main() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = json.loads(sys.stdin.buffer.readline())
    plan = Plan(**{**found, "urls": tuple(found["urls"]), "groups": tuple(found["groups"])})
    starts: Sequence[Start] = asyncio.run(drive(plan))
    json.dump([asdict(start) for start in starts], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
