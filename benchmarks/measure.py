"""How is something timed, and how are the figures shown?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

USABLE_DEADLINE_S = 180.0
LOOK_S = 0.002


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
