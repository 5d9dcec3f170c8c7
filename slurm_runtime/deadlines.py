"""How long does one step wait? As long as it may, and no cancellation is lost at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Awaitable[T]) -> T:
    """The outcome of ``work``; ``asyncio.TimeoutError`` if it is not there after so many seconds, and it is cancelled.

    In place of ``asyncio.wait_for``, which before Python 3.12 returns where it is cancelled in the moment that the
    work ends (CPython issue 86296): a loop around it then goes on for ever, and with it the server that is to stop.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        await _ended(task)
        raise
    if not task.done():
        await _ended(task)
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


async def _ended(task: asyncio.Future[T]) -> None:
    """Cancel it, and wait until what it does for that is done; its error is nobody's."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
