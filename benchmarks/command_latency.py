#!/usr/bin/env python3
"""How long does a command in a sandbox take through OpenHands' unchanged client, beside ``podman exec``?

Two sandboxes of this server: a forked one, whose agent server holds the first look at a command open until it has
ended, and one whose agent server is started as a program (AGENT_START=exec), which is the package as released. Run it
as the user who would run sandboxes.

    python benchmarks/command_latency.py [--runs 40] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.client import connected, start
from benchmarks.room import Room, Server, add_room, room, server

Seconds = dict[str, list[float]]
DRIVER = Path(__file__).resolve().with_name("sdk_commands.py")
DEADLINE_S = 300.0
AIM_S = 0.025


async def sandbox(found: Server, place: Room) -> dict[str, Any]:
    """One that answers."""
    async with connected(found) as session:
        made = await start(session, found, place)
    await measure.usable(made["url"])
    return made


def through_the_sdk(place: Room, made: dict[str, Any], runs: int) -> Seconds:
    argv = [str(place.tree.root / place.tree.executable), str(DRIVER), made["url"], str(runs)]
    environment = {**place.environment, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENHANDS_SUPPRESS_BANNER": "1"}
    done = subprocess.run(
        argv,
        env={**environment, "no_proxy": "*", "HOME": str(place.storage.root)},
        input=made["session_api_key"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        sys.exit(f"{DRIVER.name} failed: {(done.stderr or done.stdout)[-2000:]}")
    seconds: Seconds = json.loads(results[-1].removeprefix("RESULT "))
    return seconds


def podman_exec(place: Room, made: dict[str, Any], runs: int) -> list[float]:
    words = ("exec", f"sandbox-{made['runtime_id']}", "true")
    return [asyncio.run(measure.timed(asyncio.to_thread(place.podman, *words))) for _ in range(runs)]


def measured(place: Room, runs: int) -> dict[str, Seconds]:
    found: dict[str, Seconds] = {}
    for way in ("exec", "fork"):
        with server(place, 4, way) as ours:
            made = asyncio.run(sandbox(ours, place))
            found[way] = through_the_sdk(place, made, runs)
            found[way]["podman exec"] = podman_exec(place, made, runs)
    return found


def report(found: dict[str, Seconds]) -> str:
    middle = {way: {what: statistics.median(each) for what, each in parts.items()} for way, parts in found.items()}
    rows: list[tuple[str, ...]] = [("command", "as released", "first look held", "ratio")]
    for what, seconds in found["fork"].items():
        shown = (measure.milliseconds(found["exec"][what]), measure.milliseconds(seconds))
        rows.append((what, *shown, f"{middle['fork'][what] / middle['exec'][what]:.2f}"))
    ours = middle["fork"]
    aims: list[tuple[str, ...]] = [("true, first look held", "", "aim")]
    aims.append(("", f"{1000 * ours['true']:.1f} ms", f"≤ {1000 * AIM_S:g} ms"))
    aims += [(f"× {what}", f"{ours['true'] / ours[what]:.2f}", "") for what in ("health", "podman exec")]
    return "\n\n".join([measure.load(), measure.table(rows), measure.table(aims)])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40, help="commands of each kind")
    add_room(parser)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    with room(arguments.scratch, arguments.image, arguments.archive) as place:
        found = measured(place, arguments.runs)
    print(json.dumps(found) if arguments.json else report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
