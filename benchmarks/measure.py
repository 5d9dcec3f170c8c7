"""How is something timed, how are the figures shown, and which bound was missed?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

USABLE_DEADLINE_S = 180.0
LOOK_S = 0.002
EXIT_MISSED = 1  # a figure was taken, and is worse than the bound that the script names
VERSION_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Aim:
    """A figure, and the bound that it is to keep."""

    what: str
    figure: float
    bound: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    def __str__(self) -> str:
        return f"{self.what}: {self.figure:.3g}, aimed at {'≥' if self.at_least else '≤'} {self.bound:g}"


def verdict(aims: Sequence[Aim]) -> int:
    """The exit code: 0 where all bounds are kept. What is missed is said on stderr."""
    missed = [aim for aim in aims if not aim.kept]
    for aim in missed:
        print(f"missed: {aim}", file=sys.stderr)
    return EXIT_MISSED if missed else 0


async def usable(url: str, path: str = "/health", every_s: float = LOOK_S) -> None:
    """Return when ``url`` answers with 200, asked anew every 2 ms over a new connection, as a prober from outside."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    deadline = time.monotonic() + USABLE_DEADLINE_S
    while not await _answers(host, int(port), path):
        if time.monotonic() > deadline:
            raise SystemExit(f"{url}{path} did not answer within {USABLE_DEADLINE_S:g} s")
        await asyncio.sleep(every_s)


async def _answers(host: str, port: int, path: str) -> bool:
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 2)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            return b" 200 " in await asyncio.wait_for(reader.readline(), 5)
        finally:
            writer.close()
    return False


async def timed(work: Awaitable[object]) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def in_flight(works: Sequence[Callable[[], Awaitable[object]]], at_once: int) -> float:
    """Do all, ``at_once`` of them at the same time; how many a second were done."""
    turn = asyncio.Semaphore(at_once)

    async def one(work: Callable[[], Awaitable[object]]) -> None:
        async with turn:
            await work()

    return len(works) / await timed(asyncio.gather(*(one(work) for work in works)))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, round(share * len(ordered) + 0.5) - 1))]


def milliseconds(values: Sequence[float]) -> str:
    """Median and range of seconds, in milliseconds."""
    low, middle, high = (1000 * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.0f} ms ({low:.0f}–{high:.0f}, n = {len(values)})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def load() -> str:
    """How busy this machine was in the last minute."""
    return f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"


def machine() -> dict[str, str]:
    """What the figures of this run were taken on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpus": f"{os.cpu_count()}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def program_version(*argv: str) -> str:
    """The first line that a program says of its version; empty where there is no such program."""
    if not shutil.which(argv[0]):
        return ""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=VERSION_DEADLINE_S, check=False)
    return next(iter(done.stdout.splitlines()), "")


def available_mb() -> float:
    """Memory that can be had without taking it from another process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:"))
