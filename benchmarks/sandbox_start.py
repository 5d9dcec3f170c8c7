#!/usr/bin/env python3
"""How long does a sandbox take from the request until its agent server can be used, beside what else starts one?

Everything is measured in one run on one machine, on a Podman store of its own: raw ``podman run -d`` of the same image,
network and mounts with ``sleep``; the agent server started by hand; this server with AGENT_START=fork and exec; and,
unless ``--no-peers``, OpenHands' DockerWorkspace and SWE-ReX, installed from PyPI. Run it as the user who would run
sandboxes; it needs Podman's rootless set-up and an agent tree (``python -m slurm_runtime.agent build``).

    python benchmarks/sandbox_start.py [--runs 20] [--slow-runs 5] [--many 96] [--no-peers] [--json]

Exit codes: 0 every bound of the table is kept, 1 one is missed (said on stderr).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.client import connected, start
from benchmarks.peers.install import installed
from benchmarks.room import SANDBOX_PORT, Room, Server, add_room, room, server
from slurm_runtime.config import ServerConfig

IN_FLIGHT = 32
WORKERS = (1, 2, 4, 8)
RATE_ROUNDS = 6


@dataclass
class Figures:
    """What was measured: seconds by what was started, sandboxes a second, milliseconds of the steps of one start.

    ``sweep`` holds raw rates by the number of workers; the two lists of rates belong together, round by round.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    sweep: dict[int, float] = field(default_factory=dict)
    raw_rates: list[float] = field(default_factory=list)
    fork_rates: list[float] = field(default_factory=list)
    steps_ms: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, seconds: float) -> None:
        self.seconds.setdefault(what, []).append(seconds)

    @property
    def best_workers(self) -> int:
        return max(self.sweep, key=lambda workers: self.sweep[workers])


class Client:
    """What a client of the API does: start, use, stop."""

    def __init__(self, found: Server, place: Room) -> None:
        self.found, self.place = found, place
        self.session = connected(found)
        self.alive: list[str] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def start(self) -> None:
        """From the request until the agent server answers through the sandbox's URL."""
        sandbox = await start(self.session, self.found, self.place)
        self.alive.append(sandbox["runtime_id"])
        await measure.usable(sandbox["url"])

    async def stop_all(self) -> None:
        await asyncio.gather(*(self._stop(runtime_id) for runtime_id in self.alive))
        self.alive.clear()

    async def _stop(self, runtime_id: str) -> None:
        body = {"runtime_id": runtime_id}
        async with self.session.post(f"{self.found.url}/stop", json=body) as answer:
            await answer.read()

    async def steps(self) -> dict[str, tuple[float, float]]:
        """Count and seconds of each step of all starts so far."""
        async with self.session.get(f"{self.found.url}/metrics") as answer:
            families = {family.name: family for family in text_string_to_metric_families(await answer.text())}
        found: dict[str, dict[str, float]] = {}
        for sample in families["skyrl_start_step_seconds"].samples:
            found.setdefault(sample.labels["step"], {})[sample.name.rpartition("_")[2]] = sample.value
        return {step: (values["count"], values["sum"]) for step, values in found.items()}


async def raw(place: Room, pool: Executor | None = None) -> None:
    """``podman run -d`` with ``sleep``, to its end."""
    words = place.run_words("sleep", "infinity")
    await asyncio.get_running_loop().run_in_executor(pool, lambda: place.podman(*words))


async def by_hand(place: Room) -> None:
    """The agent server as the program of ``podman run -d``, until it answers."""
    command = place.tree.exec_command(("--port", str(SANDBOX_PORT)))
    name = await asyncio.to_thread(place.podman, *place.run_words(*command))
    port = (await asyncio.to_thread(place.podman, "port", name, str(SANDBOX_PORT))).rpartition(":")[2]
    await measure.usable(f"http://127.0.0.1:{port}", every_s=0.005)


async def nothing() -> None:
    """Between two starts that do not disturb each other."""


async def in_turn(
    figures: Figures,
    runs: int,
    work: Mapping[str, Callable[[], Awaitable[object]]],
    after: Callable[[], Awaitable[None]] = nothing,
) -> None:
    """Each of ``work`` once and so on, so that all meet the same machine; the first round is not counted."""
    for number in range(runs + 1):
        for what, do in work.items():
            seconds = await measure.timed(do())
            if number:
                figures.add(what, seconds)
            await after()


async def raw_rate(place: Room, many: int, workers: int) -> float:
    """Raw containers a second, with so many workers."""
    with ThreadPoolExecutor(workers) as pool:
        rate = await measure.in_flight([lambda: raw(place, pool)] * many, workers)
    place.remove_all()
    return rate


async def rates(figures: Figures, place: Room, client: Client, many: int) -> None:
    """Sandboxes a second: raw ones with several numbers of workers, then the best of these and this server in turn."""
    figures.sweep = {workers: await raw_rate(place, many, workers) for workers in WORKERS}
    for _ in range(RATE_ROUNDS):
        figures.raw_rates.append(await raw_rate(place, many, figures.best_workers))
        figures.fork_rates.append(await measure.in_flight([client.start] * many, IN_FLIGHT))
        await client.stop_all()


def breakdown(before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Milliseconds of each step of one start between two looks."""
    found = {}
    for step, (count, seconds) in after.items():
        starts, spent = count - before[step][0], seconds - before[step][1]
        found[step] = 1000 * spent / starts if starts else 0.0
    return found


async def with_fork(figures: Figures, place: Room, runs: int, many: int, starters: int) -> None:
    with server(place, 4 * many, "fork", "--starters", str(starters)) as found:
        async with Client(found, place) as client:
            await client.start()
            before = await client.steps()
            await in_turn(figures, runs, {"raw": lambda: raw(place), "fork": client.start})
            figures.steps_ms = breakdown(before, await client.steps())
            await client.stop_all()
            place.remove_all()
            await rates(figures, place, client, many)


async def with_exec(figures: Figures, place: Room, runs: int) -> None:
    with server(place, 4 * runs, "exec") as found:
        async with Client(found, place) as client:

            async def clear() -> None:
                """One agent server at a time: each takes 4 s of a CPU and 300 MB."""
                await client.stop_all()
                place.remove_all()

            await in_turn(figures, runs, {"by hand": lambda: by_hand(place), "exec": client.start}, clear)


def with_peers(figures: Figures, place: Room, runs: int, cache: Path) -> None:
    peers = installed(place, cache)
    figures.seconds["DockerWorkspace"] = peers.workspace("starts", runs).seconds["START"]
    figures.seconds["SWE-ReX"] = peers.swe_rex("starts", runs).seconds["START"]


BOUNDS = (
    ("fork", "raw", 1.5),
    ("fork", "by hand", 0.05),
    ("exec", "by hand", 1.05),
    ("fork", "DockerWorkspace", 0.05),
    ("fork", "SWE-ReX", 0.3),
)


def aims(figures: Figures) -> list[measure.Aim]:
    """The ratios of the medians, and the bounds that they are to keep."""
    middle = {what: statistics.median(seconds) for what, seconds in figures.seconds.items()}
    found = [
        measure.Aim(f"{ours} / {theirs}", middle[ours] / middle[theirs], bound)
        for ours, theirs, bound in BOUNDS
        if theirs in middle
    ]
    return [*found, measure.Aim("rate, fork / raw", rate_ratio(figures), 1.0, at_least=True)]


def rows(figures: Figures) -> list[tuple[str, ...]]:
    """The table: what, beside what, the ratio of the medians, the bound that it is to keep."""
    shown = {what: measure.milliseconds(seconds) for what, seconds in figures.seconds.items()}
    found: list[tuple[str, ...]] = [("work", "this", "against", "that", "ratio", "bound")]
    kept = {aim.what: aim for aim in aims(figures)}
    for ours, theirs, bound in BOUNDS:
        if theirs in shown:
            ratio = kept[f"{ours} / {theirs}"].figure
            found.append(("time", f"{ours} {shown[ours]}", theirs, shown[theirs], f"{ratio:.3f}", f"≤ {bound:g}"))
    return [*found, rate_row(figures)]


def rate_ratio(figures: Figures) -> float:
    """The median of the rounds' ratios: the machine's speed drifts less within a round."""
    return statistics.median(ours / raw for ours, raw in zip(figures.fork_rates, figures.raw_rates, strict=True))


def rate_row(figures: Figures) -> tuple[str, ...]:
    ours, raws = (f"{statistics.median(found):.1f}/s" for found in (figures.fork_rates, figures.raw_rates))
    words = (f"fork, {IN_FLIGHT} in flight, {ours}", f"raw, {figures.best_workers} workers", raws)
    return ("rate", *words, f"{rate_ratio(figures):.2f}", "≥ 1.0")


def report(figures: Figures) -> str:
    steps = [("step of a forked start", "ms"), *((step, f"{value:.1f}") for step, value in figures.steps_ms.items())]
    whole = 1000 * statistics.median(figures.seconds["fork"])
    steps.append(("everything, as the client sees it", f"{whole:.1f}"))
    listed = {"raw, each round": figures.raw_rates, "fork, each round": figures.fork_rates}
    rates = [
        ("sandboxes a second", ""),
        *((what, ", ".join(f"{rate:.1f}" for rate in r)) for what, r in listed.items()),
    ]
    rates += [(f"raw, {workers} workers", f"{rate:.1f}") for workers, rate in figures.sweep.items()]
    return "\n\n".join([measure.load(), *(measure.table(part) for part in (rows(figures), steps, rates))])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="starts one at a time of the quick kinds")
    parser.add_argument("--slow-runs", type=int, default=5, help="starts of the kinds that take seconds")
    parser.add_argument("--many", type=int, default=96, help=f"starts with {IN_FLIGHT} in flight")
    parser.add_argument("--starters", type=int, default=ServerConfig.starters, help="containers started at once")
    parser.add_argument("--no-peers", action="store_true", help="leave DockerWorkspace and SWE-ReX out")
    add_room(parser)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skyrl" / "peers"
    parser.add_argument("--peers-cache", type=Path, default=cache, help="where peers are installed (%(default)s)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments, figures = parse(argv), Figures()
    with room(arguments.scratch, arguments.image, arguments.archive) as place:
        asyncio.run(with_fork(figures, place, arguments.runs, arguments.many, arguments.starters))
        asyncio.run(with_exec(figures, place, arguments.slow_runs))
        if not arguments.no_peers:
            with_peers(figures, place, arguments.slow_runs, arguments.peers_cache)
    print(json.dumps(vars(figures)) if arguments.json else report(figures))
    return measure.verdict(aims(figures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
