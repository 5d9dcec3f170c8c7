#!/usr/bin/env python3
"""Where does Podman spend the time of one container? The parts of a start, taken away one after the other.

Each kind is created, initialised, started and removed through Podman's REST API, one after the other and in turn, as
this server does it: as a sandbox's container; without its published port; with the host's network; and that without
mounts, volume and limits. The differences of the fastest are what the parts cost: others on the machine only add to it.
Run it as the user who would run sandboxes.

    python benchmarks/start_parts.py [--runs 20] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.room import SANDBOX_PORT, Room, add_room, free_port, room
from slurm_runtime.podman import SLOW_S, ContainerSpec, Podman, create_body

Change = Callable[[dict[str, Any]], dict[str, Any]]
NEEDLESS = ("volumes", "mounts", "sysctl", "r_limits", "resource_limits", "init", "log_configuration")


def with_host_network(body: dict[str, Any]) -> dict[str, Any]:
    return {**without_port(body), "netns": {"nsmode": "host"}, "sysctl": {}}


def without_port(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "portmappings": []}


def bare(body: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in with_host_network(body).items() if name not in NEEDLESS}
    return {**kept, "entrypoint": [], "command": ["sleep", "infinity"]}


KINDS: Mapping[str, Change] = {
    "a sandbox's container": lambda body: body,
    "no published port": without_port,
    "the host's network": with_host_network,
    "no mounts, volume, limits either": bare,
}
PARTS = ("create", "init", "start", "remove")


class Door(Podman):
    """The server's own way to Podman, with a request that is not quite a sandbox's."""

    async def create_changed(self, spec: ContainerSpec, change: Change) -> None:
        body = change(create_body(spec, await self.facts(), None, {}))
        await self._ask("POST", "/containers/create", SLOW_S, body)


def specification(place: Room, name: str) -> ContainerSpec:
    return ContainerSpec(
        name,
        place.image,
        place.tree.holder_command(),
        {},
        "/",
        {},
        SANDBOX_PORT,
        host_ip="127.0.0.1",
        host_port=free_port(),
        mounts=place.tree.mounts,
    )


async def one(engine: Door, place: Room, change: Change) -> list[float]:
    """Milliseconds of the parts of one container."""
    name = "parts"

    async def ms(work: Awaitable[object]) -> float:
        return 1000 * await measure.timed(work)

    spec = specification(place, name)
    parts = [await ms(engine.create_changed(spec, change)), await ms(engine.init(name)), await ms(engine.start(name))]
    return [*parts, await ms(engine.remove(name))]


async def measured(place: Room, runs: int) -> dict[str, list[list[float]]]:
    """By kind, the parts of each run; the first round is not counted."""
    engine = Door(place.storage.socket)
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    try:
        for number in range(runs + 1):
            for kind, change in KINDS.items():
                parts = await one(engine, place, change)
                if number:
                    found[kind].append(parts)
    finally:
        await engine.close()
    return found


def report(found: Mapping[str, Sequence[Sequence[float]]]) -> str:
    rows: list[tuple[str, ...]] = [("container, fastest, ms", *PARTS, "until it runs")]
    for kind, runs in found.items():
        fastest = [min(part) for part in zip(*runs, strict=True)]
        rows.append((kind, *(f"{value:.1f}" for value in (*fastest, sum(fastest[:3])))))
    return "\n\n".join([measure.load(), measure.table(rows)])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="containers of each kind")
    add_room(parser)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    with room(arguments.scratch, arguments.image, arguments.archive) as place:
        found = asyncio.run(measured(place, arguments.runs))
    print(json.dumps(found) if arguments.json else report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
