#!/usr/bin/env python3
"""How long does a node take to start and to stop a sandbox? Quantiles of real starts, and draws from them.

Simulated nodes draw from ``delays.json``. Run as a program, as the user who would run sandboxes, this file measures
them anew on the real Podman, one start at a time, and prints what belongs into ``delays.json``:

    python benchmarks/simulator/delays.py [--runs 200]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks import measure

FILE = Path(__file__).with_name("delays.json")
SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Delays:
    """Seconds at the shares ``SHARES``, from the request to its answer, and where they were measured.

    ``running_share`` is the part of a start after which its container runs and only its server does not answer yet.
    """

    source: str
    samples: int
    start_s: tuple[float, ...]
    stop_s: tuple[float, ...]
    running_share: float


def read(path: Path = FILE) -> Delays:
    """The measured delays; the benchmark ends if the file is none."""
    found = json.loads(path.read_text())
    made = Delays(**{**found, "start_s": tuple(found["start_s"]), "stop_s": tuple(found["stop_s"])})
    if not len(made.start_s) == len(made.stop_s) == len(SHARES):
        raise SystemExit(f"{path}: start_s and stop_s need {len(SHARES)} values each, at the shares {SHARES}")
    return made


def at(quantiles: Sequence[float], share: float) -> float:
    """The value at a share between 0 and 1, on straight lines between the quantiles. Pure."""
    for place in range(1, len(SHARES)):
        if share <= SHARES[place]:
            low, high = SHARES[place - 1], SHARES[place]
            part = (share - low) / (high - low)
            return quantiles[place - 1] + part * (quantiles[place] - quantiles[place - 1])
    return quantiles[-1]


def drawn(quantiles: Sequence[float], chance: random.Random) -> float:
    """A delay as likely as in the measurement."""
    return at(quantiles, chance.random())


def quantiles_of(samples: Sequence[float]) -> tuple[float, ...]:
    """The values at ``SHARES``, to a tenth of a millisecond."""
    return tuple(round(measure.percentile(samples, share), 4) for share in SHARES)


async def measured(runs: int, scratch: Path) -> Delays:
    """Sandboxes with the forked agent server, started and stopped one at a time; the first is not counted."""
    from benchmarks.room import room, server
    from benchmarks.sandbox_start import Client, breakdown

    starts: list[float] = []
    stops: list[float] = []
    with room(scratch, None, None) as place, server(place, 4, "fork") as found:
        async with Client(found, place) as client:
            before = await client.steps()
            for _ in range(runs + 1):
                starts.append(await measure.timed(client.start()))
                stops.append(await measure.timed(client.stop_all()))
            steps = breakdown(before, await client.steps())
    late = steps["answer"] / sum(steps.values())
    source = f"delays.py --runs {runs}, {time.strftime('%Y-%m-%d', time.gmtime())}, {measure.load()}"
    return Delays(source, runs, quantiles_of(starts[1:]), quantiles_of(stops[1:]), round(1 - late, 2))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="starts")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder on this node's disk")
    arguments = parser.parse_args(argv)
    print(json.dumps(asdict(asyncio.run(measured(arguments.runs, arguments.scratch))), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
