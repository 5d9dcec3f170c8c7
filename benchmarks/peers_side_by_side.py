#!/usr/bin/env python3
"""Sandbox start, command latency and parallel capacity: this server, SWE-ReX, OpenHands' workspaces, Podman, runc.

Everything is measured in one run on one machine with one image, on a Podman store of its own. SWE-ReX and OpenHands'
DockerWorkspace are installed from PyPI at pinned versions into a cache folder and driven as published. This server is
driven over HTTP and by OpenHands' own APIRemoteWorkspace. ``podman run -d`` with the same network, port and mounts, and
runc (crun, where it runs) with the same files and mounts but no network, are the limits: nothing answers in them.

    python benchmarks/peers_side_by_side.py [--runs 20] [--slow-runs 5] [--commands 40] [--many 4 16 64] [--json]

A start has ended when the agent of the sandbox answers (Podman, runc: when the command returns). A command is ``true``.
Parallel capacity is how many of so many requested at once are up within 90 s. Where the image has a bash, SWE-ReX's
session is measured too. Exit codes: 0 every bound of the table is kept, 1 one is missed (said on stderr).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure, oci
from benchmarks.client import connected, start, stdout_of
from benchmarks.peers.install import SWE_REX, Peers, installed
from benchmarks.room import Room, Server, add_room, room, server

CAPACITY_S = 90.0
SPARE_MB = 2000  # of the machine's memory, which a crowd of sandboxes leaves alone
OURS, PODMAN, RUNC, CRUN, SWE, DOCKER = "this server", "podman run -d", "runc", "crun", "SWE-ReX", "DockerWorkspace"
APPTAINER = "ApptainerWorkspace: not measured, it needs Apptainer, which neither PyPI nor Debian 12 has"
DEV = "DockerDevWorkspace: not measured, it builds an image from the internet before each first start"
CLOUD = "OpenHandsCloudWorkspace: not measured, it needs an account of a hosted service"


@dataclass
class Capacity:
    """Of so many requested at once: how many were up within 90 s, and when the last of these was."""

    requested: int
    up: int
    last_s: float
    skipped: str = ""

    def __str__(self) -> str:
        last = f", {self.last_s:.1f} s" if self.up else ""
        return self.skipped or f"{self.up} of {self.requested}{last}"


@dataclass
class Figures:
    """Seconds of the starts, seconds of a command by the way it is given, and the parallel capacity."""

    starts: list[float] = field(default_factory=list)
    commands: dict[str, list[float]] = field(default_factory=dict)
    capacity: list[Capacity] = field(default_factory=list)
    refused: str = ""


class System(Protocol):
    """One of those that are compared."""

    quick: bool  # whether a start takes well below a second
    each_mb: float  # what one sandbox takes, roughly, so that the machine is not filled

    def starts(self, count: int) -> list[float]: ...

    def commands(self, count: int) -> dict[str, list[float]]: ...

    def many(self, count: int) -> list[float]: ...


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def up_in_time(work: Callable[[], object], count: int) -> list[float]:
    """After how many seconds each of ``count``, begun at once in a thread each, was through; those in time only."""
    began = time.perf_counter()

    def one() -> float:
        work()
        return time.perf_counter() - began

    with ThreadPoolExecutor(count) as pool:
        done, _ = wait([pool.submit(one) for _ in range(count)], CAPACITY_S)
        return [future.result() for future in done]


@dataclass
class Ours:
    """This server, over HTTP."""

    place: Room
    found: Server
    peers: Peers | None
    quick: bool = True
    each_mb: float = 25.0

    def starts(self, count: int) -> list[float]:
        return asyncio.run(self._starts(count, at_once=False))

    def many(self, count: int) -> list[float]:
        return asyncio.run(self._starts(count, at_once=True))

    def commands(self, count: int) -> dict[str, list[float]]:
        found = {"agent server, waiting call": asyncio.run(self._commands(count))}
        if self.peers:
            through = self.peers.workspace_on(self.found, "commands", count)
            found["OpenHands' SDK, execute_command"] = through.seconds["COMMAND"]
        return found

    async def _starts(self, count: int, at_once: bool) -> list[float]:
        async with connected(self.found) as session:
            names: list[str] = []
            began = time.perf_counter()

            async def one() -> float:
                mine = began if at_once else time.perf_counter()
                sandbox = await start(session, self.found, self.place)
                names.append(sandbox["runtime_id"])
                await measure.usable(sandbox["url"])
                return time.perf_counter() - mine

            if at_once:
                tasks = [asyncio.create_task(one()) for _ in range(count)]
                done, late = await asyncio.wait(tasks, timeout=CAPACITY_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
                taken = [task.result() for task in done]
            else:
                taken = [await one() for _ in range(count)]
            for name in names:
                async with session.post(f"{self.found.url}/stop", json={"runtime_id": name}) as answer:
                    await answer.read()
        return taken

    async def _commands(self, count: int) -> list[float]:
        """``execute_bash_command``: one request, answered when the command has ended."""
        async with connected(self.found) as session:
            sandbox = await start(session, self.found, self.place)
            await measure.usable(sandbox["url"])
            taken = []
            for _ in range(count):
                began = time.perf_counter()
                if (said := await stdout_of(session, sandbox, "true")) != "":
                    raise SystemExit(f"the command true said: {said}")
                taken.append(time.perf_counter() - began)
            async with session.post(f"{self.found.url}/stop", json={"runtime_id": sandbox["runtime_id"]}) as answer:
                await answer.read()
        return taken


@dataclass
class RawPodman:
    """``podman run -d`` of the same image, network, port and mounts, with ``sleep``."""

    place: Room
    quick: bool = True
    each_mb: float = 15.0

    def starts(self, count: int) -> list[float]:
        return [seconds(self._start) for _ in range(count)]

    def commands(self, count: int) -> dict[str, list[float]]:
        name = self._start()
        return {"podman exec": [seconds(lambda: self.place.podman("exec", name, "true")) for _ in range(count)]}

    def many(self, count: int) -> list[float]:
        return up_in_time(self._start, count)

    def _start(self) -> str:
        return self.place.podman(*self.place.run_words("sleep", "infinity"))


@dataclass
class RawRuntime:
    """An OCI runtime alone."""

    bundle: oci.Bundle
    quick: bool = True
    each_mb: float = 5.0

    def starts(self, count: int) -> list[float]:
        return self._removed(lambda: [seconds(self._start) for _ in range(count)])

    def commands(self, count: int) -> dict[str, list[float]]:
        def work() -> list[float]:
            name = self._start()
            return [seconds(lambda: self.bundle.run_true(name)) for _ in range(count)]

        return {f"{Path(self.bundle.runtime).name} exec": self._removed(work)}

    def many(self, count: int) -> list[float]:
        return self._removed(lambda: up_in_time(self._start, count))

    def __post_init__(self) -> None:
        self.names: list[str] = []

    def _start(self) -> str:
        self.names.append(self.bundle.start())
        return self.names[-1]

    def _removed(self, work: Callable[[], list[float]]) -> list[float]:
        try:
            return work()
        finally:
            for name in self.names:
                self.bundle.remove(name)
            self.names.clear()


@dataclass
class Peer:
    """SWE-ReX or DockerWorkspace, by the script that drives it."""

    drive: Callable[[str, int, float], dict[str, list[float]]]
    kinds: dict[str, str]
    each_mb: float
    quick: bool = False

    def starts(self, count: int) -> list[float]:
        return self.drive("starts", count, 600.0)["START"]

    def commands(self, count: int) -> dict[str, list[float]]:
        said = self.drive("commands", count, 600.0)
        return {name: said[kind] for kind, name in self.kinds.items() if kind in said}

    def many(self, count: int) -> list[float]:
        return [value for value in self.drive("many", count, CAPACITY_S).get("START", []) if value <= CAPACITY_S]


def everything(place: Room, arguments: argparse.Namespace) -> dict[str, Figures]:
    """All systems, in turn and several times, so that all meet the same machine; nothing of them is left."""
    with contextlib.ExitStack() as stack:
        slots = 4 * max([arguments.runs, *arguments.many])
        running = stack.enter_context(server(place, slots, "fork"))
        peers = None if arguments.no_peers else installed(place, arguments.peers_cache)
        systems: dict[str, System] = {OURS: Ours(place, running, peers), PODMAN: RawPodman(place)}
        found = {name: Figures() for name in (*systems, RUNC, CRUN)}
        for name, program in ((RUNC, arguments.runc), (CRUN, arguments.crun)):
            if not measure.program_version(program, "--version"):
                found[name].refused = f"{program}: not on PATH, or it does not start"
            else:
                systems[name] = RawRuntime(stack.enter_context(oci.bundle(place, program)))
        systems |= peers_of(peers) if peers else {}
        for name in systems:
            found.setdefault(name, Figures())
        in_rounds(systems, found, place, arguments)
    return found


def in_rounds(
    systems: dict[str, System], found: dict[str, Figures], place: Room, arguments: argparse.Namespace
) -> None:
    def part(name: str, title: str, work: Callable[[System, Figures], object]) -> None:
        """Do a part of one system's work, unless it was refused before."""
        if found[name].refused:
            return
        print(f"{title}: {name}, {measure.load()}", file=sys.stderr)
        try:
            work(systems[name], found[name])
        except oci.Refused as refused:
            found[name].refused = str(refused)
        place.remove_all()

    for number in range(arguments.rounds):
        for name in systems:
            part(name, f"round {number + 1}", functools.partial(one_round, arguments=arguments))
    for count in arguments.many:
        for name in systems:
            part(name, f"{count} at once", functools.partial(one_crowd, count=count))


def one_crowd(system: System, figures: Figures, count: int) -> None:
    figures.capacity.append(capacity(system, count))


def one_round(system: System, figures: Figures, arguments: argparse.Namespace) -> None:
    """A share of the starts and commands."""
    runs = arguments.runs if system.quick else arguments.slow_runs
    figures.starts += system.starts(-(-runs // arguments.rounds))
    for way, taken in system.commands(-(-arguments.commands // arguments.rounds)).items():
        figures.commands.setdefault(way, []).extend(taken)


def capacity(system: System, count: int) -> Capacity:
    needed, there = count * system.each_mb, measure.available_mb() - SPARE_MB
    if needed > there:
        return Capacity(count, 0, 0.0, f"not run: {needed / 1024:.0f} GB, {max(there, 0) / 1024:.0f} GB to spare")
    taken = system.many(count)
    return Capacity(count, len(taken), max(taken, default=0.0))


def peers_of(peers: Peers) -> dict[str, System]:
    swe = Peer(
        lambda mode, count, deadline: peers.swe_rex(mode, count, deadline).seconds,
        {"COMMAND": "execute", "SESSION": "run_in_session"},
        each_mb=70.0,
    )
    docker = Peer(
        lambda mode, count, deadline: peers.workspace(mode, count, deadline).seconds,
        {"COMMAND": "OpenHands' SDK, execute_command"},
        each_mb=330.0,
    )
    return {SWE: swe, DOCKER: docker}


def aims(found: dict[str, Figures]) -> list[measure.Aim]:
    """What this server is to keep beside the others."""
    ours = found[OURS]
    middle = {name: statistics.median(figures.starts) for name, figures in found.items() if figures.starts}
    bounds = ((PODMAN, 1.5), (SWE, 0.3), (DOCKER, 0.05))
    told = [
        measure.Aim(f"start / {name}", middle[OURS] / middle[name], most) for name, most in bounds if name in middle
    ]
    for way, taken in ours.commands.items():
        if "SDK" in way:
            told.append(measure.Aim("a command through OpenHands' SDK, ms", 1000 * statistics.median(taken), 25.0))
    told += [measure.Aim(f"up of {one.requested}", one.up, one.requested, at_least=True) for one in ours.capacity]
    return told


def versions(place: Room, arguments: argparse.Namespace) -> dict[str, str]:
    return {
        **measure.machine(),
        "podman": measure.program_version("podman", "--version"),
        RUNC: measure.program_version(arguments.runc, "--version"),
        CRUN: measure.program_version(arguments.crun, "--version"),
        "agent server, openhands-workspace": place.tree.version,
        "swe-rex": SWE_REX,
        "image": place.image,
    }


def report(found: dict[str, Figures], told: dict[str, str]) -> str:
    many = [one.requested for one in found[OURS].capacity]
    rows = [("system", "start", "of podman's", "command true", *(f"{count} at once, up within 90 s" for count in many))]
    raw = statistics.median(found[PODMAN].starts)
    for name, figures in found.items():
        if figures.refused:
            rows.append((name, figures.refused, "", "", *("" for _ in many)))
            continue
        ratio = f"{statistics.median(figures.starts) / raw:.2f}"
        ways = [f"{way} {1000 * statistics.median(taken):.1f} ms" for way, taken in figures.commands.items()]
        start = measure.milliseconds(figures.starts)
        rows.append((name, start, ratio, "; ".join(ways), *(str(one) for one in figures.capacity)))
    kept = [("bound", "kept"), *((str(aim), "yes" if aim.kept else "no") for aim in aims(found))]
    about = ", ".join(f"{what} {value}" for what, value in told.items() if value)
    return "\n\n".join([about, measure.table(rows), measure.table(kept), "\n".join((APPTAINER, DEV, CLOUD))])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="starts one at a time of the quick systems (%(default)s)")
    parser.add_argument("--slow-runs", type=int, default=5, help="the same of the slow ones (%(default)s)")
    parser.add_argument("--commands", type=int, default=40, help="commands in one sandbox (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="in so many shares, in turn (%(default)s)")
    parser.add_argument("--many", type=int, nargs="+", default=[4, 16, 64], help="how many are requested at once")
    parser.add_argument("--no-peers", action="store_true", help="leave SWE-ReX and OpenHands' workspaces out")
    parser.add_argument("--runc", default="runc", help="the program (%(default)s)")
    parser.add_argument("--crun", default="crun", help="the program (%(default)s)")
    add_room(parser)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyrl" / "peers"
    parser.add_argument("--peers-cache", type=Path, default=cache, help="where peers are installed (%(default)s)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    with room(arguments.scratch, arguments.image, arguments.archive) as place:
        told, found = versions(place, arguments), everything(place, arguments)
    if arguments.json:
        print(json.dumps({"versions": told, "systems": {name: asdict(figures) for name, figures in found.items()}}))
    else:
        print(report(found, told))
    return measure.verdict(aims(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
