#!/usr/bin/env python3
"""Hundreds of sandboxes alive at once, each polled by a client of its own: how long is a poll, and what do they weigh?

Starts them on a Podman store of its own, polls every sandbox's session for a while as clients do, asks each agent
server through its URL, and adds up the memory (PSS: shared pages divided among those who share them) of the API server
and of everything that belongs to sandboxes: agent servers, their idling containers, Podman's helpers, the fork server.

    python benchmarks/sandbox_crowd.py [--count 512] [--seconds 60] [--every 2] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.client import connected, start
from benchmarks.room import Room, Server, room, server
from slurm.lib.processes import pids

IN_FLIGHT = 32


@dataclass(frozen=True)
class Weight:
    """Megabytes of PSS."""

    api_server_mb: float
    sandboxes_mb: float
    processes: int


@dataclass(frozen=True)
class Result:
    """What was measured: sandboxes started a second, polls, how many answered at the end, and the weight."""

    count: int
    started_per_s: float
    polls: int
    poll_median_ms: float
    poll_p99_ms: float
    poll_longest_ms: float
    alive: int
    weight: Weight


def pss_mb(pid: int) -> float:
    """Proportional memory of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def weigh(found: Server) -> Weight:
    """The API server, and every process in the user namespace of its sandboxes."""
    own = Path("/proc/self/ns/user").readlink()
    spaces = {pid: space for pid in pids() if (space := user_namespace(pid)) not in {None, own}}
    sandboxes = [pss_mb(pid) for pid in spaces]
    return Weight(pss_mb(found.pid), sum(sandboxes), len(sandboxes))


def user_namespace(pid: int) -> Path | None:
    """None for a process that is not ours."""
    try:
        return Path(f"/proc/{pid}/ns/user").readlink()
    except OSError:
        return None


class Client:
    """One client with one connection and one sandbox."""

    def __init__(self, found: Server, place: Room, name: str) -> None:
        self.found, self.place, self.name = found, place, name
        self.session = connected(found)
        self.url = ""
        self.seconds: list[float] = []

    async def start(self) -> None:
        self.url = (await start(self.session, self.found, self.place, session_id=self.name))["url"]

    async def poll(self, until: float, every_s: float) -> None:
        """At fixed times from a random moment on; counted from the time at which a poll was due.

        Clients that sleep between two polls would wait for a server that stalls, measure the stall once instead of for
        each poll that was due, and come together ever after ("coordinated omission").
        """
        due = time.monotonic() + random.uniform(0, every_s)
        while due < until:
            await asyncio.sleep(due - time.monotonic())
            async with self.session.get(f"{self.found.url}/sessions/{self.name}") as answer:
                ready = (await answer.json())["pod_status"] == "ready"
            self.seconds.append(time.monotonic() - due)
            if not ready:
                raise SystemExit(f"sandbox {self.name} is not ready any more")
            due += every_s

    async def is_alive(self) -> bool:
        await measure.usable(self.url)
        return True


async def crowd(found: Server, place: Room, arguments: argparse.Namespace) -> Result:
    clients = [Client(found, place, f"crowd-{number}") for number in range(arguments.count)]
    try:
        started_per_s = await measure.in_flight([client.start for client in clients], IN_FLIGHT)
        until = time.monotonic() + arguments.seconds
        await asyncio.gather(*(client.poll(until, arguments.every) for client in clients))
        alive = sum(await asyncio.gather(*(client.is_alive() for client in clients)))
        weight = await asyncio.to_thread(weigh, found)
    finally:
        await asyncio.gather(*(client.session.close() for client in clients))
    polls = [seconds for client in clients for seconds in client.seconds]
    return Result(
        arguments.count,
        started_per_s,
        len(polls),
        1000 * statistics.median(polls),
        1000 * measure.percentile(polls, 0.99),
        1000 * max(polls),
        alive,
        weight,
    )


def report(result: Result) -> str:
    weight = result.weight
    each = weight.sandboxes_mb / result.count
    rows = [
        ("what", "figure", "bound"),
        ("sandboxes alive, each answering through its URL", f"{result.alive} of {result.count}", ""),
        ("started in", f"{result.count / result.started_per_s:.0f} s, {result.started_per_s:.1f}/s", ""),
        ("a poll, median", f"{result.poll_median_ms:.1f} ms of {result.polls} polls", ""),
        ("a poll, p99", f"{result.poll_p99_ms:.1f} ms", "< 50 ms"),
        ("a poll, longest", f"{result.poll_longest_ms:.1f} ms", ""),
        ("API server, PSS", f"{weight.api_server_mb:.0f} MB", "< 250 MB"),
        ("sandboxes with all that belongs to them, PSS", f"{weight.sandboxes_mb / 1024:.2f} GB", "< 12 GB"),
        ("of these each", f"{each:.1f} MB in {weight.processes / result.count:.1f} processes", ""),
    ]
    return f"{measure.load()}\n\n{measure.table(rows)}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=512, help="sandboxes, each with a client")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long they are polled")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two polls of a client")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder on this node's disk")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with room(arguments.scratch, None, None) as place, server(place, arguments.count, "fork") as found:
        result = asyncio.run(crowd(found, place, arguments))
    print(json.dumps(asdict(result)) if arguments.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
