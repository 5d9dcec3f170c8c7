"""How often does an agent server that nobody asks anything wake up? Once a second, where uvicorn's loop does ten times.

Ten times a second takes 0.1 % of a core: half a core for 512 of them that do nothing. uvicorn looks for three things:
the date that it puts into answers changes each second, a limit of requests that the agent server does not set, and a
signal, which wakes our loop at once. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
from types import FrameType
from typing import Any

TICK_S = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def calm(server: Any) -> None:
    """Give the class ``uvicorn.Server`` the calmer loop; a version that is made otherwise keeps its own."""
    if inspect.iscoroutinefunction(getattr(server, "on_tick", None)) and hasattr(server, "main_loop"):
        server.main_loop = main_loop


async def main_loop(self: Any) -> None:
    """In place of ``uvicorn.Server.main_loop``: until it should exit."""
    told = asyncio.Event()
    _tell_at_signals(asyncio.get_running_loop(), told)
    while not await self.on_tick(0):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(told.wait(), TICK_S)
        told.clear()


def _tell_at_signals(loop: asyncio.AbstractEventLoop, told: asyncio.Event) -> None:
    """Wake the loop after uvicorn's own handlers, which put back at its end what was there before them."""
    for number in SIGNALS:
        before = signal.getsignal(number)

        def handle(given: int, frame: FrameType | None, before: Any = before) -> None:
            if callable(before):
                before(given, frame)
            loop.call_soon_threadsafe(told.set)

        if callable(before):
            signal.signal(number, handle)
