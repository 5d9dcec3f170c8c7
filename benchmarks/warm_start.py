#!/usr/bin/env python3
"""How long does a start take that finds a container waiting (``--warm``), beside raw ``podman run -d``?

As ``sandbox_start.py``: one run, one machine, a Podman store of its own, the same image, network and mounts. The pool
is full before each measurement, the raw ones included. Then the rates of a server on which none waits and of one on
which containers wait that fit nobody, as where the next sandboxes are unlike the last. Run it as the user who would run
sandboxes.

    python benchmarks/warm_start.py [--runs 20] [--many 48] [--rounds 4] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import client, measure
from benchmarks.room import Room, add_room, room, server
from benchmarks.sandbox_start import IN_FLIGHT, Client, Figures, breakdown, in_turn, raw, raw_rate

WORKERS = 4  # of raw Podman: the best number, by sandbox_start.py
FULL_DEADLINE_S = 600.0
POOL_OF_OTHERS = 16


@dataclass
class Rates:
    """Sandboxes a second, round by round."""

    raw: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)


class Waiting(Client):
    """A client that knows whether containers wait for it."""

    async def __aenter__(self) -> Waiting:
        return self

    async def until_warm(self, count: int) -> None:
        deadline = time.monotonic() + FULL_DEADLINE_S
        while await self._warm() < count:
            if time.monotonic() > deadline:
                raise SystemExit(f"{count} containers were not made in advance within {FULL_DEADLINE_S:g} s")
            await asyncio.sleep(0.1)

    async def _warm(self) -> float:
        async with self.session.get(f"{self.found.url}/metrics") as answer:
            families = {family.name: family for family in text_string_to_metric_families(await answer.text())}
        return float(families["skyrl_warm_containers"].samples[0].value)

    async def start_another(self) -> None:
        """One that no container waits for."""
        sandbox = await client.start(self.session, self.found, self.place, working_dir="/tmp")
        self.alive.append(sandbox["runtime_id"])
        await measure.usable(sandbox["url"])


async def one_at_a_time(figures: Figures, place: Room, runs: int) -> None:
    with server(place, 4 * runs, "fork", "--warm", "2") as found:
        async with Waiting(found, place) as ours:
            await ours.start()
            await ours.until_warm(2)
            before = await ours.steps()
            work = {"raw": lambda: raw(place), "warm": ours.start}
            await in_turn(figures, runs, work, lambda: ours.until_warm(2))
            figures.steps_ms = breakdown(before, await ours.steps())
            await ours.stop_all()
            place.remove_all()


async def many_at_once(rates: Rates, place: Room, many: int, rounds: int) -> None:
    with server(place, 4 * many, "fork", "--warm", str(many)) as found:
        async with Waiting(found, place) as ours:
            await ours.start()
            for _ in range(rounds):
                await ours.until_warm(many)
                rates.raw.append(await raw_rate(place, many, WORKERS))
                rates.warm.append(await measure.in_flight([ours.start] * many, IN_FLIGHT))
                await ours.stop_all()


async def without_use(rates: Rates, place: Room, many: int, rounds: int) -> None:
    """As many slots as sandboxes, so that those that wait for others have to give way; beside it a server without."""
    with (
        server(place, many, "fork") as plain,
        server(place, many, "fork", "--warm", str(POOL_OF_OTHERS)) as pooled,
    ):
        async with Waiting(plain, place) as cold, Waiting(pooled, place) as missed:
            for _ in range(rounds):
                await missed.start()
                await missed.stop_all()
                await missed.until_warm(POOL_OF_OTHERS)
                rates.cold.append(await measure.in_flight([cold.start] * many, IN_FLIGHT))
                await cold.stop_all()
                rates.missed.append(await measure.in_flight([missed.start_another] * many, IN_FLIGHT))
                await missed.stop_all()


def report(figures: Figures, rates: Rates) -> str:
    middle = {what: statistics.median(seconds) for what, seconds in figures.seconds.items()}
    shown = {what: measure.milliseconds(seconds) for what, seconds in figures.seconds.items()}
    lines: list[tuple[str, ...]] = [("work", "this", "against", "ratio", "bound")]
    lines.append(
        ("time", f"warm {shown['warm']}", f"raw {shown['raw']}", f"{middle['warm'] / middle['raw']:.2f}", "≤ 0.7")
    )
    lines.append(_rate("warm", rates.warm, "raw", rates.raw, "≥ 2"))
    lines.append(_rate(f"{POOL_OF_OTHERS} wait for others", rates.missed, "none waits", rates.cold, ""))
    steps = [("step of a warm start", "ms"), *((step, f"{value:.1f}") for step, value in figures.steps_ms.items())]
    return "\n\n".join([measure.load(), measure.table(lines), measure.table(steps)])


def _rate(what: str, ours: list[float], than: str, theirs: list[float], bound: str) -> tuple[str, ...]:
    """The median of the rounds' ratios: the machine's speed drifts less within a round."""
    ratio = statistics.median(our / their for our, their in zip(ours, theirs, strict=True))
    this, that = (f"{name} {statistics.median(found):.1f}/s" for name, found in ((what, ours), (than, theirs)))
    return (f"rate, {IN_FLIGHT} in flight", this, that, f"{ratio:.2f}", bound)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="starts one at a time")
    parser.add_argument("--many", type=int, default=48, help=f"starts with {IN_FLIGHT} in flight")
    parser.add_argument("--rounds", type=int, default=4, help="how often these are repeated")
    add_room(parser)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments, figures, rates = parse(argv), Figures(), Rates()
    with room(arguments.scratch, arguments.image, arguments.archive) as place:
        asyncio.run(one_at_a_time(figures, place, arguments.runs))
        asyncio.run(many_at_once(rates, place, arguments.many, arguments.rounds))
        asyncio.run(without_use(rates, place, arguments.many, arguments.rounds))
    found = {"seconds": figures.seconds, "steps_ms": figures.steps_ms, "rates": vars(rates)}
    print(json.dumps(found) if arguments.json else report(figures, rates))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
