#!/usr/bin/env python3
"""Hundreds of sandboxes alive at once, each with a client: does each answer, how fast, and what do they weigh?

Starts them on a Podman store of its own; a command through each sandbox's URL writes a token of its own into it.
Another command reads it back, twice: before and after the time in which every sandbox's session is polled as clients
do. Then adds up the memory (PSS: shared pages divided among those who share them) of the API server and of everything
that belongs to sandboxes: agent servers, their idling containers, Podman's helpers, the fork server.

    python benchmarks/sandbox_crowd.py [--count 512] [--seconds 60] [--every 2] [--json]

Exit codes: 0 each sandbox returned its token both times and every bound of the table is kept, 1 otherwise (what is
missed is said on stderr).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import secrets
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.client import connected, start, stdout_of
from benchmarks.room import Room, Server, add_scratch, room, server
from slurm.lib.processes import pids
from slurm_runtime.warden.proc import proportional_bytes

IN_FLIGHT = 32
TOKEN_FILE = "/workspace/token"
EACH_MB = 16  # what a sandbox takes, roughly, with all that belongs to it
POLL_MS, API_SERVER_MB = 50.0, 250.0
SANDBOXES_GB, SHARED_GB = 12.0, 1.0  # of 512 sandboxes, and of that what they share


@dataclass(frozen=True)
class Weight:
    """Megabytes of PSS."""

    api_server_mb: float
    sandboxes_mb: float
    processes: int


@dataclass(frozen=True)
class Result:
    """What was measured: sandboxes started a second, polls, and the weight.

    ``returned`` are the sandboxes that returned their own token, the first and the second time; between its two times
    at least ``apart_s`` passed for each.
    """

    count: int
    started_per_s: float
    polls: int
    poll_median_ms: float
    poll_p99_ms: float
    poll_longest_ms: float
    returned: tuple[int, int]
    apart_s: float
    weight: Weight


def pss_mb(pid: int) -> float:
    """Proportional memory of a process; 0 where it has ended."""
    return proportional_bytes(pid) / (1 << 20)


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
        self.sandbox: dict[str, Any] = {}
        self.token = secrets.token_hex(16)
        self.seconds: list[float] = []
        self.looks: list[float] = []
        self.returned: list[bool] = []

    async def start(self) -> None:
        """The sandbox, usable, with the token in it."""
        self.sandbox = await start(self.session, self.found, self.place, session_id=self.name)
        await measure.usable(self.sandbox["url"])
        await stdout_of(self.session, self.sandbox, f"echo {self.token} > {TOKEN_FILE}")

    async def look(self) -> None:
        """Ask the sandbox for its token."""
        self.looks.append(time.monotonic())
        said = await stdout_of(self.session, self.sandbox, f"cat {TOKEN_FILE}")
        self.returned.append(said.strip() == self.token)

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


async def crowd(found: Server, place: Room, arguments: argparse.Namespace) -> Result:
    clients = [Client(found, place, f"crowd-{number}") for number in range(arguments.count)]
    try:
        started_per_s = await measure.in_flight([client.start for client in clients], IN_FLIGHT)
        await measure.in_flight([client.look for client in clients], IN_FLIGHT)
        until = time.monotonic() + arguments.seconds
        await asyncio.gather(*(client.poll(until, arguments.every) for client in clients))
        await measure.in_flight([client.look for client in clients], IN_FLIGHT)
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
        (sum(client.returned[0] for client in clients), sum(client.returned[1] for client in clients)),
        min(client.looks[1] - client.looks[0] for client in clients),
        weight,
    )


def most_gb(count: int) -> float:
    """The bound for so many sandboxes: what they share, and each one's own."""
    return SHARED_GB + (SANDBOXES_GB - SHARED_GB) * count / 512


def aims(result: Result) -> list[measure.Aim]:
    """What is promised; the weight of the sandboxes in proportion to their number."""
    return [
        *(
            measure.Aim(f"tokens returned, look {look}", returned, result.count, at_least=True)
            for look, returned in enumerate(result.returned, 1)
        ),
        measure.Aim("p99 of a poll, ms", result.poll_p99_ms, POLL_MS),
        measure.Aim("API server, MB of PSS", result.weight.api_server_mb, API_SERVER_MB),
        measure.Aim("sandboxes, GB of PSS", result.weight.sandboxes_mb / 1024, most_gb(result.count)),
    ]


def report(result: Result) -> str:
    weight = result.weight
    each = weight.sandboxes_mb / result.count
    rows = [
        ("what", "figure", "bound"),
        ("sandboxes that returned their own token through their URL", f"{result.returned[0]} of {result.count}", "all"),
        (f"the same, {result.apart_s:.0f} s later or more", f"{result.returned[1]} of {result.count}", "all"),
        ("started in", f"{result.count / result.started_per_s:.0f} s, {result.started_per_s:.1f}/s", ""),
        ("a poll, median", f"{result.poll_median_ms:.1f} ms of {result.polls} polls", ""),
        ("a poll, p99", f"{result.poll_p99_ms:.1f} ms", "≤ 50 ms"),
        ("a poll, longest", f"{result.poll_longest_ms:.1f} ms", ""),
        ("API server, PSS", f"{weight.api_server_mb:.0f} MB", "≤ 250 MB"),
        (
            "sandboxes with all that belongs to them, PSS",
            f"{weight.sandboxes_mb / 1024:.2f} GB",
            f"≤ {most_gb(result.count):g} GB",
        ),
        ("everything, PSS", f"{(weight.api_server_mb + weight.sandboxes_mb) / 1024:.2f} GB", ""),
        ("of the sandboxes each", f"{each:.1f} MB in {weight.processes / result.count:.1f} processes", ""),
    ]
    return f"{measure.load()}\n\n{measure.table(rows)}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=512, help="sandboxes, each with a client")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long they are polled")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two polls of a client")
    add_scratch(parser)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    needed, there = EACH_MB * arguments.count, measure.available_mb()
    if needed > there:
        sys.exit(f"{arguments.count} sandboxes need {needed / 1024:.0f} GB of memory; {there / 1024:.0f} GB are free")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with room(arguments.scratch, None, None) as place, server(place, arguments.count, "fork") as found:
        result = asyncio.run(crowd(found, place, arguments))
    print(json.dumps({**asdict(result), "machine": measure.machine()}) if arguments.json else report(result))
    return measure.verdict(aims(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
